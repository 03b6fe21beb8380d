"""Ablations: grids of runs as typed Python, run by subprocesses that may be killed, and what they come to."""

from odit.ablation.grid import Axis, Choice, Grid, Trial, trials, values, variants
from odit.ablation.shipped import GRIDS

__all__ = ["GRIDS", "Axis", "Choice", "Grid", "Trial", "trials", "values", "variants"]
