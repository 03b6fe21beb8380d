"""What a run is: typed settings, and the shipped presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from odit import data, diffusion, fidelity, finetune, optim
from odit.encoders import config as encoders
from odit.models import config as models

Sequence = Literal["auto", "none", "fastseq", "ulysses", "ring", "usp", "megatron", "dsp"]


@dataclass(frozen=True)
class Parallel:
    """Where the numbers live; nothing here changes what they are."""

    dp: int | None = None
    """Ranks that share a batch; the default is what the ranks leave."""
    sp: int | None = None
    """Ranks that share a sample's tokens; the default is the fewest that leave a dp which divides the global batch."""
    zero: Literal[0, 1, 2, 3] = 0
    """What is split over ranks: 1 optimizer and EMA, 2 and gradients, 3 and parameters."""
    sequence: Sequence = "auto"
    """How ranks share a sample's tokens."""
    ulysses: int | None = None
    """Inner degree of usp: ranks that swap tokens for heads; the ring is the rest of sp. None is the most that fits."""
    ring_fp8: bool = False
    """fastseq's ring carries fp8 with a scale a token (forward pass only); off, it carries what is computed in."""
    cfg: Literal[1, 2] = 1
    """2 draws pictures with the halves of a guidance pair on two neighbours along dp."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which gradients are summed over ranks."""
    remat: Literal["none", "block", "selective"] = "none"
    """Activations computed again in backward instead of kept: block keeps a block's input alone, selective also what
    attention gives and the products with weights."""
    offload: Literal["none", "optimizer", "auto"] = "none"
    """State kept in host memory."""
    memory_gib: float | None = None
    """Device memory that offload auto stays under."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022) of the samples a run shows and judges."""

    scale: float = 4.0
    """uncond + scale * (cond - uncond); 1 is no guidance."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Noise levels between which it acts; 0 is data, 1 noise (Kynkaanniemi et al. 2024)."""
    channels: int | None = None
    """Leading channels that are guided; 3 is what DiT's published numbers used, None is all."""


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn."""

    solver: Literal["ddpm", "ddim", "dpm++", "euler", "heun", "sde"] | None = None
    """None takes heun for flow and ddim otherwise."""
    steps: int = 50
    """Solver steps."""
    guidance: Guidance = field(default_factory=Guidance)
    clip: float | None = None
    """Clamps predicted clean pictures to [-clip, clip] (ddpm, ddim, dpm++)."""
    graphs: bool = True
    """Runs a model call as one CUDA graph where that is possible; pictures stay the same."""


@dataclass(frozen=True)
class Run:
    """One training run; its meaning is (config, seed, data)."""

    out: Path = Path("runs/run")
    """Folder the run writes."""
    seed: int = 0
    """Seed of every draw."""
    steps: int = 2000
    """Length of the run; schedules follow it."""
    stop_at: int | None = None
    """Ends early, with a checkpoint, after this step."""
    global_batch: int = 96
    """Samples a step, over all ranks."""
    micro_batch: int | None = None
    """Samples a forward pass and rank; None takes the whole share at once. Results do not depend on it."""
    resume: str | None = None
    """'latest', or the path of a checkpoint."""
    init_from: Path | None = None
    """Weights to start from instead of a fresh draw: a checkpoint or weights file, a .pt of facebookresearch/DiT, or a
    folder of diffusers; live and EMA weights both start there."""
    replay: Path | None = None
    """Folder of a bad step to execute again, out/crashes/step_*, on one device; takes the place of the preset and of
    every other setting but --device, --precision and --kernels."""
    crashes: int = 3
    """Bad steps (a loss or gradient that is not finite) that out/crashes keeps for --replay, the first ones."""
    log_every: int = 10
    """Steps between lines of metrics."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always has one."""
    checkpoint_async: bool = True
    """Writes checkpoints beside training, from a copy of the state in host memory; else training waits for them."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    sample_every: int = 1000
    """Steps between sample grids from the EMA weights."""
    validate_every: int = 500
    """Steps between validation losses on held-out data."""
    validation_draws: int = 4
    """Times and noises drawn for each held-out sample."""
    grad_norms: bool = False
    """Adds gradient norms a sample, by bin of t, to the validation (slow: one backward a sample)."""
    evaluate: bool = True
    """Judges 1,000 samples at the end, where the data has a judge (digits)."""
    progress: bool = True
    """Progress bars."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype of matrix products; masters, moments and EMA are fp32 always."""
    kernels: Literal["auto", "reference", "fused"] = "auto"
    """Plain PyTorch, or fused kernels."""
    deterministic: bool | None = None
    """Whether fused attention on a GPU must give the same bits each time in backward; None prefers that where one does,
    and the start tells; off takes the fastest (1.2 times as fast for 4,096 tokens)."""
    compile: bool = False
    """Compiles the blocks."""
    graphs: bool = True
    """Runs forward and backward of a micro-batch as one CUDA graph where that is possible; numbers stay the same."""
    device: str = "auto"
    """'auto' takes a GPU where there is one."""
    threads: int | None = None
    """CPU threads; None leaves PyTorch's choice."""

    data: data.Config = field(default_factory=data.Config)
    encoders: encoders.Config = field(default_factory=encoders.Config)
    model: models.Config = field(default_factory=models.Config)
    diffusion: diffusion.Config = field(default_factory=diffusion.Config)
    optimizer: optim.Config = field(default_factory=optim.Config)
    finetune: finetune.Config = field(default_factory=finetune.Config)
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: fidelity.Config = field(default_factory=fidelity.Config)
    parallel: Parallel = field(default_factory=Parallel)


