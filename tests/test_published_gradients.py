"""Gradients of published models on a GPU at their own widths and lengths, whatever kernels a run takes there."""

import dataclasses

import pytest
import torch
from conftest import need, normal

from odit import config, data, ops, plan, random, train, tree
from odit.data import loader
from odit.parallel import spec

KEY = random.key(21)
NOISE = 2.0  # times the error of the reference: attention of FlashAttention's kind has 1.7 for thousands of tokens
LEAST = 0.01  # of a leaf
MISSING = ("flash-attn-4 is not installed", "quack-kernels is not installed")
SHORT = "odit's kernel for short samples"
MODELS = [
    ("dit-xl-2", 8, SHORT),
    ("dit-b-2", 8, SHORT),
    ("vdit-xl-1x2x2", 1, "flash-attn 4"),
    ("latte-xl-1x2x2", 1, SHORT),
]  # and the attention that Hopper has for them


def leaves_of(run):
    """Gradients of a run's first batch by path, in fp64 on the CPU, and the words on its kernels."""
    dataset = data.open_dataset(run.data)
    composed = plan.make(run, dataset)
    params = weights(composed)
    (batch,) = loader.batches(dataset, KEY, global_batch=run.global_batch, stop=1)
    _, grads, _ = train.gradients(composed, params, batch, KEY)
    return {path: leaf.double().cpu() for path, leaf in tree.items(grads)}, "; ".join(composed.notes)


def weights(composed):
    """A first state's, with noise where they are 0: else a block is the identity. Drawn where they are used."""
    layout = composed.layout
    first = spec.init(composed.declared, KEY, layout.specs, layout.axis, composed.device)

    def leaf(path, p):
        return p if p.any() else 0.02 * normal(random.fold_in(KEY, path), p.shape, p.device)

    return tree.map_with_path(leaf, first)


def worst(run, **changes):
    """The largest error of a leaf by the run's kernels, in units of what rounding may do to it."""
    runs = [dict(kernels="reference", precision="fp32"), dict(kernels="reference"), dict(kernels="auto")]
    (exact, _), (eager, _), (found, told) = (leaves_of(dataclasses.replace(run, **changes, **how)) for how in runs)
    off = {}
    for name, leaf in exact.items():
        allowed = max(NOISE * (eager[name] - leaf).norm(), LEAST * leaf.norm())
        off[name] = float((found[name] - leaf).norm() / allowed)
    return max((size, name) for name, size in off.items()), told


def two_blocks(preset, batch, **changes):
    run = config.presets()[preset][1]
    model = dataclasses.replace(run.model, depth=2)
    return dataclasses.replace(
        run, model=model, global_batch=batch, micro_batch=None, precision="bf16", evaluate=False, **changes
    )


@pytest.mark.gpu
@pytest.mark.parametrize("repeats", [None, False])
@pytest.mark.parametrize("preset, batch, attention", MODELS)
def test_gradients_of_published_models(preset, batch, attention, repeats):
    """Every leaf, in bf16, by the kernels that are meant."""
    (size, name), told = worst(two_blocks(preset, batch, deterministic=repeats, device="cuda"))
    assert size <= 1, f"{name}: {size:.1f} times what rounding explains ({told})"
    assert "kernels: fused (auto)" in told
    if torch.cuda.get_device_capability() == (9, 0):
        need(next((why for why in MISSING if why in told), None))
        assert f"; {attention}" in told and "GELU in the products" in told, told


def with_noise(x):
    """x, whose gradient is one of its size that has nothing to do with it."""
    x = x.view_as(x)
    x.register_hook(lambda dx: random.normal(KEY, dx.shape).to(dx.dtype) * dx.std())
    return x


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_wrong_gradient_of_queries_is_seen(spoilt, monkeypatch):
    """On a CPU, where ``auto`` is the reference: attention alone is another one."""
    kernels_of = plan.kernels_of

    def kernels(run, *args):
        record, told = kernels_of(run, *args)
        if spoilt and run.kernels == "auto":
            record = dataclasses.replace(record, attend=lambda q, k, v: ops.attend(with_noise(q), k, v))
        return record, told

    monkeypatch.setattr(plan, "kernels_of", kernels)
    (size, name), _ = worst(two_blocks("digits", 8, device="cpu"))
    assert (size > 5 and name.endswith("qkv.w")) if spoilt else size <= 0.5
