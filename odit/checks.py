"""Start-up checks: every setting works or is refused in one sentence, before anything slow happens."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from odit import data, diffusion, fidelity, finetune, kernels, models, optim
from odit.config import Run, Sampling
from odit.data import latents
from odit.diffusion import solvers
from odit.diffusion.flow import Flow
from odit.encoders import config as encoders
from odit.models import config as model_config
from odit.models.config import Config, Shape, Size
from odit.parallel import sequence
from odit.parallel.mesh import check_mesh


def check(run: Run, shape: Shape | None = None, world: int = 1) -> None:
    """Refuses what cannot run on ``world`` ranks, before anything slow happens.

    Raises:
        ValueError: one sentence that names the key, what was found and what would be right.
    """
    _check_numbers(run)
    dp, sp = divide(run, world)
    _check_served(run, sp)
    _check_share(run, dp)
    _check_offload(run)
    if run.kernels == "fused" and (device := pick_device(run.device)).type != "cuda":
        check_kernels(run, device)
    data.check(run.data)
    diffusion.check(run.diffusion)
    optim.check(run.optimizer)
    _check_finetune(run)
    objective = diffusion.build(run.diffusion)
    encoders.check(run.encoders)
    _check_pairs(run, shape)
    if shape is None and (shape := expected_shape(run)) is not None:
        check_buckets(run, shape, data.bucket_sizes(run.data), world)
    _check_encoders(run, shape)
    if shape is not None:
        model_config.check(run.model, shape)
        _check_sequence(run, shape, sp, world)
        check_sampling(run.sampling, run.model, shape, objective)
    fidelity.check(run.evaluation)
    if run.evaluate and no_digits_held_out(run.data):
        raise ValueError(
            f"data.held_out is {run.data.held_out} but evaluate needs held-out digits for its judge: "
            "use --data.held-out 0.1666 or --no-evaluate"
        )


def no_digits_held_out(cfg: data.Config) -> bool:
    """Whether these are digits, and none is held out for a judge to be tried on."""
    return cfg.source in data.DIGITS and round(1797 * cfg.held_out) == 0  # as dataset.split rounds


def _check_numbers(run: Run) -> None:
    for name in ("steps", "global_batch", "log_every", "checkpoint_every", "sample_every", "validate_every", "keep"):
        if getattr(run, name) < 1:
            raise ValueError(f"{name} is {getattr(run, name)}: use 1 or more")
    if run.crashes < 0:
        raise ValueError(f"crashes is {run.crashes}: use 0 or more")
    if run.grad_norms and not run.data.held_out:
        raise ValueError("grad_norms is part of the validation, and data.held_out 0 leaves no data to it: use 0.1")
    if run.validation_draws < 1:
        raise ValueError(f"validation_draws is {run.validation_draws}: use 1 or more")
    if not 0 <= run.seed < 2**64:
        raise ValueError(f"seed is {run.seed}: use an integer in [0, 2**64)")
    if run.stop_at is not None and not 0 < run.stop_at <= run.steps:
        raise ValueError(
            f"stop_at {run.stop_at} lies outside the run's steps 1 to {run.steps}: use a step between them"
        )
    if run.threads is not None and run.threads < 1:
        raise ValueError(f"threads is {run.threads}: use 1 or more")


def _check_sequence(run: Run, shape: Shape, sp: int, world: int) -> None:
    p = run.parallel
    try:
        if run.grad_norms and sp > 1:
            raise ValueError(
                f"grad_norms needs whole samples on a rank, which parallel.sp {sp} does not leave: use --parallel.sp 1"
            )
        length = models.num_tokens(run.model, shape.size)
        frames = models.of(run.model).time_space(run.model, shape.size)
        sequence.check(p.sequence, sp, length, frames, p.ulysses, p.ring_fp8)
    except ValueError as error:
        if sp == 1 or p.sp is not None or p.dp is not None:
            raise
        nearest = max(1, round(run.global_batch / world)) * world
        told = str(error).split(": use")[0]
        raise ValueError(
            f"{told}; sp is {sp} because global_batch {run.global_batch} does not divide over {world} ranks: "
            f"use --global-batch {nearest}"
        ) from None


def check_buckets(run: Run, shape: Shape, sizes: dict[str, Size], world: int) -> None:
    """Refuses a bucket that the model or the sequence strategy cannot serve; raises ValueError, which names it.

    Args:
        sizes: what the model sees of a sample, by the bucket's name.
    """
    if not sizes:
        return
    sp = divide(run, world)[1]
    for name, size in sizes.items():
        one = dataclasses.replace(shape, size=size)
        try:
            model_config.check(run.model, one)
            _check_sequence(run, one, sp, world)
        except ValueError as error:
            raise ValueError(f"data.buckets has {name}, and {error}") from None
    if run.parallel.offload == "auto":
        raise ValueError(
            "parallel.offload auto places state by what the first steps hold, and steps of data.buckets differ: "
            "use --parallel.offload optimizer"
        )


def _check_share(run: Run, dp: int) -> None:
    """The global batch is cut into equal shares, and these into equal micro-batches."""
    if run.global_batch % dp:
        nearest = max(dp, round(run.global_batch / dp) * dp)
        raise ValueError(
            f"global_batch {run.global_batch} does not divide over parallel.dp {dp}: the nearest that does is {nearest}"
        )
    share, micro = run.global_batch // dp, run.micro_batch
    if micro is not None and (micro < 1 or share % micro):
        nearest = min((n for n in range(1, share + 1) if share % n == 0), key=lambda n: abs(n - micro))
        of = (
            f"global_batch {run.global_batch}"
            if dp == 1
            else f"the share of a rank, {run.global_batch} / {dp} = {share}"
        )
        raise ValueError(f"micro_batch {micro} does not divide {of}: the nearest that does is {nearest}")


def _check_finetune(run: Run) -> None:
    finetune.check(run.finetune, started=run.init_from is not None or run.resume is not None)
    if run.grad_norms and run.finetune.lora_rank:
        raise ValueError(
            f"grad_norms needs whole weights, and finetune.lora_rank {run.finetune.lora_rank} merges them block by "
            "block: leave grad_norms out"
        )


def _check_offload(run: Run) -> None:
    p = run.parallel
    if p.memory_gib is not None and p.offload != "auto":
        raise ValueError(
            f"parallel.memory_gib is {p.memory_gib} but parallel.offload is {p.offload}: use --parallel.offload auto, "
            "which places state by it, or leave it out"
        )
    if p.memory_gib is not None and not p.memory_gib > 0:
        raise ValueError(f"parallel.memory_gib is {p.memory_gib}: use a positive number")
    if p.offload != "none" and p.zero < 2:
        raise ValueError(
            f"parallel.offload {p.offload} takes gradients away block by block, which parallel.zero {p.zero} does not: "
            "use --parallel.zero 2 or 3 (on any number of ranks, one too)"
        )
    if p.offload == "auto" and pick_device(run.device).type != "cuda":
        raise ValueError(
            "parallel.offload auto places state by a GPU's memory and this run is on the CPU: leave it out"
        )


def _check_served(run: Run, sp: int) -> None:
    """Settings that this version knows but does not serve are refused, never ignored."""
    p = run.parallel
    if run.replay is not None:
        raise ValueError(
            f"replay {run.replay} takes the place of a run: use python experiments/train.py --replay alone"
        )
    if run.compile and p.remat == "selective" and sp > 1:
        raise ValueError(
            f"compile cannot follow parallel.remat selective across what passes between parallel.sp {sp} ranks: use "
            "--no-compile or --parallel.remat block"
        )
    if run.grad_norms and p.zero == 3:
        raise ValueError(
            "grad_norms needs whole weights, which parallel.zero 3 does not keep: use parallel.zero 2 or less"
        )


def divide(run: Run, world: int) -> tuple[int, int]:
    """(dp, sp) of ``world`` ranks.

    Unless told, tokens are shared by as few ranks as can be: sharing samples moves less. Raises ValueError.
    """
    p = run.parallel
    if p.sp is not None or p.dp is not None:
        return check_mesh(world, p.dp, p.sp if p.sp is not None else max(1, world // max(1, p.dp)), p.cfg)
    degrees = [sp for sp in range(1, world + 1) if world % sp == 0 and run.global_batch % (world // sp) == 0]
    paired = [sp for sp in degrees if world // sp % p.cfg == 0]
    return check_mesh(world, None, (paired or degrees)[0], p.cfg)


def axes(run: Run, world: int) -> dict[str, int]:
    """The sizes that ``make_mesh`` wants for a run on ``world`` ranks."""
    dp, sp = divide(run, world)
    p = run.parallel
    ulysses = sequence.inner_degree(p.sequence, sp, run.model.heads, p.ulysses)
    return {"dp": dp, "sp": sp, "ulysses": ulysses, "cfg": p.cfg}


def check_sampling(sampling: Sampling, model: Config, shape: Shape, objective: Any) -> None:
    """Refuses solver settings that do not fit the objective or the model."""
    solvers.check_solver(objective, solver_of(sampling, objective), sampling.steps)
    g = sampling.guidance
    if not 0 <= g.scale < float("inf"):
        raise ValueError(f"sampling.guidance.scale is {g.scale}: use a number >= 0; 1 is no guidance")
    if not 0 <= g.interval[0] < g.interval[1] <= 1:
        raise ValueError(f"sampling.guidance.interval is {g.interval}: use two rising numbers in [0, 1]")
    if g.channels is not None and not 1 <= g.channels <= shape.channels:
        raise ValueError(
            f"sampling.guidance.channels is {g.channels} but pictures have {shape.channels}: "
            f"use 1 to {shape.channels}, or leave it out for all"
        )
    if shape.conditional and not model.label_dropout and g.scale != 1:
        what = "null label" if shape.num_classes else "empty caption"
        raise ValueError(
            f"sampling.guidance.scale is {g.scale} but model.label_dropout 0.0 trains no {what}: "
            "use --model.label-dropout 0.1 or a scale of 1"
        )
    if sampling.clip is not None and isinstance(objective, Flow):
        raise ValueError(f"sampling.clip is {sampling.clip}, which a flow's solvers do not have: leave it out")
    if sampling.clip is not None and not sampling.clip > 0:
        raise ValueError(f"sampling.clip is {sampling.clip}: use a positive number, or leave it out")


def _check_pairs(run: Run, shape: Shape | None) -> None:
    """Refuses guidance on two ranks where there is none; without a shape, classes are not known yet."""
    p, scale = run.parallel, run.sampling.guidance.scale
    if p.cfg == 1:
        return
    if shape is not None and not shape.conditional:
        raise ValueError(
            f"parallel.cfg is {p.cfg} but the data has 0 classes and no captions, so that nothing is guided: "
            "use parallel.cfg 1"
        )
    if scale == 1:
        raise ValueError(
            f"parallel.cfg is {p.cfg} but sampling.guidance.scale 1.0 has no null pass for a second rank: "
            "use parallel.cfg 1, or another scale, such as 4"
        )


def check_budget(run: Run, device: torch.device) -> None:
    gib = run.parallel.memory_gib
    if gib is not None and gib * 2**30 > (total := torch.cuda.mem_get_info(device)[1]):
        raise ValueError(
            f"parallel.memory_gib is {gib} but this GPU has {total / 2**30:.1f} GiB: use less, or leave it out for "
            f"{0.95 * total / 2**30:.1f}"
        )


def check_kernels(run: Run, device: torch.device) -> None:
    """Refuses fused kernels where they cannot run; on a GPU one of them runs to find out."""
    if run.kernels == "fused" and (why := kernels.obstacle(device)):
        raise ValueError(f"kernels is fused, which cannot run here ({why}): use --kernels auto or reference")


def solver_of(sampling: Sampling, objective: Any) -> str:
    """The solver chosen, or the default for the objective."""
    return sampling.solver or ("heun" if isinstance(objective, Flow) else "ddim")


def pick_device(name: str) -> torch.device:
    """The device of that name; 'auto' is a GPU where there is one. Raises ValueError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not name.startswith("cuda"):
        raise ValueError(f"device is {name!r}: use auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r} but PyTorch {torch.__version__} sees no GPU: use --device cpu or auto")
    return torch.device(name)


