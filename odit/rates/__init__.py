"""How fast a machine is, part by part: tables that ``experiments/bench.py rates`` writes, two of which ship.

``h100.json`` and ``h200.json`` hold measurements of one NVIDIA H100 and one H200, of parts alone: whole steps play no
part in them but for what the host takes to launch a kernel. ``sources`` says where each figure comes from.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent
TILE = (128, 256)  # what a multiprocessor computes of a product at once (cuBLAS on Hopper, bf16)
MANY_WAVES = 8  # from which on the last, half empty one hardly counts


@dataclass(frozen=True)
class Product:
    """A measured product of (m, k) and (k, n)."""

    precision: str
    m: int
    n: int
    k: int
    tflops: float


@dataclass(frozen=True)
class Attended:
    """A measured attention; TFLOP/s on the true head size, forward, and forward with backward as 3.5 of it."""

    precision: str
    backend: str
    batch: int
    heads: int
    tokens: int
    size: int
    wide: int
    forward_tflops: float
    tflops: float

    @property
    def seconds(self) -> tuple[float, float]:
        """Forward and backward pass for one operation of the forward pass."""
        forward = 1e-12 / self.forward_tflops
        return forward, 3.5e-12 / self.tflops - forward


@dataclass(frozen=True)
class Link:
    """Bytes a second that a collective brings to a rank, and seconds before its first byte."""

    gb_per_s: float
    launch_us: float


@dataclass(frozen=True)
class Rates:
    """One machine's table."""

    device: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_gib: float
    copy_gb_per_s: float
    """Bytes read and written by a copy."""
    products: tuple[Product, ...]
    attention: tuple[Attended, ...]
    of_copy: dict[str, float]
    """Share of a copy's speed that passes over memory reach: norm, gelu_forward, gelu_backward, sums (of biases'
    gradients), optimizer."""
    wait_us: float
    """Between two kernels of a CUDA graph."""
    around_ms: float
    """What a step takes beside its model: draws, the batch's way to the GPU, figures, the host between two steps."""
    launch_us: float
    """A kernel's launch, without a graph: below that many no GPU is busy."""
    host_gb_per_s: float
    """Of the link to pinned host memory, each way."""
    host_update_ns: float
    """What offload does for a parameter on a machine's CPU: gradient out of staging, norm, clip, AdamW, EMA, cast."""
    links: dict[str, Link]
    sources: dict[str, str]
    """Where each field's figures come from."""

    def product_s(self, m: int, n: int, k: int, precision: str) -> float:
        """Seconds of a product: by the nearest measured shape, with the waves of tiles of both, but no less than its
        bytes take. Raises ValueError where the precision was not measured."""
        kind = _kind(precision)
        measured = [p for p in self.products if _kind(p.precision) == kind]
        if not measured:
            known = sorted({p.precision for p in self.products})
            raise ValueError(
                f"rates of {self.device} have no products in {precision}: use --precision {' or '.join(known)}, or "
                f"measure them with python experiments/bench.py rates --precisions {precision}"
            )
        near = min(measured, key=lambda p: _distance((p.m, p.n, p.k), (m, n, k)))
        full = self._filled(m, n, k) / self._filled(near.m, near.n, near.k)
        size = 4 if precision == "fp32" else 2
        return max(
            2e-12 * m * n * k / (near.tflops * min(1.0, full)),
            size * (m * k + k * n + m * n) / self.copy_gb_per_s / 1e9,
        )

    def _filled(self, m: int, n: int, k: int) -> float:
        """Share of the multiprocessors' time that is work, by whole waves of tiles; a long k is split among them."""
        tiles = m * n / math.prod(TILE)
        if (k > m and k > n) or tiles > MANY_WAVES * self.multiprocessors:
            return 1.0
        whole = -(-m // TILE[0]) * -(-n // TILE[1])
        return tiles / (-(-whole // self.multiprocessors) * self.multiprocessors)

    def attention_s(self, tokens: int, size: int, flops: float, moved: float, backend: str | None) -> tuple[float, ...]:
        """Seconds forward and backward of ``flops`` (of the forward pass), no less than ``moved`` bytes forward and
        twice these backward take. By the backend's nearest measured shapes; between two lengths by their logarithm."""
        found = [a for a in self.attention if backend in (None, a.backend)] or list(self.attention)
        close = min(abs(math.log(a.size / size)) for a in found)
        found = sorted((a for a in found if abs(math.log(a.size / size)) == close), key=lambda a: a.tokens)
        below = [a for a in found if a.tokens <= tokens][-1:] or found[:1]
        above = [a for a in found if a.tokens >= tokens][:1] or found[-1:]
        low, high = below[0], above[0]
        span = math.log(high.tokens / low.tokens)
        part = math.log(tokens / low.tokens) / span if span else 0.0
        each = (a * (1 - part) + b * part for a, b in zip(low.seconds, high.seconds))
        speed = self.copy_gb_per_s * 1e9 * self.of_copy["norm"]
        return tuple(max(flops * s, n * moved / speed) for n, s in zip((1, 2), each))

    def pass_s(self, moved: float, kind: str) -> float:
        """Seconds of a pass that moves so many bytes of device memory."""
        return moved / (self.copy_gb_per_s * 1e9 * self.of_copy[kind])


def _kind(precision: str) -> str:
    """Tensor cores are as fast in fp16 as in bf16."""
    return "half" if precision in ("fp16", "bf16") else precision


def _distance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return sum(math.log(x / y) ** 2 for x, y in zip(a, b))


def find(name: str | Path) -> Path:
    """The file of a shipped table or of any other; raises ValueError for what is neither."""
    file = SHIPPED / f"{name}.json" if (SHIPPED / f"{name}.json").exists() else Path(name)
    if not file.is_file():
        shipped = ", ".join(sorted(f.stem for f in SHIPPED.glob("*.json")))
        raise ValueError(f"machine is {name}: use {shipped}, or the file that python experiments/bench.py rates wrote")
    return file


def load(name: str | Path) -> Rates:
    """The shipped table of that name, or a file's; raises ValueError for what is neither."""
    file = find(name)
    try:
        return parse(json.loads(file.read_text()))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"machine {file} is no table of rates ({type(error).__name__}: {error}): write one with "
            "python experiments/bench.py rates --out rates.json"
        ) from None


def parse(found: dict[str, Any]) -> Rates:
    """A table from its JSON."""
    return Rates(
        **found
        | {
            "capability": tuple(found["capability"]),
            "products": tuple(Product(**row) for row in found["products"]),
            "attention": tuple(Attended(**row) for row in found["attention"]),
            "links": {name: Link(**row) for name, row in found["links"].items()},
        }
    )
