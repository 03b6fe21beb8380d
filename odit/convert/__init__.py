"""Foreign weight names as pure maps, both ways and bit for bit: facebookresearch/DiT's .pt files, diffusers' DiT and
diffusers' Latte.

A format is a list of ``Part``: which slice of which leaf a foreign tensor is. Export reads the list left to right,
import right to left; nothing else knows names, and nothing is computed but reshapes. Letters as in models/dit.py.

    params, cfg, shape = from_dit(read_pt("DiT-XL-2-256x256.pt"))
    params, cfg, shape = load_diffusers("DiT-XL-2-256")
    save_pipeline("my-dit", params, cfg, shape, diffusion.Config("eps"))
"""

from odit.convert.diffusers import from_diffusers, to_diffusers
from odit.convert.dit import check_objective, from_dit, to_dit
from odit.convert.files import class_names, load_diffusers, read_pt, save_diffusers, write_pt
from odit.convert.latte import from_diffusers_latte, to_diffusers_latte
from odit.convert.pipeline import check_pipeline, read_scheduler, save_pipeline

__all__ = [
    "check_objective",
    "check_pipeline",
    "class_names",
    "from_diffusers",
    "from_diffusers_latte",
    "from_dit",
    "load_diffusers",
    "read_pt",
    "read_scheduler",
    "save_diffusers",
    "save_pipeline",
    "to_diffusers",
    "to_diffusers_latte",
    "to_dit",
    "write_pt",
]
