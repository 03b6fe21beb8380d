"""A feature network for clips out of a TorchScript file: the Frechet Video Distance of Unterthiner et al. 2018.

The field's file is ``i3d_torchscript.pt`` of StyleGAN-V (Skorokhodov et al. 2022), the I3D of Kinetics-400 that the
paper's own code takes from TensorFlow Hub. It is called as there: clips (B, 3, T, H, W) of floats in 0..255, with
``rescale=True, resize=True, return_features=True``, so that it brings them to 224 x 224 and [-1, 1] itself; it needs
ten frames or more. A file whose ``forward`` lacks these arguments gets the clips alone. Either returns (B, D).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odit.fidelity.inception import full_fp32

FETCH = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt (StyleGAN-V)"
FLAGS = ("rescale", "resize", "return_features")


def load(path: Path | None, device: torch.device) -> Any:
    """Loads a TorchScript module, whose code runs when it is called; raises ValueError for what is none."""
    if path is None or not path.is_file():
        found = "is not given" if path is None else f"{path} is no file"
        raise ValueError(f"i3d {found}: fetch i3d_torchscript.pt from {FETCH} and give its path by --i3d")
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"i3d {path} is no TorchScript file ({reason}): fetch it again from {FETCH}") from None


def features(net: Any, x_BTHWC: Tensor) -> Tensor:
    """Features (B, D) of clips uint8."""
    asked = {argument.name for argument in net.forward.schema.arguments}
    flags = dict.fromkeys(FLAGS, True) if asked.issuperset(FLAGS) else {}
    with torch.no_grad(), full_fp32():
        found = net(x_BTHWC.permute(0, 4, 1, 2, 3).float().contiguous(), **flags)
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(x_BTHWC):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"i3d's network makes {shape} of {len(x_BTHWC)} clips: it should make a row of features of each"
        )
    return found
