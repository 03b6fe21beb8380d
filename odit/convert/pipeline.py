"""diffusers' DiTPipeline and LattePipeline: the folder around a transformer, and what its scheduler tells."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from odit import diffusion
from odit.convert import diffusers, latte
from odit.convert.files import INDEX, read_json, save_diffusers
from odit.convert.parts import INSTEAD
from odit.models.config import Config, Shape
from odit.storage import whole

SCHEDULER = Path("scheduler") / "scheduler_config.json"
CLASSES = {"dit": ("DiTPipeline", "DiTTransformer2DModel"), "latte": ("LattePipeline", "LatteTransformer3DModel")}
PREDICTS: dict[Any, str] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
CLIPPING = ("DDIMScheduler", "DDPMScheduler")  # that bound x_0 unless told
GAUSSIAN = (
    *CLIPPING,
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
DEFAULTS = {  # DDIMScheduler.__init__, diffusers 0.42; the other ones have the same, but for clip_sample
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "rescale_betas_zero_snr": False,
}


def check_pipeline(cfg: Config, shape: Shape, objective: diffusion.Config, allow_other_timesteps: bool = False) -> None:
    """Raises ValueError for what neither diffusers' transformers nor their pipelines can hold."""
    refuse = latte.refuse if cfg.arch == "latte" else diffusers.refuse
    refuse(cfg, shape, allow_other_timesteps)
    to_scheduler(objective)
    if cfg.arch == "latte" and shape.outputs == 1:
        raise ValueError(
            f"diffusion.variance is {objective.variance} and LattePipeline drops the second half of the transformer's "
            f"channels, where a learned one is: {INSTEAD}"
        )


def to_scheduler(cfg: diffusion.Config) -> dict[str, Any]:
    """Makes the scheduler_config.json of the DDIMScheduler whose process an objective is.

    Its n steps are at multiples of T // n, as those of the published DiTs; odit's go from T - 1 to 0, so that the two
    agree where n is T.

    Raises:
        ValueError: a flow, which no scheduler of these pipelines solves.
    """
    if cfg.objective == "flow":
        raise ValueError(
            "diffusion.objective is flow and diffusers' DiTPipeline and LattePipeline step through a Gaussian process "
            f"(eps, x0, v): {INSTEAD}"
        )
    steps = cfg.train_steps or 1000
    told = {"_class_name": "DDIMScheduler", **DEFAULTS, "num_train_timesteps": steps, "clip_sample": False}
    told |= {"prediction_type": PREDICTS[cfg.objective], "set_alpha_to_one": True, "steps_offset": 0}
    if cfg.betas == "cosine":
        return told | {"beta_schedule": "squaredcos_cap_v2"}
    return told | dict(zip(("beta_start", "beta_end"), _ends(steps)))


def read_scheduler(folder: str | Path, shape: Shape) -> tuple[diffusion.Config, float | None]:
    """Reads from a pipeline's folder what its model predicts on which process, and the bound on x_0 or None.

    A transformer's folder alone tells neither; it is taken for what the published ones are, eps on linear betas.

    Raises:
        ValueError: a process that odit does not have.
    """
    file = Path(folder) / SCHEDULER
    variance = "learned" if shape.outputs == 2 else "fixed-large"
    if not file.is_file():
        return diffusion.Config("eps", variance=variance), None
    told = read_json(file)
    if (kind := told.get("_class_name", CLIPPING[0])) not in GAUSSIAN:
        raise ValueError(f"{file} is of a {kind}: give the folder of the transformer alone, which is taken for eps")
    config: dict[str, Any] = DEFAULTS | {"clip_sample": kind in CLIPPING} | told
    predicts = {theirs: mine for mine, theirs in PREDICTS.items()}
    schedules = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
    for key, known in (("prediction_type", predicts), ("beta_schedule", schedules)):
        if not isinstance(config[key], str) or config[key] not in known:
            raise ValueError(f"{file} has {key} {config[key]!r}: only {', '.join(known)} can be read")
    for key in ("trained_betas", "thresholding", "rescale_betas_zero_snr"):
        if config[key]:
            raise ValueError(f"{file} has {key}, which odit does not have: give the folder of the transformer alone")
    steps, betas = config["num_train_timesteps"], schedules[config["beta_schedule"]]
    if type(steps) is not int or not 2 <= steps <= 100_000:
        raise ValueError(f"{file} has num_train_timesteps {steps!r}: it must be an integer, such as 1000")
    plain = {"betas": None if betas == "linear" else betas, "train_steps": None if steps == 1000 else steps}
    found = diffusion.Config(predicts[config["prediction_type"]], variance=variance, **plain)
    diffusion.check(found)
    for key, mine in zip(("beta_start", "beta_end"), _ends(steps)):
        value = config[key]
        if betas == "linear" and not (isinstance(value, float) and math.isclose(value, mine, rel_tol=1e-6)):
            raise ValueError(f"{file} has {key} {value!r} and odit's linear betas of {steps} steps have {mine:.6g}")
    clip = float(config["clip_sample_range"]) if config["clip_sample"] else None
    return found, clip


def _ends(steps: int) -> tuple[float, float]:
    """First and last beta of ``gaussian.linear_betas``."""
    return 1e-4 * (1000 / steps), 0.02 * (1000 / steps)


def save_pipeline(
    folder: str | Path,
    params: dict,
    cfg: Config,
    shape: Shape,
    objective: diffusion.Config,
    names: list[str] | None = None,
    allow_other_timesteps: bool = False,
) -> None:
    """Writes the folder that ``from_pretrained`` of DiTPipeline or LattePipeline opens, but for encoders.

    An autoencoder goes to its ``vae/``, or is given on opening; a Latte's tokenizer and text encoder are given then.

    Args:
        names: of the classes (id2label); their numbers unless given.
    Raises:
        ValueError: what the pipeline cannot hold.
    """
    check_pipeline(cfg, shape, objective, allow_other_timesteps)
    folder, (pipeline, transformer) = Path(folder), CLASSES[cfg.arch]
    index: dict[str, Any] = {"_class_name": pipeline}
    if cfg.arch == "dit":
        names = names or [str(n) for n in range(shape.num_classes)]
        index["id2label"] = {str(n): name for n, name in enumerate(names)}
        params, shape = diffusers.pad_labels(params, shape)
    else:
        index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    index |= {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", transformer],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    save_diffusers(folder / "transformer", params, cfg, shape, allow_other_timesteps)
    (folder / SCHEDULER).parent.mkdir(exist_ok=True)
    for file, value in ((folder / SCHEDULER, to_scheduler(objective)), (folder / INDEX, index)):
        text = json.dumps(value, indent=2) + "\n"
        with whole(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
