"""Weights for others and from others: what is exported draws the same pictures there, and here when it comes back."""

import dataclasses
import errno
import json
import os
import re
import zipfile
from pathlib import Path

import pytest
import tiny
import torch
from conftest import redraw, script
from diffusers import AutoencoderKL, DiTPipeline, LattePipeline
from diffusers.pipelines.dit import pipeline_dit
from safetensors.torch import load_file, save_file
from test_storage import tmpfs  # noqa: F401 (a fixture)

from odit import checkpoint, config, convert, data, diffusion, finetune, models, plan, random, tree
from odit import source as sources
from odit.config_json import to_json
from odit.diffusion import gaussian, guidance, solvers
from odit.encoders import config as encoders
from odit.front import Front
from odit.health import CheckpointError, exit_code
from odit.models.config import Config, Shape
from odit.storage import StorageError

export, show = script("export"), script("show")
sample_script, evaluate_script = script("sample"), script("evaluate")
KEY = random.key(5)
MODEL = Config(width=32, depth=2, heads=4, patch=2, timestep_freqs="diffusers")
SHAPE = Shape(4, 8, 3, outputs=2)
EPS_DIGITS = dataclasses.replace(
    config.presets()["digits"][1],
    model=MODEL,
    diffusion=diffusion.Config("eps"),
    sampling=config.Sampling(steps=2),
    evaluate=False,
)


def run_of(model=MODEL, steps=25, folder=None, **objective):
    """A run on latents whose process has ``steps`` steps, all of which its samples take."""
    return config.Run(
        data=data.Config(source="latents", path=Path("gone"), held_out=0.0),
        model=model,
        diffusion=diffusion.Config(**{"objective": "eps", "train_steps": steps, **objective}),
        sampling=config.Sampling(solver="ddim", steps=steps or 50, guidance=config.Guidance(scale=3.0)),
        encoders=encoders.Config(vae="kl", vae_path=str(folder)) if folder else encoders.Config(),
        evaluate=False,
    )


def saved(path, run, shape=SHAPE, which="ema", **told):
    """A weights file of a model with drawn weights, and these."""
    declared = finetune.declare(run.finetune, models.of(run.model).declare(run.model, shape))
    params = redraw(declared, dtype=torch.float32)
    about = {"step": 7, "config": to_json(run), "shape": dataclasses.asdict(shape), **told}
    checkpoint.save_weights(path, params, about, which)
    return params


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return tiny.kl(tmp_path_factory.mktemp("vae"))


def exported(*args, **changes):
    export.main(export.Export(*args, **changes))


def drawn_by(path, tmp_path, **changes):
    """What sample.py draws."""
    tensors = tmp_path / "x.safetensors"
    args = dict(num=4, seed=3, device="cpu", out=tmp_path / "x.png", tensors=tensors)
    sample_script.main(sample_script.Sample(path, **{**args, **changes}))
    return load_file(tensors)["samples"]


def noise_of(shape, num=4, seed=3):
    return random.normal(random.fold_in(random.key(seed), "sample"), shape.sample, torch.arange(num))


# --- diffusers' pipelines draw what odit draws ---