def _digits() -> Run:
    return Run(
        out=Path("runs/digits"),
        steps=1000,
        checkpoint_every=500,
        sample_every=250,
        validate_every=250,
        data=data.Config(source="digits", held_out=1 / 6),
        model=models.Config(width=96, depth=4, heads=4, patch=2),
        diffusion=diffusion.Config(objective="flow", times="logit-normal", time_scale=1000.0),
        optimizer=optim.Config(lr=4e-3, beta2=0.99, warmup=50, decay="cosine", clip=1.0, ema_decay=0.995),
        sampling=Sampling(solver="heun", steps=10, guidance=Guidance(scale=1.5)),
    )


def _digits_text() -> Run:
    """Digits by captions, which a small encoder reads byte by byte."""
    return dataclasses.replace(
        _digits(),
        out=Path("runs/digits-text"),
        data=data.Config(source="digits-text", held_out=1 / 6),
        encoders=encoders.Config(text_length=32),
        model=models.Config(width=96, depth=4, heads=4, patch=2, text_depth=0),
        optimizer=optim.Config(lr=2e-3, beta2=0.99, warmup=50, decay="cosine", clip=1.0, ema_decay=0.995),
    )


def _moving_digits() -> Run:
    """Clips of a digit that moves as the caption says. A width below the 256 values of a patch would lose its shape."""
    return dataclasses.replace(
        _digits(),
        out=Path("runs/moving-digits"),
        steps=1000,
        global_batch=64,
        validate_every=500,
        validation_draws=1,
        sample_every=500,
        data=data.Config(source="moving-digits", held_out=1 / 6),
        encoders=encoders.Config(text_length=64),
        model=models.Config(width=256, depth=4, heads=4, patch=4, frame_patch=16, text="pooled", text_depth=0),
        diffusion=diffusion.Config(
            objective="flow", predicts="data", times="logit-normal", time_scale=1000.0, shift=4.0
        ),
        optimizer=optim.Config(lr=2e-3, beta2=0.99, warmup=50, decay="cosine", clip=1.0, ema_decay=0.995),
    )


def _folder() -> Run:
    return Run(
        out=Path("runs/folder"),
        steps=50_000,
        global_batch=64,
        log_every=20,
        checkpoint_every=5000,
        sample_every=2500,
        validate_every=2500,
        validation_draws=1,
        data=data.Config(source="folder", image_size=32, flip=True, held_out=0.05, workers=2),
        model=models.Config(width=384, depth=12, heads=6, patch=2),
        diffusion=diffusion.Config(objective="flow", time_scale=1000.0),
        optimizer=optim.Config(lr=2e-4, warmup=1000, clip=1.0, ema_decay=0.9995),
    )


