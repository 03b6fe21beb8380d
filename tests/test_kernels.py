"""Fused kernels against fp64: in Triton's interpreter on the CPU, and compiled on a GPU (-m gpu)."""

import dataclasses
import functools
import importlib
import importlib.util
import weakref
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from conftest import normal

from odit import checks, kernels, memory, ops, optim, random, train, tree
from odit.data import loader

pytest.importorskip("triton")

from odit.kernels import adamw, bias_gelu, qkv, rows
from odit.kernels.gated import gated
from odit.kernels.gated_modulate import gated_modulate
from odit.kernels.modulate import modulate

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
KEY = random.key(3)


class Kernel(NamedTuple):
    """A kernel and its reference; ``takes`` has a letter a tensor: x (B, L, D), m (B, D), q (B, L, H, K), w (K).

    Without an operator's name it is another's under other settings.
    """

    fused: Callable
    reference: Callable
    takes: str
    keeps: int = 0
    """Tensors of x's size that the forward pass saves."""
    operator: str = ""


def tables(q):
    angles = 0.7 * torch.arange(q.shape[1] * q.shape[-1] // 2, device=q.device).unflatten(0, (q.shape[1], -1))
    return angles.cos(), angles.sin()


def both(q, w):
    return ops.rotate(ops.rms_norm(q, w), *tables(q))


KERNELS = {
    "modulate": Kernel(modulate, ops.modulate, "xmm", 1, "modulate"),
    "gated": Kernel(gated, ops.gated, "xmx", 1, "gated"),
    "gated_modulate": Kernel(gated_modulate, ops.gated_modulate, "xmxmm", 2, "gated_modulate"),
    "bias_gelu": Kernel(bias_gelu.bias_gelu, bias_gelu.reference, "xm", 1, "bias_gelu"),
    "norm_rotate": Kernel(lambda q, w: qkv.norm_rotate(q, w, tables(q)), both, "qw", 1, "norm_rotate"),
    "norm": Kernel(lambda q, w: qkv.norm_rotate(q, w, ()), ops.rms_norm, "qw", 1),
    "rotate": Kernel(lambda q: qkv.norm_rotate(q, None, tables(q)), lambda q: ops.rotate(q, *tables(q)), "q", 1),
}
ALL = pytest.mark.parametrize("name", KERNELS)
OPERATORS = pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if kernel.operator])


