"""The choice of attention, and heads with zero columns against plain ones."""

import dataclasses
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import need, redraw

from odit import choice, config, nn, ops, random, tree
from odit.kernels import attention, flash4
from odit.models import dit, latte
from odit.models.config import Shape
from odit.ops import Ops

KEY = random.key(3)
H200 = torch.device("cuda")


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)


def test_a_gpu_that_was_not_measured_is_told(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    found = attention.choose(H200, torch.bfloat16, 72, 256)
    assert found.backend.name == "sdpa" and "(compute capability 8.0 was not measured)" in found.told


@pytest.mark.parametrize(
    "size, length, widens, backend, wide, told",
    [
        (72, 256, True, "cudnn", 72, "182 against flash-attn 4's 173"),
        (72, 4096, True, "cudnn", 80, "heads of 72 as 80 .*not flash-attn 4: flash-attn-4 is not installed"),
        (72, 4096, False, "cudnn", 72, "cuDNN's attention"),
        (64, 4096, True, "cudnn", 64, "not flash-attn 4"),
        (48, 4096, True, "sdpa", 48, "head size 48 was not measured"),
    ],
)
def test_the_table_is_read_and_told(hopper, size, length, widens, backend, wide, told):
    found = attention.choose(H200, torch.bfloat16, size, length, widens)
    assert (found.backend.name, found.wide) == (backend, wide)
    assert re.search(told, found.told)


def test_what_was_measured_and_cannot_run_is_told(hopper):
    told = attention.choose(H200, torch.float32, 72, 256).told
    assert "PyTorch's choice of attention (not " in told and "float32 is not half precision)" in told


@pytest.mark.parametrize(
    "size, length, repeats, backend",
    [
        (72, 4096, None, "flash4"),
        (72, 4096, True, "flash4"),
        (72, 4096, False, "flash4_any"),
        (72, 1024, None, "cudnn"),  # nothing in the table repeats there
        (72, 1024, True, "triton"),
        (64, 256, True, "triton"),
        (48, 256, True, "triton"),
        (48, 256, None, "sdpa"),
    ],
)
def test_what_repeats_is_preferred_demanded_or_not(monkeypatch, size, length, repeats, backend):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    here = {name: dataclasses.replace(b, obstacle=lambda *args: None) for name, b in attention.BACKENDS.items()}
    monkeypatch.setattr(attention, "BACKENDS", here)
    found = attention.choose(H200, torch.bfloat16, size, length, repeats=repeats)
    assert found.backend.name == backend
    assert ("does not repeat bit for bit" in found.told) == (backend in ("cudnn", "sdpa", "flash4_any"))


def test_what_cannot_repeat_is_refused(hopper):
    with pytest.raises(ValueError, match=r"for 4096 tokens in heads of 72 .*: install flash-attn-4 where"):
        attention.choose(H200, torch.bfloat16, 72, 4096, repeats=True)


def test_without_half_precision_pytorch_chooses(hopper):
    found = attention.choose(H200, torch.float32, 72, 256)
    assert found.backend.name == "sdpa" and "float32 is not half precision" in found.told


def test_a_cpu_has_the_reference():
    found = attention.choose(torch.device("cpu"), torch.float32, 72, 4096)
    assert found.backend.name == "plain" and found.wide == 72


@pytest.mark.parametrize("kind", ["bare", "normalised and rotated"])
def test_wide_heads_change_nothing(kind):
    """A block with heads of 6 as 8 against heads of 6, in fp64: output and every gradient."""
    bare = kind == "bare"
    cfg = dit.Config(width=24, heads=4, qk_norm=not bare)
    params = redraw(dit.declare_block(cfg))
    x, c, dy = (random.normal(random.fold_in(KEY, name), shape).double() for name, shape in
                (("x", (3, 10, 24)), ("c", (3, 24)), ("dy", (3, 10, 24))))  # fmt: skip
    tables = () if bare else tuple(t.double() for t in nn.rotary_3d(1, 2, 5, cfg.head_size))
    choice = attention.Choice(attention.BACKENDS["plain"], 8, "")
    seen = []

    def watched(q, k, v, scale):
        seen.append((q.shape[-1], v.shape[-1]))
        return attention.plain(q, k, v, scale)

    choice = dataclasses.replace(choice, backend=dataclasses.replace(choice.backend, attend=watched))

    def run(record):
        leaves = [leaf.detach().requires_grad_() for leaf in (x, c, *tree.leaves(params))]
        p = tree.unflatten(params, leaves[2:])
        y = dit.make_block(cfg, record)(p, leaves[0], leaves[1], tables)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    for a, b in zip(run(attention.with_attention(Ops(), choice, cfg.head_size)), run(Ops()), strict=True):
        assert a.shape == b.shape and (a - b).norm() <= 1e-13 * b.norm().clamp(min=1e-3)
    assert seen == [(8, 8)]


@pytest.mark.parametrize("kind", ["bare", "normalised and rotated"])
def test_one_tensor_of_q_k_and_v_changes_nothing(kind):
    """A block whose q, k and v stay together where nothing comes between, in fp32."""
    bare = kind == "bare"
    cfg = dit.Config(width=24, heads=4, qk_norm=not bare)
    params = redraw(dit.declare_block(cfg), dtype=torch.float32)
    x, c, dy = (random.normal(random.fold_in(KEY, "one", name), shape) for name, shape in
                (("x", (3, 10, 24)), ("c", (3, 24)), ("dy", (3, 10, 24))))  # fmt: skip
    tables = () if bare else tuple(t.float() for t in nn.rotary_3d(1, 2, 5, cfg.head_size))
    seen = []
    backend = dataclasses.replace(
        attention.BACKENDS["plain"],
        attend_packed=lambda qkv, scale: seen.append(qkv.shape) or attention.plain(*qkv.unbind(2), scale),
    )
    record = attention.with_attention(Ops(), attention.Choice(backend, cfg.head_size, ""), cfg.head_size, packs=True)

    def run(record):
        leaves = [leaf.detach().requires_grad_() for leaf in (x, c, *tree.leaves(params))]
        y = dit.make_block(cfg, record)(tree.unflatten(params, leaves[2:]), leaves[0], leaves[1], tables)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    for a, b in zip(run(record), run(Ops()), strict=True):
        assert a.shape == b.shape and (a - b).norm() <= 1e-5 * b.norm().clamp(min=1e-2)
    assert seen == ([(3, 10, 3, 4, 6)] if bare else [])


def latte_gradients(cfg, frames, side, record, dtype, device="cpu"):
    """Latte's output for two clips and the gradients of all its parameters."""
    shape = Shape(channels=2, size=(frames, side, side), num_classes=3)
    params = redraw(latte.declare(cfg, shape))
    x, t = (random.normal(random.fold_in(KEY, "latte", name), size) for name, size in
            (("x", (2, *shape.sample)), ("t", (2,))))  # fmt: skip
    leaves = [p.to(device, dtype).requires_grad_() for p in tree.leaves(params)]
    x, t, y = x.to(device, dtype), t.to(device, dtype), torch.tensor([0, 2], device=device)
    out = latte.forward(tree.unflatten(params, leaves), x, t, y, cfg, record)
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    return [g.double() for g in (out.detach(), *gradients)]


@pytest.mark.parametrize("name, wide, packs, qk_norm, frames, along", [
    ("triton", 8, True, False, 5, "run_packed"), ("triton", 8, False, False, 5, "run"),
    ("triton", 8, True, True, 5, "run"), ("plain", 12, False, False, 5, None), ("sdpa", 8, True, False, 5, "run"),
    ("triton", 8, True, False, 66, "by_samples"), ("sdpa", 8, True, False, 66, "by_samples"),
])  # fmt: skip
def test_attention_along_time(monkeypatch, name, wide, packs, qk_norm, frames, along):
    """Latte by fused kernels against its reference: few frames by the own kernel where they lie, more by copies."""
    pytest.importorskip("triton")
    from odit.kernels import fused, short_attention

    cfg = dit.Config(arch="latte", width=16, depth=2, heads=2, patch=2, qk_norm=qk_norm)
    seen = []

    def watch(module, name, dims):
        site = getattr(module, name)

        def watched(*args, **settings):
            tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
            seen.extend([name] * (tensor.ndim in dims))
            return site(*args, **settings)

        monkeypatch.setattr(module, name, watched)

    watch(short_attention, "run", [5])
    watch(short_attention, "run_packed", [6])
    watch(ops, "by_samples", [5, 6])
    choice = attention.Choice(attention.BACKENDS[name], wide, "")
    record = attention.with_attention(fused(Ops()), choice, cfg.head_size, packs)
    found = latte_gradients(cfg, frames, 4, record, torch.float32)
    assert seen == ([along] if along else [])
    for a, b in zip(found, latte_gradients(cfg, frames, 4, Ops(), torch.float64), strict=True):
        assert (a - b).norm() <= 1e-4 * max(b.norm(), 1e-3 * found[0].norm())


def test_how_far_offsets_reach():
    """64 frames of 9,709 places in 16 heads of 72 are the last whose gradients are within 2^31 values of each other."""
    pytest.importorskip("triton")
    from odit.kernels import short_attention

    def clip(places, frames=64, size=72, dtype=torch.bfloat16):
        return torch.empty((1, frames, places, 3, 16, size), dtype=dtype, device="meta").transpose(1, 2)

    assert not short_attention.reaches(clip(4, dtype=torch.float32))  # which PyTorch's does on a GPU

    assert 3 * 9709 * 64 * 16 * 72 < 2**31 <= 3 * 9710 * 64 * 16 * 72
    assert short_attention.reaches(clip(9709)) and not short_attention.reaches(clip(9710))
    assert not short_attention.reaches(clip(4, frames=65)) and not short_attention.reaches(clip(4, size=136))


def test_attention_along_time_is_told():
    pytest.importorskip("triton")
    clips, pictures = (config.presets()[name][1] for name in ("latte-xl-1x2x2", "dit-xl-2"))
    half = dataclasses.replace(clips, precision="bf16")
    assert choice.along_time(half, [(16, 32, 32), (64, 32, 32)]) == "; along time odit's kernel"
    for run, size in ((half, (65, 32, 32)), (clips, (16, 32, 32))):
        assert choice.along_time(run, [(16, 32, 32), size]) == "; along time the same or, for few frames, odit's kernel"
    assert choice.along_time(pictures, [(32, 32)]) == ""


@pytest.mark.gpu
def test_attention_along_time_on_a_gpu():
    """Output and all gradients of Latte in bf16: no further from fp64 than 1.5 times the reference in bf16."""
    from odit.kernels import fused

    cfg = dit.Config(arch="latte", width=144, depth=2, heads=2, patch=2)
    chosen = attention.choose(H200, torch.bfloat16, 72, 256)
    record = attention.with_attention(fused(ops.flash()), chosen, 72, packs=True)
    exact = latte_gradients(cfg, 16, 32, Ops(), torch.float64, H200)
    eager = latte_gradients(cfg, 16, 32, Ops(), torch.bfloat16, H200)
    found = latte_gradients(cfg, 16, 32, record, torch.bfloat16, H200)

    def errors(given):
        return [float((a - b).norm() / b.norm()) for a, b in zip(given, exact, strict=True) if b.norm() > 0]

    ours, theirs = errors(found), errors(eager)
    assert ours[0] <= 1.5 * theirs[0] and sum(ours) <= 1.5 * sum(theirs)


@pytest.mark.parametrize("name", ["plain", "sdpa"])
def test_backends_take_a_scale(name):
    q, k, v = (random.normal(random.fold_in(KEY, part), (2, 9, 3, 8)).double() for part in "qkv")
    found = attention.BACKENDS[name].attend(q, k, v, 6**-0.5)
    scores = torch.einsum("blhk,bmhk->bhlm", q, k) / 6**0.5
    expected = torch.einsum("bhlm,bmhk->blhk", scores.softmax(-1), v)
    assert (found - expected).norm() <= 1e-14 * expected.norm() * 10


def test_the_operator_of_flash_attn_4_traces_without_it():
    """Shapes and the backward's wiring, on meta tensors: the kernel itself needs a GPU."""
    q, k, v = (torch.empty(2, 5, 3, 8, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3))
    o = flash4.attend(q, k, v, 0.3)
    assert o.shape == q.shape and all(g.shape == q.shape for g in torch.autograd.grad(o.sum(), (q, k, v)))
    qkv = torch.empty(2, 5, 3, 3, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    o = flash4.attend_packed(qkv, 0.3)
    (d,) = torch.autograd.grad(o.sum(), qkv)
    assert o.shape == q.shape and d.shape == qkv.shape and d.is_contiguous()


@pytest.mark.parametrize("which", ["attend_packed", "attend_packed_any"])
def test_packed_flash_attn_4_writes_one_gradient(monkeypatch, which):
    monkeypatch.setattr(flash4, "load", lambda: imitated(lambda *found: found))
    qkv, do = (random.normal(random.fold_in(KEY, part), shape) for part, shape in
               (("qkv", (2, 5, 3, 2, 8)), ("do", (2, 5, 2, 8))))  # fmt: skip
    qkv.requires_grad_()
    o, expected = getattr(flash4, which)(qkv, 8**-0.5), ops.attend(*qkv.unbind(2))
    found, exact = (torch.autograd.grad(x, qkv, do)[0] for x in (o, expected))
    assert (o - expected).norm() <= 1e-6 * expected.norm() and (found - exact).norm() <= 1e-6 * exact.norm()
    assert found.is_contiguous()


def test_flash_attn_4_is_loaded_and_called_where_warnings_are_errors(tmp_path, monkeypatch):
    package = tmp_path / "flash_attn" / "cute"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "interface.py").write_text(
        "import warnings\n"
        "warnings.warn('old', DeprecationWarning)\n"
        "def call(x, add):\n    warnings.warn('compiling')\n    return x + add"
    )
    monkeypatch.setattr(flash4, "load", flash4.load.__wrapped__)
    monkeypatch.setattr(flash4, "COMPILED", set())
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert flash4.run("call", torch.ones(1), add=2) == 3
        with pytest.warns(UserWarning, match="compiling"):  # only the first call of a shape is quiet
            flash4.run("call", torch.ones(1), add=2)
    finally:
        for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
            sys.modules.pop(name, None)


def imitated(spoil):
    """flash-attn 4's functions in plain PyTorch; ``spoil`` of dq, dk and dv."""

    def forward(q, k, v, softmax_scale, return_lse):
        return ops.attend(q * (softmax_scale * q.shape[-1] ** 0.5), k, v), q.new_zeros(1)

    def backward(q, k, v, o, do, lse, scale, deterministic, dq, dk, dv):
        into = (dq, dk, dv)
        q, k, v, do = (x.transpose(1, 2) for x in (q, k, v, do))
        p, dp = (scale * q @ k.mT).softmax(-1), do @ v.mT
        ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
        for room, x in zip(into, spoil(*(x.transpose(1, 2) for x in (ds @ k, ds.mT @ q, p.mT @ do)))):
            room.copy_(x)

    return SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)


