"""The own attention of short samples against fp64: in Triton's interpreter on the CPU, and compiled on a GPU."""

import pytest
import torch
from conftest import normal
from torch.utils._python_dispatch import TorchDispatchMode

from odit import ops, random, remat

pytest.importorskip("triton")

from odit.kernels import heads, short_attention
from odit.kernels.short_attention import Tuning, attend, attend_packed

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
KEY = random.key(5)


def drawn(B, L, H, K, dtype=FP32, device="cpu"):
    """q, k and v as slices of one tensor, and what the output is used with."""
    qkv = normal(random.fold_in(KEY, "qkv"), (B, L, 3, H, K), device).to(dtype)
    return qkv, normal(random.fold_in(KEY, "do"), (B, L, H, K), device).to(dtype)


def everything(fn, qkv, do):
    """The output, and the gradients of q, k and v as one tensor."""
    qkv = qkv.detach().requires_grad_()
    o = fn(*qkv.unbind(2))
    return o.detach(), torch.autograd.grad(o, qkv, do.to(o))[0]


def relative(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


def assert_as_exact_as_eager(qkv, do):
    """At most 1.5 times the error of eager PyTorch in the same dtype, for o, dq, dk and dv each, or what rounding
    brings: that of the result, and in fp32 that of exponents of several units.

    Twice that in the interpreter's bf16, which cuts off where the GPU rounds to nearest.
    """
    K, cut_off = qkv.shape[-1], qkv.device.type == "cpu" and qkv.dtype == BF16
    found = everything(lambda q, k, v: attend(q, k, v, K**-0.5), qkv, do)
    eager, exact = everything(ops.attend, qkv, do), everything(ops.attend, qkv.double(), do.double())
    for a, b, c in zip(*((o, *d.unbind(2)) for o, d in (found, eager, exact)), strict=True):
        assert a.dtype == qkv.dtype and a.shape == c.shape
        size = c.norm() if c.norm() > 1e-9 * do.norm() else do.double().norm()  # one token's dq is 0
        bound = max(1.5 * float((b - c).norm() / size), torch.finfo(qkv.dtype).eps / 3, 4 * torch.finfo(FP32).eps)
        assert (a - c).norm() <= bound * (2 if cut_off else 1) * size


# ------------------------------------------------------------------------------------------------------------ numbers


SIZES = [(1, 1, 64), (2, 17, 72), (1, 64, 32), (1, 200, 72), (1, 256, 72), (1, 37, 112), (2, 16, 72), (1, 32, 40)]


@pytest.mark.parametrize("B, L, K, dtype", [(*size, (FP32, BF16)[i % 2]) for i, size in enumerate(SIZES)])
def test_outputs_and_gradients(B, L, K, dtype):
    assert_as_exact_as_eager(*drawn(B, L, 2 if L < 100 else 1, K, dtype))


WAYS = {
    "all keys at once": {"FORWARD": Tuning(16, 256, 2, 1, 4)},
    "keys in blocks": {"FORWARD": Tuning(32, 16, 1, 2, 4)},
    "blocks one by one": {"QUERIES": Tuning(32, 16, 1, 2, 4), "KEYS": Tuning(16, 32, 1, 2, 4)},
    "several a program": {"QUERIES": Tuning(16, 64, 2, 2, 4), "KEYS": Tuning(64, 16, 2, 2, 4)},
    "all of a head a program": {"QUERIES": Tuning(32, 16, 0, 2, 4), "KEYS": Tuning(16, 32, 0, 2, 4)},
}


@pytest.mark.parametrize("way", WAYS)
def test_however_it_is_cut(way, monkeypatch):
    for name, value in WAYS[way].items():
        monkeypatch.setattr(short_attention, name, value)
    assert_as_exact_as_eager(*drawn(1, 70, 2, 24))


@pytest.mark.parametrize("L", [11, 16, 17, 32, 50, 64])
def test_at_once_and_in_two_passes(L, monkeypatch):
    """A sample that is one block: one launch, and the numbers of two up to rounding."""
    assert len(short_attention.passes(L)) == 1
    qkv, do = drawn(1, L, 2, 24)
    found = everything(lambda q, k, v: attend(q, k, v, 0.2), qkv, do)
    monkeypatch.setattr(short_attention, "WHOLE", {})
    assert len(short_attention.passes(L)) == 2
    other = everything(lambda q, k, v: attend(q, k, v, 0.2), qkv, do)
    assert torch.equal(found[0], other[0]) and relative(found[1], other[1].double()) <= 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("B, L, K", [
    (8, 256, 72), (8, 250, 72), (3, 256, 64), (2, 1, 72), (2, 17, 32), (1, 512, 128),
    (8, 16, 72), (3, 11, 128), (8, 32, 64), (3, 64, 72), (2, 40, 128),
])  # fmt: skip
def test_outputs_and_gradients_on_a_gpu(B, L, K, dtype):
    assert_as_exact_as_eager(*drawn(B, L, 16, K, dtype, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("L, K", [(17, 72), (64, 64), (250, 72), (256, 64), (1021, 72)])
def test_its_own_forward_on_a_gpu(L, K, dtype):
    """Where Hopper takes cuDNN's for more than a few tokens, other GPUs take it."""
    q, k, v = drawn(3, L, 16, K, dtype, "cuda")[0].unbind(2)
    (o, lse), eager = short_attention.forward(q, k, v, K**-0.5), ops.attend(q, k, v)
    exact, exact_lse = ops.attend_lse(q.double(), k.double(), v.double())
    assert relative(o, exact) <= max(1.5 * relative(eager, exact), torch.finfo(dtype).eps / 3)
    assert relative(lse, exact_lse.transpose(1, 2)) <= 1e-5


@pytest.mark.parametrize("K, expected", [(8, (16,)), (32, (32,)), (64, (64,)), (72, (64, 16)), (96, (64, 32)),
                                         (112, (64, 32, 16)), (128, (128,))])  # fmt: skip
def test_the_parts_of_a_head(K, expected):
    assert heads.parts(K) == expected


@pytest.mark.parametrize("L", [1, 17, 64, 200, 256, 300])
@pytest.mark.parametrize("rows, steps", [(0, 0), (0, 1), (1, 1), (1, 2)])
def test_every_row_has_its_program(L, rows, steps):
    tuning, spans = short_attention.cut(Tuning(64, 128, steps, 2, 4), L, rows)
    span = tuning[rows] * tuning.steps
    assert spans * span >= L > (spans - 1) * span
    assert spans == 1 or steps


def test_large_scores_do_not_overflow():
    """Scores of some ten thousand, and some hundreds below zero: where tokens of a block are missing, 0 would be beyond
    all others. The errors are those of log-sum-exps of that size in fp32."""
    qkv, do = drawn(1, 33, 1, 16)
    apart = torch.stack((qkv[:, :, 0] + 10, qkv[:, :, 1] - 10, qkv[:, :, 2]), 2)
    for given, bound in ((40 * qkv, 1e-3), (apart, 1e-4)):
        found = everything(lambda q, k, v: attend(q, k, v, 0.25), given, do)
        exact = everything(ops.attend, given.double(), do.double())
        assert all(relative(a, c) <= bound for a, c in zip(found, exact))


def test_a_scale_of_ones_own():
    qkv, do = drawn(2, 9, 2, 16)
    found = everything(lambda q, k, v: attend(q, k, v, 0.4), qkv, do)
    expected = everything(lambda q, k, v: ops.attend(q * 1.6, k, v), qkv.double(), do.double())
    assert all(relative(a, c) <= 1e-6 for a, c in zip(found, expected))


def test_layouts_do_not_change_a_bit():
    """Slices of one tensor, transposed and whole ones, and columns apart; the output's gradient too."""
    qkv, do = drawn(1, 19, 2, 24)
    sliced = qkv.unbind(2)
    whole = [x.contiguous() for x in sliced]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in sliced]
    apart = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in sliced]
    found, turned_do = [], do.transpose(1, 2).contiguous().transpose(1, 2)
    for given in (sliced, whole, turned, apart, [sliced[0], turned[1], apart[2]]):
        given = [x.detach().requires_grad_() for x in given]
        o = attend(*given, 0.2)
        found.append([o, *torch.autograd.grad(o, given, turned_do if found else do)])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_packed_is_the_same():
    qkv, do = drawn(2, 19, 3, 24)
    leaf = qkv.detach().requires_grad_()
    o = attend_packed(leaf, 0.2)
    (dqkv,) = torch.autograd.grad(o, leaf, do)
    expected = everything(lambda q, k, v: attend(q, k, v, 0.2), qkv, do)
    assert torch.equal(o, expected[0]) and torch.equal(dqkv, expected[1]) and dqkv.is_contiguous()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_runs_give_the_same_bits(device):
    B, L, dtype = (1, 70, FP32) if device == "cpu" else (32, 256, BF16)
    qkv, do = drawn(B, L, 2, 72, dtype, device)
    first, second = (everything(lambda q, k, v: attend(q, k, v, 0.1), qkv, do) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_samples_and_heads_do_not_depend_on_each_other():
    qkv, do = drawn(3, 18, 2, 16)
    whole = everything(lambda q, k, v: attend(q, k, v, 0.25), qkv, do)
    one = everything(lambda q, k, v: attend(q, k, v, 0.25), qkv[1:2, ..., 1:, :], do[1:2, :, 1:])
    assert torch.equal(whole[0][1:2, :, 1:], one[0]) and torch.equal(whole[1][1:2, ..., 1:, :], one[1])


def test_lse_has_gradients_too():
    qkv, do = drawn(2, 18, 2, 16)
    dlse = random.normal(random.fold_in(KEY, "dlse"), (2, 2, 18))

    def used(fn, x):
        x = x.detach().requires_grad_()
        o, lse = fn(*x.unbind(2))
        return lse.detach(), *torch.autograd.grad((o * do.to(o)).sum() + (lse * dlse.to(o)).sum(), x)

    def reference(q, k, v):
        o, lse = ops.attend_lse(q, k, v)
        return o, lse.transpose(1, 2)

    found = used(lambda q, k, v: short_attention.run(q, k, v, 0.25), qkv)
    assert all(relative(a, c) <= 1e-6 for a, c in zip(found, used(reference, qkv.double())))


def test_what_the_kernels_do_not_take_goes_to_the_reference():
    qkv, _ = drawn(1, 3, 1, 16)
    mixed = [qkv[:, :, 0].bfloat16(), *qkv.unbind(2)[1:]]
    cases = [
        (*qkv.double().unbind(2), 0.25),
        (*qkv.unbind(2), -0.25),
        (*(x.repeat(1, 1, 1, 10) for x in qkv.unbind(2)), 0.25),  # K = 160
    ]
    for case in cases:
        assert not short_attention.takes(case[3], *case[:3])
        assert torch.equal(attend(*case), short_attention.plain(*case))
    assert not short_attention.takes(0.25, *mixed)
    assert not short_attention.takes(0.25, *torch.empty(1, 3, 2048, 1, 16).unbind(1))


def test_the_empty_share_of_a_rank():
    qkv = torch.zeros(2, 0, 3, 2, 16, requires_grad=True)
    o = attend_packed(qkv, 0.25)
    assert o.shape == (2, 0, 2, 16) and torch.autograd.grad(o.sum(), qkv)[0].shape == qkv.shape


# ----------------------------------------------------------------------------------------------- samples along two dims


def along_two_dims(x, inside):
    """(B, S, L, ...), the tokens of a sample side by side in memory or, ``inside``, the samples."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if inside else x.contiguous()


@pytest.mark.parametrize(
    "device, size", [("cpu", (2, 3, 9, 2, 24)), pytest.param("cuda", (2, 70, 16, 16, 72), marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("inside", [True, False])
def test_samples_along_two_dims_are_read_and_written_where_they_lie(device, size, inside):
    B, S, L, H, K = size
    qkv, do = (x.unflatten(0, (B, S)) for x in drawn(B * S, L, H, K, BF16 if device == "cuda" else FP32, device))
    leaf = qkv.flatten(0, 1).requires_grad_()
    expected = attend_packed(leaf, 0.2)
    (dqkv,) = torch.autograd.grad(expected, leaf, do.flatten(0, 1))
    expected, dqkv = (x.detach().unflatten(0, (B, S)) for x in (expected, dqkv))

    whole = along_two_dims(qkv, inside).requires_grad_()
    o = attend_packed(whole, 0.2)
    (found,) = torch.autograd.grad(o, whole, along_two_dims(do, not inside))
    assert torch.equal(o, expected) and torch.equal(found, dqkv)
    for x in (o, found):
        assert (x.transpose(1, 2) if inside else x).is_contiguous()

    slices = [along_two_dims(x, inside).requires_grad_() for x in qkv.unbind(-3)]
    o = attend(*slices, 0.2)
    assert torch.equal(o, expected)
    assert all(map(torch.equal, torch.autograd.grad(o, slices, do), dqkv.unbind(-3)))


def test_transforms_of_samples_along_two_dims():
    qkv, do = (along_two_dims(x.unflatten(0, (2, 2)), True) for x in drawn(4, 5, 2, 16))
    change = along_two_dims(drawn(4, 5, 2, 16)[0].flip(0).unflatten(0, (2, 2)), True)

    def used(fn, x, w):
        return (fn(x) * w).sin().sum()

    def results(fn):
        grads = torch.func.vmap(torch.func.grad(lambda x, w: used(fn, x[None], w)))(qkv, do)
        return grads, *torch.func.jvp(torch.func.grad(lambda x: used(fn, x, do)), (qkv,), (change,))

    for a, b in zip(results(lambda x: attend_packed(x, 0.25)), results(lambda x: ops.attend(*x.unbind(-3)))):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- transforms


def test_vmap_of_gradients():
    """Gradients a sample, as validation's gradient norms."""
    qkv, do = drawn(2, 5, 1, 16)

    def gradient(fn):
        return torch.func.vmap(torch.func.grad(lambda x, w: (fn(x[None]) * w).sin().sum()))(qkv, do)

    found, expected = (gradient(fn) for fn in (lambda x: attend_packed(x, 0.25), lambda x: ops.attend(*x.unbind(2))))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True], ids=["slices", "packed"])