@pytest.mark.parametrize("predicts, betas, num_classes", [("eps", "linear", 3), ("v", "cosine", 1000)])
def test_dit_pipeline_draws_the_same_pictures(predicts, betas, num_classes, vae, tmp_path, monkeypatch, capsys):
    """With the same noise, as many steps as the process has and the same guidance, through the same autoencoder."""
    shape = dataclasses.replace(SHAPE, num_classes=num_classes)
    run, names = run_of(objective=predicts, betas=betas), [f"name {i}" for i in range(num_classes)]
    saved(tmp_path / "w.safetensors", run, shape, class_names=names)
    exported(tmp_path / "w.safetensors", tmp_path / "pipe", "diffusers", vae_path=str(vae))
    assert ("row 1000" in capsys.readouterr().out) == (num_classes == 3)
    own = encoders.Config(vae="kl", vae_path=str(vae))
    pictures = drawn_by(tmp_path / "w.safetensors", tmp_path, encoders=own, label=(0, 2))
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda **_: noise_of(shape))
    pipe = DiTPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    labels = pipe.get_label_ids(["name 0", "name 2"] * 2)
    theirs = pipe(labels, guidance_scale=3.0, num_inference_steps=25, output_type="pt").images
    assert (theirs - (pictures / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-4
    assert theirs.std() > 0.05 and (theirs[0] - theirs[1]).abs().max() > 1e-2

    # and what comes back draws it too
    again = drawn_by(tmp_path / "pipe", tmp_path, encoders=own, label=(0, 2), steps=25, guidance=3.0)
    assert (again - pictures).abs().max() < 1e-4


def test_dit_pipeline_of_a_thousand_steps_draws_the_same_at_the_same_times(vae, tmp_path, monkeypatch):
    """diffusers' times are others than odit's (see ``to_scheduler``): here odit's solver takes diffusers'."""
    run = run_of(steps=1000)
    params = saved(tmp_path / "w.safetensors", run)
    exported(tmp_path / "w.safetensors", tmp_path / "pipe", "diffusers")
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda **_: noise_of(SHAPE))
    pipe = DiTPipeline.from_pretrained(tmp_path / "pipe", vae=AutoencoderKL.from_pretrained(vae))
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe([0, 1, 2, 0], guidance_scale=3.0, num_inference_steps=10, output_type="pt").images
    times = sorted(pipe.scheduler.timesteps.tolist())
    assert times == [100 * i for i in range(10)]
    process = gaussian.respace(diffusion.build(run.diffusion), times)
    latents = solve(process, params, run.model, torch.tensor([0, 1, 2, 0]), torch.full((4,), 3), noise_of(SHAPE))
    scale = pipe.vae.config.scaling_factor
    with torch.no_grad():
        ours = pipe.vae.decode(latents / scale).sample
    assert (theirs - (ours / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-4


def solve(process, params, cfg, cond, null, noise, scale=3.0):
    model = guidance.guided(lambda x, t, y: models.of(cfg).forward(params, x, t, y, cfg), cond, null, scale=scale)
    return solvers.sample(process, model, noise, solver="ddim", steps=process.num_steps)


def test_latte_pipeline_draws_the_same_latents(vae, tmp_path, capsys):
    """With captions' features given: its text encoder is no part of the folder."""
    cfg = Config(arch="latte", width=32, depth=2, heads=4, patch=2, adaln="single")
    shape, run = Shape(4, (3, 8, 8), outputs=2, text_length=6, text_width=10), run_of(cfg)
    params = saved(tmp_path / "w.safetensors", run, shape)
    exported(tmp_path / "w.safetensors", tmp_path / "pipe", "diffusers", vae_path=str(vae))
    assert "text: none; give LattePipeline.from_pretrained a tokenizer=" in capsys.readouterr().out
    pipe = LattePipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    cond, null = (random.normal(random.fold_in(KEY, name), (6, 10), torch.arange(4)) for name in ("cond", "null"))
    theirs = pipe(
        prompt_embeds=cond, negative_prompt_embeds=null, negative_prompt=None, latents=noise_of(shape), video_length=3,
        height=16, width=16, num_inference_steps=25, guidance_scale=3.0, output_type="latent",
    ).frames  # fmt: skip
    mask = torch.ones(4, 6, dtype=torch.bool)
    both = [{"text": text, "mask": mask} for text in (cond, null)]
    ours = solve(diffusion.build(run.diffusion), params, cfg, *both, noise_of(shape))
    assert (theirs - ours).abs().max() < 1e-4 * ours.abs().max()

    found = sources.open_source(tmp_path / "pipe", foreign=sources.Foreign(text_length=6))
    assert (found.shape, found.run.model, found.run.diffusion.train_steps) == (shape, cfg, 25)


# --- there and back ---


def assert_same(a, b):
    assert tree.paths(a) == tree.paths(b)
    for (path, x), y in zip(tree.items(a), tree.leaves(b)):
        assert torch.equal(x, y), path


def read_whole(path, which="ema", **foreign):
    found = sources.open_source(path, which, sources.Foreign(**foreign))
    composed = plan.compose(dataclasses.replace(found.run, device="cpu"), found.shape, None, Front())
    return found.load(composed), found


@pytest.mark.parametrize("to, out", [("odit", "b.safetensors"), ("dit", "b.pt"), ("diffusers", "b")])
def test_every_form_comes_back_with_the_same_bits(to, out, tmp_path):
    freqs = "diffusers" if to == "diffusers" else "dit"
    run = run_of(dataclasses.replace(MODEL, timestep_freqs=freqs), steps=None)
    run = dataclasses.replace(run, sampling=config.Sampling(solver="ddim"))
    params = saved(tmp_path / "a.safetensors", run, class_names=["x", "y", "z"])
    exported(tmp_path / "a.safetensors", tmp_path / out, to)
    back, found = read_whole(tmp_path / out, heads=4)
    assert_same(back, params)
    assert (found.run.model, found.shape) == (run.model, SHAPE)
    assert found.run.diffusion.learned_variance and diffusion.build(found.run.diffusion).predicts == "eps"
    assert (found.about.get("class_names") == ["x", "y", "z"]) == (to != "dit")
    assert sorted(os.listdir(tmp_path)) == sorted(["a.safetensors", out])
    (tmp_path / "any").touch()
    assert {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()} == {
        (tmp_path / "any").stat().st_mode
    }
    if to == "odit":
        assert (found.about["step"], found.run) == (7, run)

    # and from there to odit's form
    exported(tmp_path / out, tmp_path / "c.safetensors", foreign=sources.Foreign(heads=4))
    assert_same(read_whole(tmp_path / "c.safetensors")[0], params)


def test_live_weights_and_merged_adapters(tiny, make_plan, tmp_path):
    """From a checkpoint folder: which weights, the metadata, and an adapter's product added to its matrix."""
    from odit import train

    tuned = finetune.Config(lora_rank=2, train=("label.*",))
    composed = make_plan(tiny, init_from=Path("x"), finetune=tuned)
    state = train.init_state(composed, KEY)
    params = redraw(composed.declared, dtype=torch.float32)
    ema = tree.map(lambda p: p + 1, params)
    about = {"config": to_json(composed.run), "shape": dataclasses.asdict(composed.shape), "data": "d"}
    folder = checkpoint.save(composed, state._replace(step=9, params=params, ema=ema), about)
    for which, weights in (("ema", ema), ("param", params)):
        out = tmp_path / f"{which}.safetensors"
        exported(folder, out, weights=which)
        merged = finetune.merge(weights, composed.run.finetune.scale)
        back, found = read_whole(out, which)
        assert_same(back, merged)
        assert not any(finetune.is_adapter(path) for path in found.weights.shapes)
        assert (found.about["step"], found.about["data"], "tensors" in found.about) == (9, "d", False)
        assert found.about["finetune"]["lora_rank"] == 2 and not found.run.finetune.lora_rank
    with pytest.raises(CheckpointError, match="holds param weights, not ema"):
        read_whole(out)[0]


def test_a_training_checkpoint_of_dit_holds_both(tmp_path):
    run = run_of(dataclasses.replace(MODEL, timestep_freqs="dit"))
    params = saved(tmp_path / "a.safetensors", run)
    both = {name: convert.to_dit(tree.map(lambda p, i=i: p + i, params), run.model, SHAPE)
            for i, name in enumerate(("model", "ema"))}  # fmt: skip
    torch.save(both, tmp_path / "a.pt")
    for i, which in enumerate(("param", "ema")):
        assert_same(read_whole(tmp_path / "a.pt", which, heads=4)[0], tree.map(lambda p, i=i: p + i, params))
    with pytest.raises(CheckpointError, match=r"width 32 is none of the published .* pass heads= \(--foreign.heads\)"):
        read_whole(tmp_path / "a.pt")
    _, found = read_whole(tmp_path / "a.pt", heads=4, null_label=False)
    assert (found.shape.num_classes, found.run.sampling.guidance.scale) == (4, 1.0)


# --- sample.py and evaluate.py take them all ---


def test_samples_are_those_of_the_weights_that_were_exported(tmp_path):
    """facebookresearch/DiT: what its sample.py does is the default."""
    run = run_of(dataclasses.replace(MODEL, timestep_freqs="dit"), steps=None)
    saved(tmp_path / "a.safetensors", dataclasses.replace(run, sampling=config.presets()["dit-s-2"][1].sampling))
    exported(tmp_path / "a.safetensors", tmp_path / "a.pt", "dit")
    given = dict(steps=3, num=3, label=(1,))
    mine = drawn_by(tmp_path / "a.safetensors", tmp_path, **given)
    theirs = drawn_by(tmp_path / "a.pt", tmp_path, **given, foreign=sources.Foreign(heads=4))
    assert torch.equal(mine, theirs)
    found = sources.open_source(tmp_path / "a.pt", foreign=sources.Foreign(heads=4))
    assert found.run.sampling == config.presets()["dit-s-2"][1].sampling


def test_an_autoencoder_of_other_latents_is_refused(vae, tmp_path):
    run = run_of(dataclasses.replace(MODEL, timestep_freqs="dit"), steps=None)
    saved(tmp_path / "a.safetensors", run, Shape(3, 8, 3, outputs=2))
    exported(tmp_path / "a.safetensors", tmp_path / "a.pt", "dit")
    with pytest.raises(CheckpointError, match=r"latents of 4 channels, checkpoint .*a.pt draws 3"):
        own = encoders.Config(vae="kl", vae_path=str(vae))
        drawn_by(tmp_path / "a.pt", tmp_path, encoders=own, foreign=sources.Foreign(heads=4))


def test_evaluate_asks_for_the_data(tmp_path, capsys):
    run = dataclasses.replace(EPS_DIGITS, model=dataclasses.replace(MODEL, timestep_freqs="dit"))
    saved(tmp_path / "a.safetensors", run, Shape(1, 8, 10, outputs=2), data="told")
    exported(tmp_path / "a.safetensors", tmp_path / "a.pt", "dit")
    given = dict(num=20, steps=1, device="cpu", foreign=sources.Foreign(heads=4))
    with pytest.raises(ValueError, match="does not tell what it was trained on: use --data digits"):
        evaluate_script.main(evaluate_script.Evaluate(tmp_path / "a.pt", **given))
    with pytest.raises(ValueError, match="tells its own: leave it out"):
        evaluate_script.main(evaluate_script.Evaluate(tmp_path / "a.safetensors", data="digits", **given))
    saved(tmp_path / "b.safetensors", run, SHAPE)
    exported(tmp_path / "b.safetensors", tmp_path / "b.pt", "dit")
    with pytest.raises(CheckpointError, match=r"draws 4x8x8 of 3 classes, data.source digits has 1x8x8 of 10"):
        evaluate_script.main(evaluate_script.Evaluate(tmp_path / "b.pt", data="digits", **given))


@pytest.mark.slow
def test_evaluate_judges_what_was_exported(tmp_path, capsys):
    run = dataclasses.replace(EPS_DIGITS, model=dataclasses.replace(MODEL, timestep_freqs="dit"))
    saved(tmp_path / "a.safetensors", run, Shape(1, 8, 10, outputs=2), data="told")
    exported(tmp_path / "a.safetensors", tmp_path / "a.pt", "dit")
    given = dict(num=20, steps=2, solver="ddim", guidance=1.0, device="cpu")
    evaluate_script.main(evaluate_script.Evaluate(tmp_path / "a.safetensors", **given))
    mine = capsys.readouterr().out.splitlines()[-4:]
    given |= dict(data="digits", foreign=sources.Foreign(heads=4))
    evaluate_script.main(evaluate_script.Evaluate(tmp_path / "a.pt", **given))
    assert capsys.readouterr().out.splitlines()[-4:] == mine and "class accuracy" in mine[-1]


# --- what a form cannot hold ---

FLOW = dict(objective="flow", train_steps=None)
CAPTIONS = Shape(4, 8, outputs=2, text_length=6, text_width=10)
REFUSED = {
    "flow in a pipeline": ("diffusers", {}, FLOW, SHAPE, "diffusion.objective is flow and diffusers' DiTPipeline"),
    "flow in a .pt": ("dit", {"timestep_freqs": "dit"}, FLOW, SHAPE, "diffusion.objective is flow .* samples by eps"),
    "cosine betas in a .pt": ("dit", {}, dict(betas="cosine"), SHAPE, "diffusion.betas is cosine"),
    "steps in a .pt": ("dit", {}, dict(train_steps=25), SHAPE, "diffusion.train_steps is 25 .* samples by 1000"),
    "captions in a .pt": ("dit", {}, dict(train_steps=None), CAPTIONS, "captions of 6 tokens and .* only labels"),
    "captions": ("diffusers", {}, {}, CAPTIONS, "captions of 6 tokens"),
    "timesteps": ("diffusers", {"timestep_freqs": "dit"}, {}, SHAPE, "timestep_freqs is dit .*--allow-other"),
    "rotary": ("diffusers", {"positions": "rotary"}, {}, SHAPE, "model.positions is rotary"),
    "classes": ("diffusers", {}, {}, Shape(4, 8, 1001, outputs=2), "1001 classes and DiTPipeline takes 1000"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence_and_nothing_is_written(case, tmp_path):
    to, model, objective, shape, match = REFUSED[case]
    run = run_of(dataclasses.replace(MODEL, **model), **objective)
    if run.diffusion.objective == "flow":
        shape, run = dataclasses.replace(shape, outputs=1), dataclasses.replace(run, sampling=config.Sampling())
    saved(tmp_path / "a.safetensors", run, shape)
    with pytest.raises(ValueError, match=match) as caught:
        exported(tmp_path / "a.safetensors", tmp_path / ("b.pt" if to == "dit" else "b"), to)
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == ["a.safetensors"]


def test_other_timesteps_are_written_when_allowed(tmp_path):
    params = saved(tmp_path / "a.safetensors", run_of(dataclasses.replace(MODEL, timestep_freqs="dit")))
    exported(tmp_path / "a.safetensors", tmp_path / "b", "diffusers", allow_other_timesteps=True)
    assert_same(read_whole(tmp_path / "b")[0], params)


def test_a_learned_variance_is_what_latte_pipeline_takes(tmp_path):
    cfg = Config(arch="latte", width=32, depth=2, heads=4, patch=2, adaln="single")
    saved(
        tmp_path / "a.safetensors",
        run_of(cfg, variance="fixed-large"),
        Shape(4, (3, 8, 8), text_length=6, text_width=10),
    )
    with pytest.raises(ValueError, match=r"diffusion.variance is fixed-large and LattePipeline drops"):
        exported(tmp_path / "a.safetensors", tmp_path / "b", "diffusers")


def test_settings_that_do_not_go_together(vae, tmp_path):
    saved(tmp_path / "a.safetensors", run_of())
    digits = EPS_DIGITS
    saved(tmp_path / "digits.safetensors", digits, Shape(1, 8, 10, outputs=2))
    saved(tmp_path / "told.safetensors", run_of(), encoders={"vae": "other"})
    tiny.kl(tmp_path / "shifted", shift_factor=0.5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for name, out, to, vae_path, match in (
        ("a", "b.pt", "odit", None, "out is .*b.pt but --to odit writes a .safetensors file: use b.safetensors"),
        ("a", "b.safetensors", "odit", vae, "vae_path is given but --to odit has no place for it"),
        ("a", "full", "diffusers", None, "full is there already"),
        ("digits", "b", "diffusers", vae, "draws pixels: leave it out"),
        ("told", "b", "diffusers", vae, "vae_path has the fingerprint .* was trained with other"),
        ("a", "b", "diffusers", tmp_path / "shifted", "shifts latents"),
    ):  # fmt: skip
        given = {"vae_path": str(vae_path)} if vae_path else {}
        with pytest.raises(ValueError, match=match):
            exported(tmp_path / f"{name}.safetensors", tmp_path / out, to, **given)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("beside", ["metrics.jsonl", "manifest.json", None])
def test_files_of_runs_are_not_written_over(beside, tmp_path):
    saved(tmp_path / "a.safetensors", run_of())
    out = tmp_path / ("b/ema.safetensors" if beside else "a.safetensors")
    out.parent.mkdir(exist_ok=True)
    if beside:
        (out.parent / beside).touch()
        out.write_text("theirs")
    before = out.read_bytes()
    words = f"is a run's own, as {beside} is beside it" if beside else "is the checkpoint itself"
    with pytest.raises(ValueError, match=f"out .* {words}: use another --out"):
        exported(tmp_path / "a.safetensors", out)
    assert out.read_bytes() == before


def test_an_export_may_be_made_anew_and_beside_a_run(tmp_path):
    saved(tmp_path / "a.safetensors", run_of())
    for out in ("b.safetensors", "b.safetensors"):
        exported(tmp_path / "a.safetensors", tmp_path / out)
    (tmp_path / "metrics.jsonl").touch()
    exported(tmp_path / "a.safetensors", tmp_path / "c.safetensors")


def test_pixels_have_no_pipeline_but_a_transformer(tmp_path, capsys):
    run = EPS_DIGITS
    params = saved(tmp_path / "a.safetensors", run, Shape(1, 8, 10, outputs=2))
    exported(tmp_path / "a.safetensors", tmp_path / "b", "diffusers")
    assert "vae: none, as this model draws pixels" in capsys.readouterr().out
    assert_same(read_whole(tmp_path / "b")[0], params)
    with pytest.raises(OSError, match=r"no file named config.json"):
        DiTPipeline.from_pretrained(tmp_path / "b")


def test_the_fingerprint_tells_the_autoencoder_in_the_dtype_it_served_in(vae, tmp_path):
    from odit.encoders import vae as vaes

    told = {"vae": vaes.load("kl", vae, torch.bfloat16).fingerprint}
    saved(tmp_path / "a.safetensors", run_of(), encoders=told)
    exported(tmp_path / "a.safetensors", tmp_path / "b", "diffusers", vae_path=str(vae))
    kept = AutoencoderKL.from_pretrained(tmp_path / "b" / "vae").state_dict()
    assert_same(kept, AutoencoderKL.from_pretrained(vae).state_dict())


def test_what_schedulers_tell(tmp_path):
    """A bound on x_0 is the default of some classes and of no other; a transformer alone is taken for eps."""
    folder = folder_of(tmp_path)
    file = folder / SCHEDULER
    for told, clip, objective in (
        ({"_class_name": "DDIMScheduler"}, 1.0, "eps"),
        ({"_class_name": "DDPMScheduler", "clip_sample_range": 2}, 2.0, "eps"),
        ({"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "sample"}, None, "x0"),
        ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "v_prediction"}, None, "v"),
    ):
        file.write_text(json.dumps(told))
        run = sources.open_source(folder).run
        assert (run.sampling.clip, run.diffusion.objective, run.diffusion.train_steps) == (clip, objective, None)
    run = sources.open_source(folder / "transformer").run
    assert (run.sampling.clip, run.diffusion) == (None, diffusion.Config("eps", variance="learned"))


# --- files of others that are broken or crafted ---


def folder_of(tmp_path):
    saved(tmp_path / "a.safetensors", run_of())
    exported(tmp_path / "a.safetensors", tmp_path / "b", "diffusers")
    (tmp_path / "a.safetensors").unlink()
    return tmp_path / "b"


def parted(folder, change=lambda names: names):
    """Splits the weights into two files and an index, as diffusers does with large ones."""
    whole = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(whole)
    names = sorted(state)
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, whole.with_name(file))
    whole.unlink()
    index = whole.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": change(files)}))


def edited(folder, name, **changes):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_weights_in_parts_are_read(tmp_path):
    folder = folder_of(tmp_path)
    before, _ = read_whole(folder)
    parted(folder)
    assert_same(read_whole(folder)[0], before)


def elsewhere(folder):
    """A file outside the folder, that an index points to."""
    save_file({"proj_out_1.bias": torch.zeros(64)}, folder.parent / "x.safetensors")
    parted(folder, lambda files: files | {"proj_out_1.bias": "../../x.safetensors"})


SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
FOLDERS = {
    "traversal": (elsewhere, r"names '../../x.safetensors', which is no safetensors file beside it"),
    "absolute": (lambda f: parted(f, lambda m: m | {"proj_out_1.bias": "/x.safetensors"}), "names '/x.safetensors'"),
    "no map": (lambda f: parted(f, lambda m: 3), "no weight_map"),
    "another part": (lambda f: parted(f, lambda m: dict.fromkeys(m, "part-0.safetensors")), "does not hold it"),
    "no part": (lambda f: parted(f, lambda m: dict.fromkeys(m, "part-9.safetensors")), "part-9.safetensors .*No such"),
    "left out": (lambda f: parted(f, lambda m: {k: m[k] for k in m if k != "proj_out_1.bias"}), "is missing"),
    "labels": (lambda f: edited(f, INDEX, id2label={"0": "a", "2": "b"}), "id2label that does not name"),
    "huge": (lambda f: edited(f, "transformer/config.json", sample_size=2_000_000_001), "positive integer up to"),
    "width": (lambda f: edited(f, "transformer/config.json", num_attention_heads=60_000), "has shape"),
    "predicts": (lambda f: edited(f, SCHEDULER, prediction_type="flow"), "prediction_type 'flow': only epsilon"),
    "betas": (lambda f: edited(f, SCHEDULER, beta_schedule="scaled_linear"), "beta_schedule 'scaled_linear': only"),
    "beta": (lambda f: edited(f, SCHEDULER, beta_end=0.03), "beta_end 0.03"),
    "kind": (lambda f: edited(f, SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler"), "is of a FlowMatch"),
    "steps": (lambda f: edited(f, SCHEDULER, num_train_timesteps=10**9), "num_train_timesteps 1000000000"),
    "trained": (lambda f: edited(f, SCHEDULER, trained_betas=[0.1]), "trained_betas, which odit does not have"),
    "no config": (lambda f: (f / "transformer" / "config.json").unlink(), "neither odit's manifest.json nor"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_are_refused(case, tmp_path):
    spoil, match = FOLDERS[case]
    folder = folder_of(tmp_path)
    spoil(folder)
    with pytest.raises(CheckpointError, match=match) as caught:
        sources.open_source(folder)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


class Hostile:
    """Unpickled by a careless reader, makes a file."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


def traversal(path):
    torch.save({"a": torch.zeros(4)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../owned", "x")


def view(path):
    """A tensor that its pickle makes wider than its storage is."""
    torch.save({"a": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            if name.endswith("data.pkl"):
                assert content.count(b"K\x04\x85") == 1  # the shape, (4,)
                content = content.replace(b"K\x04\x85", b"J\x00\x00\x00\x40\x85")
            archive.writestr(name, content)


PICKLES = {
    "pickle": (lambda p: torch.save({"a": Hostile(p.parent / "owned")}, p), "asks for (_io|io|builtins).open"),
    "traversal": (traversal, r"names '../owned', which lies outside it"),
    "view": (view, "is broken"),
    "expanded": (lambda p: torch.save({"a": torch.zeros(1).expand(1_000_000)}, p), "claims 4000000 bytes"),
    "rubbish": (lambda p: p.write_bytes(b"rubbish"), "no .pt file"),
}  # fmt: skip


@pytest.mark.parametrize("case", PICKLES)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "b/diffusion_pytorch_model.bin"])
def test_crafted_pickles_run_nothing_whatever_their_name(case, name, tmp_path):
    write, match = PICKLES[case]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    write(path)
    if path.suffix == ".bin":
        _, found = convert.to_diffusers(redraw(models.dit.declare(MODEL, SHAPE)), MODEL, SHAPE)
        (path.parent / "config.json").write_text(json.dumps(found))
        path = path.parent
    match = "no safetensors file" if path.suffix == ".safetensors" else match
    with pytest.raises(CheckpointError, match=match) as caught:
        sources.open_source(path)
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("owned"))


def test_the_hostile_files_do_act_on_a_careless_reader(tmp_path):
    PICKLES["pickle"][0](tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)["a"].close()
    assert (tmp_path / "owned").exists()


def test_paths_that_are_none_of_these(tmp_path):
    (tmp_path / "run").mkdir()
    saved(tmp_path / "run" / "ema.safetensors", run_of())
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    folder = folder_of(tmp_path)
    checkpoint.save_weights(tmp_path / "y.safetensors", {"a": torch.zeros(1)}, {"step": 1})
    for path, match in (
        (tmp_path / "none", "checkpoint .*none does not exist"),
        (tmp_path / "run", "is the folder of a run: give .*ema.safetensors"),
        (tmp_path, "neither odit's manifest.json nor diffusers' config.json"),
        (tmp_path / "x.safetensors", "does not say which model it holds"),
        (tmp_path / "y.safetensors", "does not tell its shape"),
        (
            folder / "transformer" / "diffusion_pytorch_model.safetensors",
            "is a file of a diffusers model: give its folder",
        ),
    ):
        with pytest.raises(CheckpointError, match=match):
            sources.open_source(path).shape  # noqa: B018
    with pytest.raises(CheckpointError, match="holds one set of weights"):
        sources.open_source(folder, "param")


# --- show ---


def shown(path, capsys, **foreign):
    show.main(show.Show(path, sources.Foreign(**foreign)))
    return capsys.readouterr().out


def test_show_tells_what_a_checkpoint_is(tiny, make_plan, tmp_path, capsys):
    from odit import train

    composed = make_plan(tiny)
    about = {"config": to_json(tiny), "shape": dataclasses.asdict(composed.shape), "class_names": ["a", "b"]}
    folder = checkpoint.save(composed, train.init_state(composed, KEY)._replace(step=12), about)
    told = shown(folder, capsys)
    for words in (
        "kind: checkpoint folder\nstep: 12\nmodel: DiT width 32, depth 2, heads 2, patch 2: 0.0",
        "data: digits, 1x8x8, 10 classes",
        "config: digits --steps 20 --log-every 1",
        "--no-evaluate",
        "--model.width 32 --model.depth 2 --model.heads 2",
        "  manifest.json: ",
        "classes: a, b\n",
        "  patch.w 32x4, rms 0.",
        "hashes: every byte is as it was written\n",
    ):
        assert words in told, words
    last = sorted(folder.glob("state-*"))[-1]
    last.write_bytes(last.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=f"{last.name} was changed after it was written"):
        shown(folder, capsys)


def test_show_reads_all_kinds_and_live_weights(tmp_path, capsys):
    run = run_of(dataclasses.replace(models.dit.sized("s", 2), depth=1, timestep_freqs="dit"), steps=None)
    saved(tmp_path / "a.safetensors", run, which="param")
    told = shown(tmp_path / "a.safetensors", capsys)
    assert "kind: weights file (param)\nstep: 7\n" in told and "hashes: every byte is as it was written\n" in told
    exported(tmp_path / "a.safetensors", tmp_path / "a.pt", "dit", "param")
    exported(tmp_path / "a.safetensors", tmp_path / "b", "diffusers", "param", allow_other_timesteps=True)
    capsys.readouterr()
    told = shown(tmp_path / "a.pt", capsys)
    assert "kind: weights of facebookresearch/DiT\nmodel: DiT width 384" in told and "hashes: none\n" in told
    assert "config: dit-s-2 --model.depth 1\n" in told and "  a.pt: " in told
    told = shown(tmp_path / "b", capsys)
    assert "kind: weights of diffusers" in told and "  transformer/config.json: " in told and "classes: 0, 1, 2" in told


@pytest.mark.parametrize(
    "to, room", [("odit", 8), ("dit", 8), ("diffusers", 32), ("diffusers", 104), ("diffusers", 144)]
)
def test_a_full_disk_ends_the_export(to, room, vae, tmpfs, tmp_path):  # noqa: F811
    """In the weights; with room in KiB for these in the JSON beside, and with room for that in the autoencoder."""
    run = run_of(dataclasses.replace(MODEL, width=16, depth=1, heads=2, timestep_freqs="dit"), steps=None)
    if to == "diffusers":
        run = run_of(dataclasses.replace(run.model, timestep_freqs="diffusers"))
    saved(tmp_path / "w.safetensors", run)
    (tmpfs / "filling").write_bytes(bytes((256 - room) * 1024))
    changes = {"vae_path": str(vae)} if to == "diffusers" else {}
    out = tmpfs / {"odit": "w.safetensors", "dit": "w.pt", "diffusers": "pipe"}[to]
    told = r"cannot be written \(ENOSPC: No space left on device\): (\d+) bytes are needed, (\d+) are free: make room"
    with pytest.raises(StorageError, match=told) as failed:
        exported(tmp_path / "w.safetensors", out, to, **changes)
    needed, free = map(int, re.search(told, str(failed.value)).groups())
    assert needed > free and exit_code(failed.value) == 6 and os.listdir(tmpfs) == ["filling"]


@pytest.mark.parametrize("what", ["out", "tensors"])
def test_a_place_that_takes_no_file_is_told_before_drawing(tmp_path, monkeypatch, what):
    """And what fills up meanwhile is told with path and bytes."""
    saved(tmp_path / "w.safetensors", run_of(), SHAPE)
    monkeypatch.setattr(sample_script.sample, "sample", lambda *args, **kwargs: pytest.fail("drew first"))
    there = Path("/proc") / ("x.png" if what == "out" else "x.safetensors")
    with pytest.raises(StorageError, match=rf"{there.name}.* cannot be written .EN"):
        drawn_by(tmp_path / "w.safetensors", tmp_path, **{what: there})
    monkeypatch.undo()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sample_script.media, "save_png", full)
    with pytest.raises(StorageError, match=r"x.png cannot be written .ENOSPC.*: make room, or use another --out"):
        drawn_by(tmp_path / "w.safetensors", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.safetensors"]


def test_prompts_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"prompts .*nothing.txt cannot be read \(No such file or directory\): give"):
        sample_script.sample.read_prompts(tmp_path / "nothing.txt")
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"prompts .*x.jpg cannot be read \(no text in UTF-8\): give a text file"):
        sample_script.sample.read_prompts(tmp_path / "x.jpg")