def raises(*args):
    raise TypeError


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda dq, dk, dv: (dq, dk, dv), None),
        (lambda dq, dk, dv: (dq * 1.1, dk, dv), "flash-attn-4's dq is wrong for heads of 8, by 10%"),
        (lambda dq, dk, dv: (dq, dk, dv * float("nan")), "flash-attn-4's dv is wrong for heads of 8, by nan%"),
        (raises, "flash-attn-4 cannot run (TypeError)"),
    ],
)
def test_flash_attn_4_is_taken_where_its_numbers_are_right(monkeypatch, spoil, told):
    real = flash4.importlib.util.find_spec  # which libraries that load only now ask too
    there = lambda name, *args: name if name.startswith("flash_attn") else real(name, *args)  # noqa: E731
    monkeypatch.setattr(flash4.importlib.util, "find_spec", there)
    monkeypatch.setattr(flash4, "load", lambda: imitated(spoil))
    monkeypatch.setattr(flash4, "errors", flash4.errors.__wrapped__)
    with torch.no_grad():
        assert flash4.obstacle(torch.device("cpu"), torch.float32, 8, repeats=True) == told


@pytest.mark.parametrize("writes, width", [(16, 16), (32, 32), (None, 32)])
def test_sums_of_dq_are_read_as_they_were_written(writes, width):
    """On Hopper, by a flash-attn 4 that writes for heads rounded up to 16, by a mended one, and by another version."""
    seen = []

    def read(accum, dq, scale, begins, lengths, arch, *, hdim_multiple_of=32):
        seen.append((arch, hdim_multiple_of))

    read.compile_cache = {}
    interface = SimpleNamespace(_bwd_postprocess_convert=read)
    if writes is not None:
        interface.FlashAttentionBackwardSm90 = lambda _, K: SimpleNamespace(tile_hdim=-(-K // writes) * writes)
    flash4._read_as_written(interface)
    for arch in (90, 100):
        interface._bwd_postprocess_convert(1, 2, 3, 4, 5, arch)
        interface._bwd_postprocess_convert(1, 2, 3, 4, 5, arch, hdim_multiple_of=64)
    assert seen == [(90, width), (90, 64), (100, 32), (100, 64)]
    assert interface._bwd_postprocess_convert.compile_cache == {}


def numbers(fn, draws, dtype):
    """What it gives and the gradients of all draws but the last, which is the cotangent."""
    *leaves, dy = [x.to(H200, dtype) for x in draws]
    leaves = [x.requires_grad_() for x in leaves]
    y = fn(*leaves)
    return [t.double() for t in (y, *torch.autograd.grad(y, leaves, dy))]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "flash2", "cudnn", "flash4", "flash4_any", "triton"])