def test_jvp_and_second_derivatives(whole):
    qkv, do = drawn(1, 7, 2, 16)
    change = random.normal(random.fold_in(KEY, "change"), qkv.shape)
    own = (lambda x: attend_packed(x, 0.25)) if whole else (lambda x: attend(*x.unbind(2), 0.25))

    def slope(fn):
        return torch.func.grad(lambda x: (fn(x) * do).sin().sum())

    def both(fn):
        return torch.func.jvp(fn, (qkv,), (change,))[1], torch.func.jvp(slope(fn), (qkv,), (change,))[1]

    for a, b in zip(both(own), both(lambda x: ops.attend(*x.unbind(2)))):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize(
    "device, L", [("cpu", 9), *(pytest.param("cuda", L, marks=pytest.mark.gpu) for L in (16, 256))]
)
@pytest.mark.parametrize("whole", [False, True], ids=["slices", "packed"])
def test_selective_recomputing_keeps_what_it_gives(whole, device, L):
    """The forward pass runs once, and not again in backward as the rest does; the same bits."""
    dtype = BF16 if device == "cuda" else FP32
    qkv, do = drawn(2, L, 2, 16, dtype, device)
    name = "short_attention_packed" if whole else "short_attention"
    runs = []

    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            runs.append(func.name())
            return func(*args, **(kwargs or {}))

    def block(p, x):
        x = (x * p).tanh()
        return (attend_packed(x, 0.25) if whole else attend(*x.unbind(2), 0.25)) * 2

    def used(fn):
        p = torch.ones((), dtype=dtype, device=device, requires_grad=True)
        o = fn(p, qkv)
        runs.clear()
        with Counts():
            (dp,) = torch.autograd.grad(o, p, do)
        return o.detach(), dp

    expected, found = used(block), used(remat.selective(block))
    assert all(map(torch.equal, found, expected))
    assert runs.count(f"odit::{name}_backward") == 1 and f"odit::{name}" not in runs and "aten::tanh" in runs


