"""Start-up checks: every wrong configuration is refused in one sentence, before anything slow."""

import dataclasses
import time

import pytest

from odit import checks, config, data, diffusion, optim
from odit.config import Guidance, Parallel, Sampling
from odit.config_json import first_difference, from_json, to_json
from odit.models import dit

DIGITS = config.presets()["digits"][1]


def changed(**changes):
    """The digits preset with dotted settings replaced: data__path=... is data.path."""
    run = DIGITS
    for name, value in changes.items():
        parts = name.split("__")
        if len(parts) == 2:
            value = dataclasses.replace(getattr(run, parts[0]), **{parts[1]: value})
        run = dataclasses.replace(run, **{parts[0]: value})
    return run


# (changes, key named, found named, what would be right)
WRONG = [
    (dict(steps=0), "steps", "0", "1 or more"),
    (dict(global_batch=-4), "global_batch", "-4", "1 or more"),
    (dict(micro_batch=36), "micro_batch", "36 does not divide global_batch 96", "nearest that does is 32"),
    (dict(stop_at=5000), "stop_at", "5000", "a step between"),
    (dict(seed=-1), "seed", "-1", r"integer in \[0"),
    (dict(keep=0), "keep", "0", "1 or more"),
    (dict(log_every=0), "log_every", "0", "1 or more"),
    (dict(validation_draws=0), "validation_draws", "0", "1 or more"),
    (dict(threads=0), "threads", "0", "1 or more"),
    (dict(device="tpu"), "device", "'tpu'", "auto, cpu or cuda"),
    (dict(model__heads=5), "model.heads", "5 does not divide model.width 96", "use one of .*4, 6, 8"),
    (dict(model__patch=3), "model.patch", "3 does not divide the picture size 8", r"use one of \[1, 2, 4, 8\]"),
    (dict(model__label_dropout=1.0), "model.label_dropout", "1.0", r"in \[0, 1\)"),
    (
        dict(model=dit.Config(width=90, heads=9, positions="rotary")),
        "model.positions",
        "90 over 9 heads is 10",
        "sincos",
    ),
    (dict(model__depth=0), "model.depth", "0", "1 or more"),
    (dict(model__label_dropout=0.0), "sampling.guidance.scale", "1.5", "--model.label-dropout 0.1"),
    (dict(optimizer__lr=float("nan")), "optimizer.lr", "nan", "finite"),
    (dict(optimizer__ema_decay=1.0), "optimizer.ema_decay", "1.0", r"in \[0, 1\)"),
    (dict(optimizer__beta2=-0.1), "optimizer.beta2", "-0.1", r"in \[0, 1\)"),
    (dict(optimizer=optim.Config(final_lr=1e-5)), "optimizer.final_lr", "1e-05", "--optimizer.decay"),
    (dict(data__path="x"), "data.path", "'x'", "leave it out or use folder"),
    (dict(data__flip=True), "data.flip", "on", "--data.no-flip"),
    (dict(data=data.Config(source="folder", image_size=32)), "data.path", "not given", "give the folder"),
    (dict(data=data.Config(source="folder", path="x")), "data.image_size", "not given", "such as 256"),
    (dict(data__held_out=1.5), "data.held_out", "1.5", r"in \[0, 1\)"),
    (dict(data__bad_budget=-1.0), "data.bad_budget", "-1.0", r"in \[0, 1\]"),
    (dict(diffusion__betas="cosine"), "diffusion.betas", "'cosine'", "--diffusion.betas None, or .* eps, x0 or v"),
    (
        dict(diffusion__objective="eps"),
        "diffusion.times is 'logit-normal' and diffusion.time_scale",
        "1000",
        "time-scale None",
    ),
    (dict(data__held_out=0.0), "data.held_out", "0.0", "--no-evaluate"),
    (dict(model__mlp_ratio=float("inf")), "model.mlp_ratio", "inf", "positive"),
    (
        dict(sampling=Sampling(guidance=Guidance(channels=3))),
        "sampling.guidance.channels",
        "3 but pictures have 1",
        "1 to 1",
    ),
    (dict(diffusion=diffusion.Config(objective="eps", time_scale=2.0)), "diffusion.time_scale", "2.0", "flow"),
    (dict(diffusion__time_scale=-1.0), "diffusion.time_scale", "-1.0", "positive"),
    (dict(sampling=Sampling(solver="ddim")), "solver", "'ddim'", "euler, heun, sde"),
    (dict(sampling=Sampling(steps=0)), "steps", "0", "1 or more"),
    (dict(sampling=Sampling(clip=1.0)), "sampling.clip", "1.0", "leave it out"),
    (
        dict(sampling=Sampling(guidance=Guidance(interval=(0.8, 0.2)))),
        "sampling.guidance.interval",
        "0.8, 0.2",
        "rising",
    ),
    (dict(sampling=Sampling(guidance=Guidance(scale=-1.0))), "sampling.guidance.scale", "-1.0", ">= 0"),
    (dict(sampling=Sampling(guidance=Guidance(channels=0))), "sampling.guidance.channels", "0", "1 to 1"),
    (dict(parallel=Parallel(sp=3)), "parallel.sp", "3", "use 1"),
    (dict(parallel=Parallel(offload="optimizer")), "parallel.offload", "zero 0", "use --parallel.zero 2 or 3"),
    (dict(parallel=Parallel(offload="auto", zero=3), device="cpu"), "parallel.offload", "auto", "leave it out"),
    (dict(parallel=Parallel(memory_gib=24.0)), "parallel.memory_gib", "24.0", "use --parallel.offload auto"),
    (dict(parallel=Parallel(offload="auto", zero=3, memory_gib=-1.0)), "parallel.memory_gib", "-1.0", "positive"),
    (dict(grad_norms=True, data=data.Config("digits", held_out=0.0)), "grad_norms", "data.held_out 0", "use 0.1"),
    (dict(grad_norms=True, parallel=Parallel(zero=3)), "grad_norms", "parallel.zero 3", "2 or less"),
    (dict(parallel=Parallel(sequence="ring")), "parallel.sequence ring", "sp is 1", "--parallel.sp 2"),
    (dict(kernels="fused"), "kernels", "fused", "auto or reference"),
]