@pytest.mark.parametrize("B, L, K", [(5, 17, 72), (2, 256, 72), (1, 1021, 64), (2, 256, 80), (1, 300, 40)])
def test_backends_against_fp64(name, B, L, K):
    """Error no more than 1.5 times that of the reference in the same dtype, output and gradients."""
    backend = attention.BACKENDS[name]
    need(backend.obstacle(H200, torch.bfloat16, K))
    draws = [random.normal(random.fold_in(KEY, part), (B, L, 3, K)).bfloat16() for part in "qkvd"]
    exact, eager = numbers(ops.attend, draws, torch.float64), numbers(ops.attend, draws, torch.bfloat16)
    found = numbers(lambda q, k, v: backend.attend(q, k, v, K**-0.5), draws, torch.bfloat16)
    for a, b, c in zip(found, eager, exact, strict=True):
        assert (a - c).norm() <= 1.5 * (b - c).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("name, K", [("flash4", 64), ("flash4", 80), ("triton", 72)])
def test_backward_repeats_where_that_is_told(name, K):
    backend, L = attention.BACKENDS[name], 2048 if name == "flash4" else 256
    assert backend.repeats
    need(backend.obstacle(H200, torch.bfloat16, K))
    draws = [random.normal(random.fold_in(KEY, part), (4, L, 8, K)).bfloat16() for part in "qkvd"]
    first, second = (numbers(lambda q, k, v: backend.attend(q, k, v, K**-0.5), draws, torch.bfloat16) for _ in "ab")
    assert all(map(torch.equal, first, second))