def inputs(kernel, B, L, D, dtype=FP32, strided=True, device="cpu", number=0):
    """Other values in each, other modulation a sample; strided ones are what models hand over: slices, transposes."""
    heads = 16 if D >= 1024 else 2 if D % 4 == 0 else 1
    made = {
        "x": lambda key: normal(key, (L, B, D), device).transpose(0, 1),
        "m": lambda key: normal(key, (B, 6 * D), device)[:, 2 * D : 3 * D],
        "q": lambda key: normal(key, (B, L, 3, heads, D // heads), device)[:, :, 1],
        "w": lambda key: normal(key, (D // heads,), device),
    }
    drawn = [made[letter](random.fold_in(KEY, number, n)).to(dtype) for n, letter in enumerate(kernel.takes)]
    return tuple(drawn if strided else [x.contiguous() for x in drawn])


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


def everything(fn, given):
    """Outputs, and gradients with all of them used, which have tokens before samples."""
    given = tuple(x.detach().requires_grad_() for x in given)
    outputs = as_tuple(fn(*given))
    turned = [y.transpose(0, 1) for y in outputs]
    used = [normal(random.fold_in(KEY, "used", n), y.shape, y.device).to(y) for n, y in enumerate(turned)]
    used = [y.transpose(0, 1) for y in used]
    return (*(y.detach() for y in outputs), *torch.autograd.grad(outputs, given, used))


def relative(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


def assert_as_exact_as_eager(kernel, B, L, D, dtype=FP32, device="cpu"):
    """At most 1.5 times the error of eager PyTorch in the same dtype, or that of rounding the exact result.

    Errors are those of as many draws as make 8 tokens, on a GPU 64: of a token alone mean and deviation are off by what
    chance has. The interpreter cuts off what does not fit in bf16 where the GPU rounds to nearest: twice the error.
    """
    interpreted, sums = device == "cpu", 0.0
    for number in range(-(-(8 if interpreted else 64) // (B * L))):
        given = inputs(kernel, B, L, D, dtype, device=device, number=number)
        found, eager = everything(kernel.fused, given), everything(kernel.reference, given)
        exact = everything(kernel.reference, [x.double() for x in given])
        assert all(a.dtype == dtype and a.shape == c.shape for a, c in zip(found, exact, strict=True))
        sums = sums + torch.tensor([[size(a - c), size(b - c), size(c)] for a, b, c in zip(found, eager, exact)])
    for off, eager_off, all_of_it in sums.sqrt().tolist():
        bound = max(1.5 * eager_off, torch.finfo(dtype).eps / 3 * all_of_it)
        assert off <= bound * (2 if interpreted and dtype == BF16 else 1)


def size(x):
    """The sum of squares."""
    return float(x.double().square().sum())


# ------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.every(17)
@ALL
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("width", [128, 384])
@pytest.mark.parametrize("length", [1, 17, 61])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_outputs_and_gradients(name, batch, length, width, dtype):
    assert_as_exact_as_eager(KERNELS[name], batch, length, width, dtype)


DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
LARGE = (17, 1021, 1152)  # what takes several steps and spans on a GPU


@pytest.mark.gpu
@ALL
@DTYPES
@pytest.mark.parametrize("width", [128, 384, 1152, 1536])
@pytest.mark.parametrize("length", [1, 17, 256, 1021])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_outputs_and_gradients_on_a_gpu(name, batch, length, width, dtype):
    assert_as_exact_as_eager(KERNELS[name], batch, length, width, dtype, "cuda")


@pytest.mark.gpu
@ALL
@DTYPES
def test_many_tokens_on_a_gpu(name, dtype):
    assert_as_exact_as_eager(KERNELS[name], *LARGE, dtype, "cuda")


@pytest.mark.gpu
@DTYPES
def test_gelu_of_the_widths_of_an_mlp_on_a_gpu(dtype):
    assert_as_exact_as_eager(KERNELS["bias_gelu"], 2, 256, 4608, dtype, "cuda")


@pytest.mark.parametrize("width", [64, 72, 130, 259])
def test_widths_that_no_tile_divides(width):
    assert_as_exact_as_eager(KERNELS["gated_modulate"], 2, 3, width)


def test_columns_apart():
    kernel = KERNELS["modulate"]
    x, shift, scale = inputs(kernel, 2, 5, 128)
    apart = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert apart.stride(-1) != 1
    assert torch.equal(modulate(apart, shift, scale), modulate(x, shift, scale))


@ALL
def test_samples_do_not_depend_on_each_other(name):
    kernel = KERNELS[name]
    given = inputs(kernel, 3, 5, 64)
    whole = as_tuple(kernel.fused(*given))
    for b in range(3):
        one = [x if letter == "w" else x[b : b + 1] for x, letter in zip(given, kernel.takes)]
        assert all(torch.equal(y[b : b + 1], z) for y, z in zip(whole, as_tuple(kernel.fused(*one))))


@ALL
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_runs_give_the_same_bits(name, device):
    kernel = KERNELS[name]
    given = inputs(kernel, 2, 17 if device == "cpu" else 1021, 128, device=device)
    first, second = (everything(kernel.fused, given) for _ in range(2))
    assert all(map(torch.equal, first, second))


def cuts(name, shape, device):
    """Spans and steps of a kernel's passes over (B, L, D)."""
    x = inputs(KERNELS[name], *shape, device=device)[0] if device == "cpu" else torch.empty(shape, device=device)
    if name == "bias_gelu":
        found = [bias_gelu._cut(x, steps) for steps in (bias_gelu.FORWARD_STEPS, bias_gelu.BACKWARD_STEPS)]
    elif name in ("modulate", "gated", "gated_modulate"):
        module = importlib.import_module(KERNELS[name].fused.__module__)
        found = [rows.tiling(x, tuning) for tuning in (module.FORWARD, module.BACKWARD)]
    else:
        x = x if x.ndim == 4 else x.unflatten(-1, (16, -1))
        found = [qkv.cut(x, programs, True, True) for programs in (qkv.FORWARD, qkv.BACKWARD)]
    return [(spans, constants["STEPS"]) for spans, *_, constants in found]


@pytest.mark.parametrize("name", ["modulate", "gated", "gated_modulate"])
def test_the_shapes_of_these_tests_have_several_spans_and_steps(name):
    assert all(spans > 1 and steps > 1 for spans, steps in cuts(name, (5, 61, 128), "cpu"))


@pytest.mark.parametrize("name", KERNELS)
def test_many_tokens_have_several_spans_and_steps(name):
    assert all(spans > 1 and steps > 1 for spans, steps in cuts(name, LARGE, "meta"))


@pytest.mark.parametrize("name", ["bias_gelu", "norm_rotate", "norm", "rotate"])
def test_several_spans_and_steps(name, monkeypatch):
    """Of the kernels that take them on a CPU for many tokens alone; in bf16, as the interpreter sums one by one."""
    monkeypatch.setattr(bias_gelu, "BACKWARD_STEPS", 2)
    monkeypatch.setattr(qkv, "FORWARD", 4)
    monkeypatch.setattr(qkv, "BACKWARD", 4)
    shape = (2, 131, 64)
    assert all(spans > 1 and steps > 1 for spans, steps in cuts(name, shape, "cpu"))
    assert_as_exact_as_eager(KERNELS[name], *shape, BF16)


def test_totals_over_many_spans():
    partial = random.normal(KEY, (2, 37, 3, 70))
    assert torch.allclose(rows.totals(partial, FP32).double(), partial.double().sum(1), atol=1e-5)


@pytest.mark.parametrize("B, L, D", [(128, 256, 1152), (1, 256, 1152), (8, 4096, 1152), (300, 7, 384), (2, 3, 2304)])
@pytest.mark.parametrize("resident", [False, True])
def test_every_token_has_its_step(B, L, D, resident):
    tuning = rows.Tuning(2, 396, 1, resident)
    spans, constants = rows.tiling(torch.empty(B, L, D, device="meta"), tuning)
    span = constants["R"] * constants["STEPS"]
    assert spans * span >= L > (spans - 1) * span
    if resident:
        assert B * spans <= max(B, 396)


def test_the_empty_share_of_a_rank():
    x, m = torch.zeros(2, 0, 128), torch.ones(2, 128)
    found = everything(gated_modulate, (x, m, x, m, m))
    assert [y.shape for y in found] == [x.shape] * 3 + [m.shape] + [x.shape] + [m.shape] * 2
    assert not any(y.any() for y in found)


@ALL
def test_what_kernels_do_not_take_goes_to_the_reference(name):
    kernel = KERNELS[name]
    given = inputs(kernel, 2, 3, 128, torch.float64)
    assert all(map(torch.equal, everything(kernel.fused, given), everything(kernel.reference, given)))
    if len(given) > 1:  # mixed dtypes are promoted as PyTorch does
        given = (given[0].bfloat16(), *(x.float() for x in given[1:]))
        pairs = zip(as_tuple(kernel.fused(*given)), as_tuple(kernel.reference(*given)))
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


# ----------------------------------------------------------------------------------------------------------- transforms


@ALL
def test_vmap_of_gradients(name):
    """Gradients a sample, where parameters have no samples: as validation's gradient norms."""
    kernel = KERNELS[name]
    given = inputs(kernel, 3, 5, 64)

    def gradients(fn):
        def loss(mine, *args):
            args = [mine] + [x if letter == "w" else x[None] for x, letter in zip(args, kernel.takes[1:])]
            return sum(y.sin().sum() for y in as_tuple(fn(args[0][None], *args[1:])))

        dims = [None if letter == "w" else 0 for letter in kernel.takes]
        return torch.func.vmap(torch.func.grad(loss, tuple(range(len(given)))), tuple(dims))(*given)

    for a, b in zip(gradients(kernel.fused), gradients(kernel.reference)):
        assert torch.allclose(a, b, atol=1e-4)


def test_vmap_over_another_dim():
    x, shift, scale = inputs(KERNELS["modulate"], 6, 5, 64)
    x, scale = x.unflatten(0, (3, 2)), scale.unflatten(0, (3, 2))
    found = torch.func.vmap(modulate, (0, None, 1))(x, shift[:2], scale.transpose(0, 1))
    assert torch.equal(found, torch.stack([modulate(x[n], shift[:2], scale[n]) for n in range(3)]))


@ALL
def test_jvp(name):
    kernel = KERNELS[name]
    given = inputs(kernel, 2, 5, 64)
    tangents = tuple(random.normal(random.fold_in(KEY, "tangent", n), x.shape) for n, x in enumerate(given))
    found, expected = (torch.func.jvp(fn, given, tangents) for fn in (kernel.fused, kernel.reference))
    for a, b in zip(as_tuple(found[1]), as_tuple(expected[1])):
        assert torch.allclose(a, b, atol=1e-4)


@ALL
def test_second_derivatives(name):
    kernel = KERNELS[name]
    given = inputs(kernel, 2, 3, 64)

    def slope(fn, *args):
        grads = torch.func.grad(lambda *a: sum(y.sin().sum() for y in as_tuple(fn(*a))), tuple(range(len(given))))
        return sum(g.cos().sum() for g in grads(*args))

    for a, b in zip(*(torch.func.grad(functools.partial(slope, fn))(*given) for fn in kernel[:2])):
        assert torch.allclose(a, b, atol=1e-3)
    found, expected = (torch.func.jvp(functools.partial(slope, fn), given, given)[1] for fn in kernel[:2])
    assert torch.allclose(found, expected, rtol=1e-3)


@ALL
def test_nothing_more_is_kept_than_backward_needs(name):
    """Tensors of x's size; nor does an output hold itself, so that it goes when its last name does."""
    kernel, kept = KERNELS[name], []
    given = [x.requires_grad_() for x in inputs(kernel, 1, 4, 64, strided=False)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape), lambda x: x):
        kernel.fused(*given)
    assert kept.count(given[0].shape) == kernel.keeps
    outputs = as_tuple(kernel.fused(*given))
    alive = [weakref.ref(x) for x in outputs]
    del outputs
    assert not any(x() is not None for x in alive)


# -------------------------------------------------------------------------------------------------------------- compile


GRAD_LOOKED_AT = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by PyTorch itself


def arguments(kernel, given):
    """What the registered operator takes."""
    if kernel.operator == "norm_rotate":
        q, w = given
        expanded = [t.expand(len(q), *t.shape) for t in tables(q)]
        return q, w.expand(len(q), -1), *expanded, ops.EPS, True, True
    return given if kernel.operator in ("gated", "bias_gelu") else (*given, ops.EPS)


@GRAD_LOOKED_AT
@OPERATORS
def test_the_registered_operator(name):
    kernel = KERNELS[name]
    given = tuple(x.detach().requires_grad_() for x in inputs(kernel, 2, 3, 64))
    operator = getattr(torch.ops.odit, kernel.operator).default
    torch.library.opcheck(
        operator,
        arguments(kernel, given),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
    )


BACKWARD = {  # what its operator takes; x stands for cotangents, which are like it
    "modulate": lambda x, shift, scale: (x, x, scale, ops.EPS),
    "gated": lambda x, gate, branch: (x, gate, branch),
    "gated_modulate": lambda x, gate, branch, shift, scale: (x, x, x, gate, branch, scale, ops.EPS),
    "bias_gelu": lambda y, b: (y, y, b),
    "norm_rotate": lambda q, w: (q, *arguments(KERNELS["norm_rotate"], (q, w))),
}


@OPERATORS
def test_the_registered_operator_of_backward(name):
    kernel = KERNELS[name]
    operator = getattr(torch.ops.odit, f"{kernel.operator}_backward").default
    given = BACKWARD[name](*inputs(kernel, 2, 3, 64))
    torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))


@GRAD_LOOKED_AT
@OPERATORS
def test_compiled_it_is_one_operator(name):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def seen(graph, _):
        graphs.append([str(n.target) for n in graph.graph.nodes if "odit" in str(n.target)])
        return make_boxed_func(graph)

    kernel = KERNELS[name]
    given = inputs(kernel, 2, 3, 64)
    torch._dynamo.reset()
    compiled = torch.compile(kernel.fused, backend=aot_autograd(fw_compiler=seen, bw_compiler=seen), fullgraph=True)
    found, expected = everything(compiled, given), everything(kernel.fused, given)
    assert all(map(torch.equal, found, expected))
    assert graphs == [[f"odit.{kernel.operator}.default"], [f"odit.{kernel.operator}_backward.default"]]


# ------------------------------------------------------------------------------------------------------------ optimizer


def drawn(seed, dtype=FP32, device="cpu"):
    """A tree of a leaf that is one short chunk, of whole chunks and a rest, of a whole one, and of one element."""
    shapes = [(7, 13), (40000,), (16384,), (1,)]
    made = [random.normal(random.fold_in(KEY, seed, n), shape).to(device, dtype) for n, shape in enumerate(shapes)]
    return {"a": made[0], "b": made[1:]}


def updated(optimizer, dtype=FP32, device="cpu", grads=FP32, cut=lambda t: t, low=None, updates=5):
    """Weights, moments, EMA and copy after some updates with the gradient clipped to half."""
    plainly = optimizer.update_.__module__ == optim.__name__
    params = cut(drawn(0, dtype, device))
    state, ema = optimizer.init(params), tree.map(torch.clone, params)
    copy = None if low is None else tree.map(lambda p: torch.empty_like(p, dtype=low), params)
    for n in range(updates):
        g, decay, lr = cut(drawn(n + 1, grads, device)), optim.ema_rate(optim.Config(), n), 1e-3 / (n + 1)
        if plainly:
            g = tree.map(lambda x: x.to(dtype), g)
            optim.clip_(g, 2.0, 1.0)
            state = optimizer.update_(params, g, state, lr)
            optim.ema_(ema, params, decay)
        else:
            state = optimizer.update_(params, g, state, lr, scale=0.5, ema=ema, decay=decay, low=copy)
    assert int(state.count) == updates
    return [params, state.m, state.v, ema, *([] if copy is None else [copy])]


SETTINGS = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1}
PLAIN = optim.adamw(**SETTINGS)
FUSED = adamw.fused(PLAIN, **SETTINGS)
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@DEVICES
@pytest.mark.parametrize("grads, low", [(FP32, None), (BF16, BF16)], ids=str)
def test_five_updates(grads, low, device):
    """As exact as the plain optimizer; the last bit may differ, see the kernel's docstring."""
    found = updated(FUSED, device=device, grads=grads, low=low)
    plain, exact = (updated(PLAIN, dtype, device, grads) for dtype in (FP32, torch.float64))
    for a, b, c in zip(found, plain, exact):
        for x, y, z in zip(*map(tree.leaves, (a, b, c))):
            assert relative(x, z) <= max(1.5 * relative(y, z), 1e-7)
    if low is not None:
        for p, copy in zip(tree.leaves(found[0]), tree.leaves(found[4])):
            cut_off = 1 if device == "cpu" else 0.5  # the interpreter does not round to nearest
            assert copy.dtype == low and (copy.float() - p).abs().le(cut_off * 2**-7 * p.abs()).all()


@DEVICES
def test_how_leaves_are_cut_does_not_change_a_bit(device):
    def cut(t):
        return {"a": list(t["a"].unbind()), "b": [*t["b"][0].split([1, 19999, 20000]), *t["b"][1:]]}

    whole, parts = (updated(FUSED, device=device, cut=c, low=FP16, updates=2) for c in (lambda t: t, cut))
    for a, b in zip(whole, parts):
        assert all(map(torch.equal, tree.leaves(cut(a)), tree.leaves(b)))


def test_gradients_stay_as_they_are_and_others_go_the_plain_way():
    grads = drawn(1)
    params = drawn(0)
    FUSED.update_(params, grads, FUSED.init(params), 1e-3, scale=0.5)
    assert all(map(torch.equal, tree.leaves(grads), tree.leaves(drawn(1))))
    for a, b in zip(*(updated(o, torch.float64, grads=torch.float64) for o in (FUSED, PLAIN))):
        assert all(map(torch.equal, tree.leaves(a), tree.leaves(b)))


# ---------------------------------------------------------------------------------------------------------------- plans


@pytest.fixture
def anywhere(monkeypatch):
    """Lets the CPU pass as a device for fused kernels."""
    monkeypatch.setattr(kernels, "obstacle", lambda device: None)


def small(tiny, **changes):
    model = dataclasses.replace(tiny.model, width=16, depth=1, qk_norm=True, positions="rotary", patch=4)
    return dataclasses.replace(tiny, model=model, **changes)


def test_a_run_with_fused_kernels_equals_one_without(anywhere, make_plan, tiny, digits):
    (batch,) = loader.batches(digits, KEY, global_batch=6, stop=1)
    found = []
    for choice in ("reference", "fused"):
        composed = make_plan(small(tiny, kernels=choice, global_batch=6))
        params = train.init_state(composed, KEY).params
        params = tree.map(lambda p: p + 0.1 * random.normal(KEY, p.shape), params)
        grads = train.gradients(composed, params, batch, KEY)
        state, step = train.init_state(composed, KEY)._replace(params=params), train.make_step(composed)
        for _ in range(2):
            state, _ = step(state, batch, KEY)
        found.append((*grads, state))
    assert "kernels: fused; reference attention (no GPU)" in composed.notes
    (loss, grads, word, state), (loss1, grads1, word1, state1) = found
    assert state.opt.count == state1.opt.count == 2
    for a, b in zip(*([*tree.leaves(s.ema), *tree.leaves(s.params)] for s in (state, state1)), strict=True):
        assert (a - b).abs().max() <= 1e-4  # two updates of at most the learning rate, 4e-3 after the warm-up's start
    assert torch.allclose(loss, loss1, rtol=1e-5) and word == word1
    for (path, a), b in zip(tree.items(grads), tree.leaves(grads1)):
        assert (a - b).norm() <= 1e-5 * a.norm() + 1e-7, path


def test_a_plan_of_memory_counts_what_they_keep(anywhere, make_plan, tiny):
    reference, fused = (memory.predict(make_plan(small(tiny, kernels=k))).peak for k in ("reference", "fused"))
    assert fused < reference


def test_the_record_has_them_and_is_always_the_same():
    record = kernels.fused(ops.flash())
    assert record.modulate is modulate and record.attend is ops.attend_sdpa
    assert record == kernels.fused(ops.flash())  # blocks are compiled once a record


def test_why_they_are_off_is_told(monkeypatch, make_plan, tiny):
    cpu = torch.device("cpu")
    assert kernels.obstacle(cpu) == "they need a GPU, and the device is cpu"
    notes = make_plan(tiny).notes
    assert "kernels: reference (auto; no fused ones: they need a GPU, and the device is cpu)" in notes
    with pytest.raises(ValueError, match=r"kernels is fused.*the device is cpu.*use --kernels auto or reference"):
        checks.check(dataclasses.replace(tiny, kernels="fused", device="cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernels.obstacle.__wrapped__(cpu) == "Triton is not installed"


def test_an_old_gpu_and_a_broken_triton_are_told_of(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0, and this one has 7.5" in kernels.obstacle.__wrapped__(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def broken(*args, **kwargs):
        raise RuntimeError("no C compiler\nand more about it")

    monkeypatch.setattr(torch, "zeros", broken)
    assert kernels.obstacle.__wrapped__(cuda) == "no C compiler"


def test_the_interpreter_leaves_triton_as_it_was():
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    before = (JITFunction.__call__, tl.core.load, tl.load, tl.core.reduce, tl.dtype.to_ir, tl.tensor.__dict__.copy())
    modulate(*inputs(KERNELS["modulate"], 1, 1, 64))
    after = (JITFunction.__call__, tl.core.load, tl.load, tl.core.reduce, tl.dtype.to_ir, tl.tensor.__dict__.copy())
    assert before == after


@pytest.mark.parametrize("kernel", [bias_gelu.bias_gelu, bias_gelu.reference])
def test_far_from_zero_gelu_is_finite(kernel):
    y = torch.tensor([-1e4, -30.0, -13.0, -0.0, 13.0, 1e4]).reshape(1, 6, 1).requires_grad_()
    h = kernel(y, torch.zeros(1, 1))
    (slope,) = torch.autograd.grad(h.sum(), y)
    torch.testing.assert_close(h.flatten(), torch.tensor([0.0, 0.0, 0.0, 0.0, 13.0, 1e4]), atol=1e-20, rtol=0)
    torch.testing.assert_close(slope.flatten(), torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0]), atol=1e-20, rtol=0)


@pytest.mark.parametrize("ndim", [2, 3])
def test_mlp_is_that_of_the_reference(ndim):
    shapes = {"fc1": {"w": (24, 8), "b": (24,)}, "fc2": {"w": (8, 24), "b": (8,)}}
    p = {k: {n: random.normal(random.fold_in(KEY, k, n), shape) for n, shape in v.items()} for k, v in shapes.items()}
    h = random.normal(KEY, (2, 5, 8)[-ndim:])
    leaves = [h.requires_grad_(), *(x.requires_grad_() for x in tree.leaves(p))]
    found, expected = (torch.autograd.grad(f(h, p).square().sum(), leaves) for f in (bias_gelu.mlp, ops.mlp))
    assert max(map(relative, found, expected)) < 1e-6
