"""Pictures and clips to latents and back: diffusers' autoencoders, frozen.

Letters: B samples, C latent channels, T frames, H W. A latent's path: ``moments`` of a sample; ``sample`` with noise in
hand; ``scaled``, which is what a diffusion model sees; ``decode``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from odit.encoders import frozen
from odit.encoders.frozen import Frozen

Kind = Literal["kl", "cogvideox", "wan"]
SETTING = "encoders.vae_path"
CLASSES = {"kl": "AutoencoderKL", "cogvideox": "AutoencoderKLCogVideoX", "wan": "AutoencoderKLWan"}
WAN_FRAMES = 4  # AutoencoderKLWan encodes the first frame, then four at a time, and drops what is left


@dataclass(frozen=True)
class Vae:
    """An autoencoder without its weights."""

    kind: Kind
    frozen: Frozen
    dtype: torch.dtype
    """Of the weights; what comes in is cast to it."""
    inputs: int
    """Channels of a picture."""
    channels: int
    """C."""
    factor: int
    """Pixels a latent pixel, along H and along W."""
    frame_factor: int
    """Frames a latent frame, after the first; 1 where every frame is a picture of its own."""
    frame_step: int
    """Clips have 1 + k * frame_step frames; more than frame_factor where the module works on groups of them."""
    shift: Tensor
    """(1,) or (C,) fp32."""
    scale: Tensor
    """(1,) or (C,) fp32."""
    chunk: int
    """Pictures or frames that "kl" takes at a time."""
    fingerprint: str
    """Of the weights, shift and scale."""

    def moments(self, weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes x (B, 3, H, W) or (B, 3, T, H, W) in [-1, 1]: mean and logvar of the latent's normal distribution.

        Raises:
            ValueError: sizes as in ``latent_shape``.
        """
        self.latent_shape(x.shape[1:])

        def encode(part: Tensor) -> Tensor:
            return self.frozen(weights, "encode", part, return_dict=False)[0].parameters

        mean, logvar = self._in_its_shape(encode, x.to(self.dtype)).chunk(2, 1)
        return mean, logvar.clamp(-30.0, 20.0)

    def scaled(self, sample: Tensor) -> Tensor:
        """Brings a sample (B, C, ...) to about unit variance: (sample - shift) * scale."""
        return (sample - _along(self.shift, sample)) * _along(self.scale, sample)

    def decode(self, weights: dict[str, Tensor], z: Tensor) -> Tensor:
        """Decodes scaled latents (B, C, h, w) or (B, C, t, h, w) to pictures or clips, about in [-1, 1]."""

        def decode(part: Tensor) -> Tensor:
            return self.frozen(weights, "decode", part, return_dict=False)[0]

        return self._in_its_shape(decode, (z / _along(self.scale, z) + _along(self.shift, z)).to(self.dtype))

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Maps (3, H, W) to (C, h, w) and (3, T, H, W) to (C, t, h, w).

        Raises:
            ValueError: a size that the autoencoder would not give back, with the nearest that it would.
        """
        channels, *frames, height, width = shape
        if channels != self.inputs or len(frames) > 1:
            raise ValueError(f"a sample of shape {tuple(shape)} against the VAE's: use ({self.inputs}, [frames,] H, W)")
        for name, pixels in (("height", height), ("width", width)):
            if pixels % self.factor or not pixels:
                near = _nearest(pixels, self.factor, self.factor)
                raise ValueError(f"{name} {pixels} is no multiple of the VAE's factor {self.factor}: use {near}")
        for num in frames:
            if num < 1 or (num - 1) % self.frame_step:
                near = _nearest(num, self.frame_step, 1)
                raise ValueError(f"{num} frames against the VAE's 1 + k * {self.frame_step}: use {near}")
        frames = [1 + (num - 1) // self.frame_factor for num in frames]
        return (self.channels, *frames, height // self.factor, width // self.factor)

    def pixel_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """([T,] H, W) of what is decoded of latents of ``size``, the reverse of ``latent_shape``."""
        *frames, height, width = size
        return (*(1 + (num - 1) * self.frame_factor for num in frames), height * self.factor, width * self.factor)

    def _in_its_shape(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Runs the module on what it takes: chunks of pictures for "kl", single clips (a picture has one frame) for
        others, whose memory is that of all frames at once."""
        if self.kind != "kl":
            clips = x if x.ndim == 5 else x.unsqueeze(2)
            y = torch.cat([run(clip) for clip in clips.split(1)])
            return y if x.ndim == 5 else y.squeeze(2)
        pictures = x if x.ndim == 4 else x.transpose(1, 2).flatten(0, 1)
        y = torch.cat([run(part) for part in pictures.split(self.chunk)])
        return y if x.ndim == 4 else y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def sample(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Draws from the latent's distribution: mean + exp(logvar / 2) * noise, logvar cut to [-30, 20] as in diffusers."""
    return mean + torch.exp(0.5 * torch.clamp(logvar, -30.0, 20.0)) * noise


def _along(table: Tensor, x: Tensor) -> Tensor:
    """A value a channel, or one, against x (B, C, ...); fp32, so that what comes of it is at least that."""
    return table.to(x.device).reshape(-1, *[1] * (x.ndim - 2))


def _nearest(number: int, step: int, first: int) -> str:
    """The members of first, first + step, ... about a number that is none."""
    below = first + (number - first) // step * step
    return f"{first}" if below < first else f"{below} or {below + step}"


def load(kind: Kind, path: Path | str, dtype: torch.dtype = torch.float32, chunk: int = 8) -> Vae:
    """Loads an autoencoder.

    Args:
        path: its folder, one with a ``vae/`` in it, or the hub name of such.
        chunk: pictures, or frames of clips, that "kl" takes at a time; bounds its memory.
    Raises:
        ValueError: what is no such model or lacks a part, naming ``encoders.vae_path``.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"encoders.vae is {kind!r}: use one of {', '.join(get_args(Kind))}")
    if chunk < 1:
        raise ValueError(f"encoders.vae_chunk is {chunk}: use 1 or more")
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(f"encoders.vae {kind} needs diffusers: pip install 'odit[hub]'") from error
    source = frozen.find(path, "vae", SETTING)
    found = source.config.get("_class_name")
    if found != CLASSES[kind]:
        what = found or "no autoencoder of diffusers"
        raise ValueError(f"{SETTING} {source.path!r} holds {what} but encoders.vae is {kind}: give an {CLASSES[kind]}")
    cls = getattr(diffusers, CLASSES[kind])
    module = frozen.load_module(cls, source, SETTING, torch_dtype=dtype, low_cpu_mem_usage=False)
    return _describe(kind, module, dtype, chunk)


def _describe(kind: Kind, module: Any, dtype: torch.dtype, chunk: int) -> Vae:
    """Reads sizes and scales off a module's config."""
    config, pure = module.config, Frozen(module)
    channels = config.z_dim if kind == "wan" else config.latent_channels
    inputs = config.in_channels // ((config.patch_size or 1) ** 2 if kind == "wan" else 1)
    factor, frame_factor, frame_step = _factors(kind, config)
    shift, scale = _shift_and_scale(config, channels)
    return Vae(
        kind=kind,
        frozen=pure,
        dtype=dtype,
        inputs=inputs,
        channels=channels,
        factor=factor,
        frame_factor=frame_factor,
        frame_step=frame_step,
        shift=shift,
        scale=scale,
        chunk=chunk,
        fingerprint=frozen.digest(kind, pure.fingerprint, frozen.fingerprint({"shift": shift, "scale": scale})),
    )


def _factors(kind: Kind, config: Any) -> tuple[int, int, int]:
    """Reads factor, frame_factor and frame_step; levels are halved but the last.

    CogVideoX decodes latent frames by pairs, an odd one joining the first pair: of an even number it would make
    frame_factor frames too many less one. So clips have an odd number of latent frames.
    """
    if kind == "wan":
        frames = 2 ** sum(config.temperal_downsample)
        return 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1), frames, WAN_FRAMES
    factor = 2 ** (len(config.block_out_channels) - 1)
    if kind == "kl":
        return factor, 1, 1
    frames = int(config.temporal_compression_ratio)
    return factor, frames, 2 * frames


def _shift_and_scale(config: Any, channels: int) -> tuple[Tensor, Tensor]:
    """Reads shift and scale, fp32: one number for all channels (scaling_factor, shift_factor), or one each.

    With latents_mean and latents_std, (sample - mean) * scaling_factor / std. CogVideoX's invert_scale_latents is about
    pictures that condition a clip, not about the clip.
    """
    factor = getattr(config, "scaling_factor", None)
    factor = 1.0 if factor is None else factor
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        return torch.tensor([getattr(config, "shift_factor", None) or 0.0]), torch.tensor([factor])
    if not len(mean) == len(std) == channels:
        raise ValueError(
            f"{SETTING} has {channels} latent channels but {len(mean)} latents_mean and {len(std)} latents_std"
        )
    return torch.tensor(mean), factor / torch.tensor(std)
