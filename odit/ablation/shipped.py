"""The grids that come with odit, by name. All are of digits and run on two CPU cores."""

from __future__ import annotations

from odit.ablation.grid import Grid, values, variants

SMALL = {"model.width": 64, "model.depth": 3, "steps": 400, "log_every": 20}
QUIET = {"checkpoint_every": 100, "keep": 1, "threads": 1}  # one thread: a sum's bits depend on how many share it
# digits' own settings of a flow, which a Gaussian process has no use for
GAUSSIAN = {"diffusion.times": None, "diffusion.time_scale": None}

OBJECTIVES = variants(
    "objective",
    {
        "flow": {},
        "eps": {"diffusion.objective": "eps", **GAUSSIAN},
        "v": {"diffusion.objective": "v", **GAUSSIAN},
    },
)

GRIDS: dict[str, Grid] = {
    "samplers": Grid(
        "Objective, sampler and its steps.",
        axes=(
            OBJECTIVES,
            values("sampling.solver", "euler", "heun", "ddim", "dpm++", name="sampler"),
            values("sampling.steps", 5, 10, 25),
        ),
        metrics=("class_accuracy", "frechet", "nearest"),
        settings={**SMALL, **QUIET, "steps": 800},
        judged=500,
    ),
    "guidance": Grid(
        "The scale of classifier-free guidance, by objective.",
        axes=(OBJECTIVES, values("sampling.guidance.scale", 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, name="guidance scale")),
        metrics=("class_accuracy", "frechet", "nearest"),
        settings={**SMALL, **QUIET, "steps": 800, "sampling.solver": None, "sampling.steps": 20},
        judged=500,
    ),
    "ema": Grid(
        "The decay of the averaged weights, with and without its warm-up.",
        axes=(
            values("optimizer.ema_warmup", True, False, name="warm-up"),
            values("optimizer.ema_decay", 0.0, 0.9, 0.98, 0.99, 0.995, 0.999, name="EMA decay"),
        ),
        metrics=("class_accuracy", "frechet", "validation_loss"),
        # a learning rate that falls to 0 averages by itself: this one stays
        settings={**SMALL, **QUIET, "optimizer.decay": "none", "optimizer.lr": 2e-3},
        judged=500,
    ),
    "kernels": Grid(
        "Kernels, compilation and precision: the losses lie on each other, the speeds do not.",
        axes=(
            values("precision", "fp32", "bf16", "fp16"),
            values("compile", False, True),
            values("kernels", "reference", "fused"),
        ),
        metrics=("loss", "loss_gap", "validation_loss", "samples_per_s"),
        settings={**SMALL, **QUIET, "steps": 200, "log_every": 5},
        curves=True,
    ),
    "parallel": Grid(
        "Sequence strategy and ZeRO stage on four ranks: the losses lie on each other, the speeds do not.",
        axes=(
            variants(
                "strategy",
                {
                    "none": {"parallel.sp": 1},
                    **{
                        name: {"parallel.sp": 2, "parallel.sequence": name}
                        for name in ("fastseq", "ulysses", "ring", "megatron")
                    },
                },
            ),
            values("parallel.zero", 0, 1, 2, 3, name="ZeRO stage"),
        ),
        metrics=("loss", "loss_gap", "samples_per_s"),
        settings={**SMALL, **QUIET, "steps": 40, "log_every": 2, "device": "cpu"},
        ranks=4,
        curves=True,
    ),
}