@pytest.mark.gpu
@pytest.mark.parametrize("entry", attention.HOPPER, ids=lambda e: f"{e.size}-{e.least}-{e.backend}-{e.wide}")
def test_the_table_against_fp64(entry):
    """Each entry as a model calls it: from tokens to tokens, through heads as wide as the table has them.

    Error no more than 1.5 times that of the reference in the same dtype, or of FlashAttention 2: all of its kind take
    the sums of o do over an o in half precision, which thousands of tokens show (1.7 times the reference's error).
    """
    backend, K, H, L = attention.BACKENDS[entry.backend], entry.size, 2, max(entry.least, 256) + 44  # no whole tiles
    need(backend.obstacle(H200, torch.bfloat16, entry.wide))
    shapes = {"h": (2, L, H * K), "w": (3, H, K, H * K), "b": (3, H, K), "out": (H * K, H, K), "bias": (H * K,)}
    scales = {"w": (H * K) ** -0.5, "out": (H * K) ** -0.5}
    draws = [
        (scales.get(name, 1.0) * random.normal(random.fold_in(KEY, name), shape)).bfloat16()
        for name, shape in (*shapes.items(), ("dy", shapes["h"]))
    ]

    def through(record):
        def layer(h, w, b, out, bias):
            return record.out(record.attend(*record.qkv(h, {"w": w, "b": b}, ())), {"w": out, "b": bias})

        return layer

    def by(name, wide):
        return attention.with_attention(Ops(), attention.Choice(attention.BACKENDS[name], wide, ""), K, packs=True)

    exact, eager = (numbers(through(Ops()), draws, dtype) for dtype in (torch.float64, torch.bfloat16))
    found, flash = (
        numbers(through(by(*how)), draws, torch.bfloat16) for how in ((entry.backend, entry.wide), ("flash2", K))
    )
    for a, b, f, c in zip(found, eager, flash, exact, strict=True):
        assert (a - c).norm() <= 1.5 * max((b - c).norm(), (f - c).norm())