@pytest.mark.parametrize("changes, key, found, fix", WRONG, ids=lambda v: str(list(v)) if isinstance(v, dict) else None)
def test_wrong_settings_are_refused_in_one_sentence(changes, key, found, fix):
    began = time.perf_counter()
    with pytest.raises(ValueError, match=rf"(?s)^[^\n]*{key}[^\n]*{found}[^\n]*{fix}[^\n]*$"):
        run = changed(**changes)
        checks.check(run)
        checks.pick_device(run.device)
    assert time.perf_counter() - began < 1


MOVING = dict(  # 4 x 4 tokens, time x space
    data=data.Config(source="moving-digits", held_out=1 / 6),
    model=dit.Config(arch="latte", width=96, depth=4, heads=4, patch=8, frame_patch=4),
)
# (changes, ranks, key, found, fix): 16 tokens, 4 heads
WRONG_ON_RANKS = [
    (dict(parallel=Parallel(sp=3)), 4, "parallel.sp 3", "4 ranks", "use 2 or 4"),
    (dict(parallel=Parallel(sp=2, remat="selective"), compile=True), 2, "remat selective", "sp 2", "remat block"),
    (dict(parallel=Parallel(sp=0)), 4, "parallel.sp 0", "", "at least 1"),
    (dict(parallel=Parallel(dp=3)), 4, "parallel.dp 3", "there are 4", "--parallel.dp 4"),
    (dict(parallel=Parallel(dp=2, sp=4)), 4, "parallel.dp 2 x --parallel.sp 4", "makes 8", "--parallel.dp 1"),
    (dict(parallel=Parallel(dp=5, sp=1)), 5, "global_batch 96", "parallel.dp 5", "is 95"),
    (dict(parallel=Parallel(sp=2), micro_batch=32), 4, "micro_batch 32", "96 / 2 = 48", "is 24"),
    (dict(parallel=Parallel(sp=2, sequence="none")), 2, "parallel.sequence is none", "sp 2", "sequence auto"),
    (dict(parallel=Parallel(sequence="ulysses", sp=1)), 4, "parallel.sequence ulysses", "sp is 1", "sp 2 or more"),
    (dict(parallel=Parallel(sequence="megatron")), 4, "parallel.sequence megatron", "sp is 1", "sp 2 or more"),
    (dict(parallel=Parallel(sp=32)), 32, "parallel.sp 32", "16 tokens", "--parallel.sp 16"),
    (dict(parallel=Parallel(sp=8), model__patch=4), 8, "parallel.sp 8", "4 tokens", "--parallel.sp 4"),
    (dict(parallel=Parallel(sp=2, sequence="dsp")), 2, "parallel.sequence dsp", "1 x 16 tokens", "use one of fastseq"),
    (dict(parallel=Parallel(sp=4, ulysses=2)), 4, "parallel.ulysses 2", "sequence auto", "--parallel.sequence usp"),
    (dict(parallel=Parallel(sp=4, ulysses=3, sequence="usp")), 4, "parallel.ulysses 3", "sp 4", r"\[1, 2, 4\]"),
    (dict(parallel=Parallel(sp=4, ulysses=0, sequence="usp")), 4, "parallel.ulysses 0", "sp 4", r"\[1, 2, 4\]"),
    (dict(parallel=Parallel(sp=4, ulysses=2, sequence="ring")), 4, "parallel.ulysses 2", "ring", "sequence usp"),
    (dict(parallel=Parallel(sp=2, ring_fp8=True)), 2, "parallel.ring_fp8", "auto", "--parallel.sequence fastseq"),
    (dict(parallel=Parallel(sp=2, ring_fp8=True, sequence="ring")), 2, "ring_fp8", "is ring", "sequence fastseq"),
    (dict(parallel=Parallel(sp=2), grad_norms=True), 2, "grad_norms", "parallel.sp 2", "--parallel.sp 1"),
    (dict(parallel=Parallel(sp=6, sequence="dsp"), **MOVING), 6, "parallel.sp 6", "4 frames", "sp 4 or fewer"),
    (dict(parallel=Parallel(sp=6), **MOVING), 6, "parallel.sp 6", "their 4 tokens", "sp 4 or fewer"),
]