def _published(size: str, patch: int) -> Run:
    return Run(
        out=Path(f"runs/dit-{size}-{patch}"),
        steps=400_000,
        global_batch=256,
        log_every=100,
        checkpoint_every=10_000,
        sample_every=10_000,
        validate_every=10_000,
        validation_draws=1,
        data=data.Config(source="synthetic", image_size=32, channels=4, num_classes=1000, held_out=0.0),
        model=models.sized(size, patch),
        diffusion=diffusion.Config(objective="eps", variance="learned"),
        optimizer=optim.Config(lr=1e-4, ema_decay=0.9999, ema_warmup=False),
        sampling=Sampling(solver="ddpm", steps=250, guidance=Guidance(scale=4.0, channels=3)),
    )


def _captions() -> Run:
    """A table of pictures and captions, in pixels unless an autoencoder is given."""
    return dataclasses.replace(
        _folder(),
        out=Path("runs/captions"),
        data=data.Config(source="table", image_size=32, held_out=0.05, workers=2),
    )


def _latents() -> Run:
    """What was encoded before, captions or classes."""
    return dataclasses.replace(
        _folder(),
        out=Path("runs/latents"),
        data=data.Config(source="latents", held_out=0.05, workers=2),
    )


def _clips() -> Run:
    """A table of clips and captions."""
    return dataclasses.replace(
        _captions(),
        out=Path("runs/clips"),
        global_batch=16,
        data=data.Config(source="table", image_size=32, frames=16, interval=3, held_out=0.05, workers=2),
        model=models.Config(arch="latte", width=384, depth=12, heads=6, patch=2),
        diffusion=diffusion.Config(objective="flow", times="logit-normal", time_scale=1000.0, shift=3.0),
    )


def _video(arch: Literal["dit", "latte"], size: str, frame_patch: int) -> Run:
    """OpenDiT's video models on synthetic latents of 16 frames of 256 x 256 pixels."""
    name = "latte" if arch == "latte" else "vdit"
    published = _published(size, 2)
    return dataclasses.replace(
        published,
        out=Path(f"runs/{name}-{size}-{frame_patch}x2x2"),
        global_batch=64,
        data=dataclasses.replace(published.data, frames=16, num_classes=101),
        model=models.sized(size, 2, arch=arch, frame_patch=frame_patch),
    )


def _three_billion() -> Run:
    """Larger than any DiT of the paper: heads of 72 as DiT-XL, state on the host, blocks recomputed in backward."""
    return dataclasses.replace(
        _published("xl", 2),
        out=Path("runs/dit-3b-2"),
        global_batch=32,
        precision="bf16",
        checkpoint_async=False,  # a second copy of its state is 48 GB of host memory
        model=models.Config(width=2304, depth=32, heads=32, patch=2),
        optimizer=optim.Config(lr=1e-4, clip=1.0, ema_decay=0.9999, ema_warmup=False),
        parallel=Parallel(zero=3, remat="block", offload="optimizer"),
    )


def presets() -> dict[str, tuple[str, Run]]:
    """Name -> (description, run)."""
    sizes = {
        f"dit-{s}-{p}": (f"DiT-{s.upper()}/{p} as published, on synthetic latents or your folder.", _published(s, p))
        for s in models.SIZES
        for p in (2, 4, 8)
    }
    videos = {
        f"{name}-{s}-{t}x2x2": (
            f"{title}-{s.upper()}/{t}x2x2 on synthetic latents of 16 frames, or your clips.",
            _video("latte" if name == "latte" else "dit", s, t),
        )
        for name, title in (("vdit", "Video DiT"), ("latte", "Latte"))
        for s in models.SIZES
        for t in (1, 2)
    }
    return {
        "digits": ("1,797 real handwritten digits, 8x8, minutes on a CPU.", _digits()),
        "digits-text": ("The same digits by captions, a text encoder trained along.", _digits_text()),
        "moving-digits": ("Clips of digits that move as a caption says, minutes on a CPU.", _moving_digits()),
        "folder": ("Your folder of pictures (one sub-folder a class, or flat).", _folder()),
        "captions": ("Your pictures with captions (CSV, JSONL, parquet, Hugging Face data sets).", _captions()),
        "clips": ("Your clips with captions, by Latte.", _clips()),
        "latents": ("What experiments/encode.py made of your pictures or clips.", _latents()),
        **sizes,
        **videos,
        "dit-3b-2": ("A DiT of 3 billion parameters that trains on one GPU of 24 GiB.", _three_billion()),
    }