def expected_shape(run: Run) -> Shape | None:
    """The shape as far as the config tells it, or a cache's index; a folder's classes are not known yet.

    None where an encoder decides. Raises DataError for a cache that cannot be read.
    """
    cfg, outputs = run.data, 2 if run.diffusion.learned_variance else 1
    if cfg.source == "latents":
        assert cfg.path is not None  # data.check saw to it
        index = latents.read_index(cfg.path)
        channels, *size = index["sample"]
        return Shape(channels, tuple(size), index["num_classes"], outputs, *latents.text_size(index))
    if run.encoders.vae != "none":
        return None
    channels, size, num_classes = data.expected(cfg)
    return Shape(channels, size, num_classes, outputs, run.encoders.text_length if data.has_captions(cfg) else 0)


def _check_encoders(run: Run, shape: Shape | None) -> None:
    """Encoders that nothing would use are refused."""
    cached = run.data.source == "latents"  # the data need not be there any more when its model draws
    captions = shape is not None and shape.text_length > 0 if cached else data.has_captions(run.data)
    if run.encoders.text != "bytes" and not captions:
        raise ValueError(
            f"encoders.text is {run.encoders.text} but data.source {run.data.source} has no captions: leave it out"
        )
    for name in ("encoders.text_length", "model.text", "model.text_depth"):
        part, _, key = name.partition(".")
        value, usual = getattr(getattr(run, part), key), getattr(type(getattr(run, part)), key)
        if value != usual and not captions:
            raise ValueError(f"{name} is {value} but data.source {run.data.source} has no captions: use {usual}")
    if run.encoders.vae != "none" and not cached and data.expected(run.data)[0] != 3:
        raise ValueError(
            f"encoders.vae {run.encoders.vae} reads pictures of 3 channels and data.source {run.data.source} has "
            f"{data.expected(run.data)[0]}: leave it out"
        )