@pytest.mark.parametrize("changes, world, key, found, fix", WRONG_ON_RANKS)
def test_wrong_layouts_are_refused_in_one_sentence(changes, world, key, found, fix):
    with pytest.raises(ValueError, match=rf"(?s)^[^\n]*{key}[^\n]*{found}[^\n]*{fix}[^\n]*$"):
        checks.check(changed(**changes), world=world)


@pytest.mark.parametrize(
    "changes, world, found, fix",
    [
        (dict(global_batch=1), 32, "parallel.sp 32 is more than the 16 tokens", "--global-batch 32"),
        (dict(global_batch=3, parallel=Parallel(sequence="none")), 2, "parallel.sequence is none", "--global-batch 4"),
        (dict(global_batch=3, grad_norms=True), 4, "grad_norms needs whole samples", "--global-batch 4"),
    ],
)
def test_a_degree_that_was_not_asked_for_is_explained(changes, world, found, fix):
    with pytest.raises(ValueError, match=rf"{found}.*global_batch \d+ does not divide over {world} ranks.*{fix}"):
        checks.check(changed(**changes), world=world)


def test_what_a_resumed_run_may_change():
    layout = dict(parallel=Parallel(sp=2, zero=3, sequence="ring", cfg=2))
    assert first_difference(to_json(DIGITS), to_json(changed(**layout))) is None
    found = first_difference(to_json(DIGITS), to_json(changed(parallel=Parallel(ring_fp8=True))))
    assert found == ("parallel.ring_fp8", False, True)


def test_degrees():
    """Samples are shared before tokens are, and tokens by as few ranks as the global batch of 96 allows."""
    told = {world: checks.divide(DIGITS, world) for world in (1, 4, 5, 8, 9, 64)}
    assert told == {1: (1, 1), 4: (4, 1), 5: (1, 5), 8: (8, 1), 9: (3, 3), 64: (32, 2)}
    assert checks.axes(changed(parallel=Parallel(sp=8, sequence="usp")), 16) == dict(dp=2, sp=8, ulysses=4, cfg=1)
    assert checks.divide(changed(parallel=Parallel(dp=2)), 8) == (2, 4)


def test_every_preset_passes_its_checks():
    for name, (_, run) in config.presets().items():
        if name == "latents":
            continue  # needs an index to look into: tests/test_latents.py
        if name in ("folder", "captions", "clips"):
            run = dataclasses.replace(run, data=dataclasses.replace(run.data, path="pictures"))
        checks.check(run)


def test_json_gives_the_config_back():
    for _, run in config.presets().values():
        assert from_json(config.Run, to_json(run)) == run


BAD_JSON = [
    ({"step": 3}, "step is no setting of this version: did you mean 'steps'"),
    ({"model": {"widht": 3}}, "model.widht is no setting of this version: did you mean 'width'"),
    ({"steps": "many"}, r"steps is 'many' \(str\): use a value of type int"),
    ({"model": 4}, "model is 4: use an object"),
    ({"precision": "fp8"}, "precision is 'fp8': use one of fp32, bf16, fp16"),
    ({"compile": 1}, "compile is 1 .int.: use a value of type bool"),
    ({"sampling": {"guidance": {"interval": [1.0]}}}, "sampling.guidance.interval"),
]


@pytest.mark.parametrize("found, message", BAD_JSON)
def test_bad_json_is_refused_by_key(found, message):
    with pytest.raises(ValueError, match=message):
        from_json(config.Run, found)