GRAD_LOOKED_AT = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by PyTorch itself


@GRAD_LOOKED_AT
@pytest.mark.parametrize("name", ["short_attention", "short_attention_packed"])
@pytest.mark.parametrize("dims", [1, 2])
def test_the_registered_operators(name, dims):
    qkv, do = drawn(2, 5, 1, 16)
    if dims == 2:
        qkv, do = (along_two_dims(x.unflatten(0, (1, 2)), True) for x in (qkv, do))
    given = [qkv] if name.endswith("packed") else [x.clone() for x in qkv.unbind(-3)]
    given = [x.detach().requires_grad_() for x in given]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(getattr(torch.ops.odit, name).default, (*given, 0.25), test_utils=tests)
    with torch.no_grad():
        o, lse = getattr(torch.ops.odit, name)(*given, 0.25)
    backward = getattr(torch.ops.odit, f"{name}_backward").default
    args = (do, torch.zeros_like(lse), *(x.detach() for x in given), o, lse, 0.25)
    torch.library.opcheck(backward, args, test_utils=("test_schema", "test_faketensor"))


@GRAD_LOOKED_AT
def test_compiled_it_is_one_operator():
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def seen(graph, _):
        graphs.append([str(n.target) for n in graph.graph.nodes if "odit" in str(n.target)])
        return make_boxed_func(graph)

    qkv, do = drawn(2, 5, 2, 16)
    torch._dynamo.reset()
    compiled = torch.compile(attend_packed, backend=aot_autograd(fw_compiler=seen, bw_compiler=seen), fullgraph=True)
    found = []
    for fn in (compiled, attend_packed):
        leaf = qkv.detach().requires_grad_()
        o = fn(leaf, 0.25)
        found.append((o, *torch.autograd.grad(o, leaf, do)))
    assert all(map(torch.equal, *found))
    assert graphs == [["odit.short_attention_packed.default"], ["odit.short_attention_packed_backward.default"]]
