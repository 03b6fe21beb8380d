"""Linear layers whose bias gets its gradient by a kernel: against fp64, plain PyTorch, and under every transform."""

import functools
from types import SimpleNamespace

import pytest
import torch
from conftest import need, normal
from test_remat import Counts

from odit import memory, ops, random, remat, tree

pytest.importorskip("triton")

from odit import kernels
from odit.kernels import linear as module
from odit.kernels import qkv, quack
from odit.kernels.linear import column_sums, linear, sums
from odit.models import dit

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
KEY = random.key(7)
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
LOOKED_AT = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by PyTorch itself
plain = torch.nn.functional.linear


def drawn(name, *shape, dtype=FP32, device="cpu"):
    return normal(random.fold_in(KEY, name), shape, device).to(dtype)


def layer(B=2, L=5, D=8, out=6, **how):
    return drawn("x", B, L, D, **how), drawn("w", out, D, **how), drawn("b", out, **how)


def gradients(fn, given):
    """The output and the gradients of a layer."""
    leaves = [x.detach().requires_grad_() for x in given]
    y = fn(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, drawn("dy", *y.shape, dtype=y.dtype, device=y.device))


# ----------------------------------------------------------------------------------------------------------------- sums


def assert_sums(rows, width, dtype, device, groups=1):
    """As exact as rounding allows: fp32 sums, of ``rows`` values each, then one rounding to the dtype.

    The interpreter cuts off what does not fit in bf16 where the GPU rounds to nearest: twice the error.
    """
    x = drawn("x", groups, rows, width, dtype=dtype, device=device)
    found, exact = column_sums(x), x.double().sum(1)
    assert found.dtype == dtype and found.shape == (groups, width)
    rounding = torch.finfo(dtype).eps * (1 if (device, dtype) == ("cpu", BF16) else 0.5)
    summing = torch.finfo(FP32).eps * x.double().abs().sum(1)
    assert ((found.double() - exact).abs() <= rounding * exact.abs() + summing + torch.finfo(dtype).tiny).all()


@pytest.mark.every(7)
@DTYPES
@pytest.mark.parametrize("width", [1, 72, 384, 1152, 3456])
@pytest.mark.parametrize("rows", [1, 17, 1021])
def test_sums(rows, width, dtype):
    assert_sums(rows, width, dtype, "cpu")


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("width", [1, 72, 384, 1152, 3456])
@pytest.mark.parametrize("rows", [1, 17, 1021, 32768, 65536])
@pytest.mark.parametrize("groups", [1, 3])
def test_sums_on_a_gpu(groups, rows, width, dtype):
    assert_sums(rows, width, dtype, "cuda", groups)


def test_the_shapes_of_these_tests_have_several_spans_steps_and_blocks(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "launch", lambda kernel, programs, *args, **constants: seen.append((args, constants)))
    monkeypatch.setattr(module, "totals", lambda partial, dtype: partial)  # which holds whatever was there
    column_sums(torch.empty(1, 1021, 384))
    (*_, spans, blocks, _, _), constants = seen[0]
    assert spans > 1 and blocks > 1 and constants["STEPS"] > 1


def test_a_rank_without_heads_has_no_columns():
    """As under fastseq or megatron on more ranks than heads."""
    x, w, b = drawn("x", 2, 5, 8), drawn("w", 0, 8), drawn("b", 0)
    given = [y.requires_grad_() for y in (x, w, b)]
    assert [g.abs().sum() for g in torch.autograd.grad(linear(*given).sum(), given)] == [0, 0, 0]


def test_rows_apart_columns_apart_and_none():
    x = drawn("x", 2, 40, 6, 96)
    expected = column_sums(x[:, :, 2].contiguous())
    assert torch.equal(column_sums(x[:, :, 2]), expected)
    assert torch.equal(column_sums(x[:, :, 2].transpose(1, 2).contiguous().transpose(1, 2)), expected)
    assert torch.equal(column_sums(x[:, :0, 2]), torch.zeros(2, 96))


def test_groups_do_not_depend_on_each_other():
    """The cut into spans is another one, and with it the order."""
    x = drawn("x", 3, 100, 64)
    for one, found in zip(x, column_sums(x)):
        torch.testing.assert_close(found, column_sums(one[None])[0])


@DEVICES
def test_two_runs_give_the_same_bits(device):
    x = drawn("x", 1, 1021, 384, dtype=BF16, device=device)
    assert torch.equal(column_sums(x), column_sums(x))


# ---------------------------------------------------------------------------------------------------------------- layer


@DTYPES
@DEVICES
@pytest.mark.parametrize("shape", [(7,), (2, 5), (3, 2, 4)], ids=str)
def test_all_but_the_bias_is_as_pytorch_has_it(shape, dtype, device):
    _, w, b = layer(dtype=dtype, device=device)
    given = drawn("x", *shape, 8, dtype=dtype, device=device), w, b
    *found, db = gradients(linear, given)
    *expected, db1 = gradients(plain, given)
    assert all(map(torch.equal, found, expected))
    assert db.dtype == dtype and (db.float() - db1.float()).norm() <= 2 * torch.finfo(dtype).eps * db1.float().norm()


def test_what_the_kernel_does_not_serve_is_plain(monkeypatch):
    def never(*args):
        raise AssertionError

    monkeypatch.setattr(module, "credit", never)
    x, w, b = layer()
    assert torch.equal(linear(x, w), plain(x, w))
    assert torch.equal(linear(x, w.requires_grad_(), b), plain(x, w, b))  # a frozen bias
    with torch.no_grad():
        linear(x, w, b.requires_grad_())
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    assert all(map(torch.equal, gradients(linear, wide), gradients(plain, wide)))


def test_nothing_is_kept_for_the_bias():
    def kept(fn):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(x.shape), lambda x: x):
            fn(*(t.requires_grad_() for t in layer()))
        return shapes

    assert kept(linear) == kept(plain)


# ----------------------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize("dims", [(0, None, None), (0, None, 0), (None, None, 0), (0, 0, 0), (1, None, 1)], ids=str)
def test_vmap_of_gradients_and_gradients_of_vmap(dims):
    """The first as validation's gradient norms: samples mapped, weights shared."""
    given = [t if dim is None else drawn(f"mapped {n}", 3, *t.shape).movedim(0, dim)
             for n, (t, dim) in enumerate(zip(layer(), dims))]  # fmt: skip
    for a, b in zip(*(per_sample(fn, given, dims) for fn in (linear, plain))):
        torch.testing.assert_close(a, b)
    for a, b in zip(*(through(fn, given, dims) for fn in (linear, plain))):
        torch.testing.assert_close(a, b)


def per_sample(fn, given, dims):
    return torch.func.vmap(torch.func.grad(lambda *args: fn(*args).sin().sum(), (0, 1, 2)), dims)(*given)


def through(fn, given, dims):
    return torch.func.grad(lambda *args: torch.func.vmap(fn, dims)(*args).sin().sum(), (0, 1, 2))(*given)


def test_nested_vmaps_of_one_bias():
    """Its gradients for each of three outputs, for each of two inputs."""
    x, w, b = layer()

    def slopes(fn):
        return torch.func.vmap(lambda one: torch.func.jacrev(lambda b: fn(one, w, b).sin().sum(0))(b))(x)

    torch.testing.assert_close(slopes(linear), slopes(plain))


@pytest.mark.parametrize("wants", [False, True])
def test_jvp(wants):
    given = layer()
    tangents = tuple(drawn(f"tangent {n}", *t.shape) for n, t in enumerate(given))
    given[2].requires_grad_(wants)
    found, expected = (torch.func.jvp(fn, given, tangents)[1] for fn in (linear, plain))
    torch.testing.assert_close(found, expected)


def test_second_derivatives():
    given = layer()

    def slope(fn, *args):
        grads = torch.func.grad(lambda *args: fn(*args).sin().sum(), (0, 1, 2))(*args)
        return sum(g.cos().sum() for g in grads)

    for a, b in zip(*(torch.func.grad(functools.partial(slope, fn), (0, 1, 2))(*given) for fn in (linear, plain))):
        torch.testing.assert_close(a, b)
    found, expected = (torch.func.jvp(functools.partial(slope, fn), given, given)[1] for fn in (linear, plain))
    torch.testing.assert_close(found, expected)


def test_sums_are_linear():
    x, dx = drawn("x", 2, 5, 8), drawn("dx", 2, 5, 8)
    assert torch.equal(torch.func.jvp(sums.apply, (x,), (dx,))[1], column_sums(dx))
    assert torch.autograd.gradcheck(lambda x: sums.apply(x.float()).double(), x.double().requires_grad_(), eps=1e-2)


# -------------------------------------------------------------------------------------------------------------- compile


def test_the_registered_operator():
    torch.library.opcheck(
        torch.ops.odit.column_sums.default, (drawn("x", 2, 5, 8),), test_utils=("test_schema", "test_faketensor")
    )


@LOOKED_AT
def test_compiled_products_are_pytorch_s_and_the_sum_is_one_operator():
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def seen(graph, _):
        names = [str(n.target).split(".")[1] for n in graph.graph.nodes if n.op == "call_function"]
        graphs.append(sorted(name for name in names if name in ("addmm", "mm", "sum", "column_sums", "clone")))
        return make_boxed_func(graph)

    torch._dynamo.reset()
    compiled = torch.compile(linear, backend=aot_autograd(fw_compiler=seen, bw_compiler=seen), fullgraph=True)
    assert all(map(torch.equal, gradients(compiled, layer()), gradients(linear, layer())))
    assert graphs == [["addmm"], ["column_sums", "mm", "mm"]]


# --------------------------------------------------------------------------------------------------------------- record


def run_block(record, wrap=lambda block: block):
    """A block's output and gradients, and the operators of its backward pass."""
    cfg = dit.Config(width=16, heads=2)
    params = tree.map_with_path(lambda path, p: drawn(path, *p.shape) * 0.3, dit.declare_block(cfg))
    given = (drawn("x", 3, 10, 16), drawn("c", 3, 16), *tree.leaves(params))
    leaves = [leaf.detach().requires_grad_() for leaf in given]
    y = wrap(dit.make_block(cfg, record))(tree.unflatten(params, leaves[2:]), leaves[0], leaves[1], ())
    with Counts() as counts:
        grads = torch.autograd.grad(y.square().sum(), leaves)
    return [y, *grads], counts.calls


def test_a_block_of_the_record(monkeypatch):
    """The biases of fc2, out and qkv go to the kernel, once each; all gradients are the reference's."""
    seen = []
    monkeypatch.setattr(sums, "apply", lambda x, real=sums.apply: seen.append(x.shape) or real(x))
    for a, b in zip(run_block(kernels.fused(ops.Ops()))[0], run_block(ops.Ops())[0], strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm().clamp(min=1e-2)
    assert seen == [(1, 30, 16), (1, 30, 16), (1, 30, 48)]


def test_recomputing_repeats_no_product():
    record = kernels.fused(ops.Ops())
    (found, again), (expected, backward) = run_block(record, remat.selective), run_block(record)
    assert all(map(torch.equal, found, expected))
    assert again["addmm"] == backward["addmm"] == 0 and again["mm"] == backward["mm"] > 0


@LOOKED_AT
@pytest.mark.parametrize("wrap", [lambda block: block, remat.selective], ids=["whole", "selective"])
def test_a_compiled_block(wrap):
    torch._dynamo.reset()
    record = kernels.fused(ops.Ops())
    compiled = run_block(record, lambda block: torch.compile(wrap(block), backend="aot_eager", fullgraph=True))[0]
    for a, b in zip(compiled, run_block(record)[0], strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm().clamp(min=1e-2)


def test_some_heads_of_a_larger_weight():
    h, p = drawn("h", 2, 5, 8), {"w": drawn("w", 3, 4, 6, 8)[:, 1:3], "b": drawn("b", 3, 4, 6)[:, 1:3]}
    leaves = [t.detach().requires_grad_() for t in (h, p["w"], p["b"])]
    given = {"w": leaves[1], "b": leaves[2]}
    found, expected = (torch.autograd.grad(sum(x.sin().sum() for x in fn(h, given, ())), leaves[1:])
                       for fn in (qkv.qkv, ops.qkv))  # fmt: skip
    assert not leaves[1].is_contiguous()
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


def test_a_plan_of_memory_weighs_it():
    """On meta tensors nothing runs, and partial sums are all there is beside the gradient."""
    x = torch.empty(1, 4096, 1152, dtype=BF16, device="meta")
    with memory.Weigh([x]) as weigh:
        column_sums(x)
    assert 2 * 1152 < weigh.peak < x.nbytes / 10


# ---------------------------------------------------------------------------------------------------- without gradients


def test_another_librarys_product_is_taken_without_gradients_where_it_is_faster(monkeypatch):
    x, w, b = layer()
    calls = []

    def product(x_MK, w_KN, y_MN, bias):
        calls.append(x_MK.shape)
        y_MN.copy_(plain(x_MK, w_KN.t(), bias))

    monkeypatch.setattr(quack, "library", lambda: SimpleNamespace(plain=product))
    many = torch.empty(quack.ROWS, 192, dtype=BF16), torch.empty(192, 192, dtype=BF16)
    with torch.no_grad():
        assert not quack.faster(*many)  # on a CPU
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(quack, "obstacle", lambda *given: None)
        assert quack.faster(*many)
        for x_, w_ in ((many[0][1:], many[1]), (many[0].float(), many[1].float()), (many[0], many[1][1:])):
            assert not quack.faster(x_, w_)
        for shape in ((0, 192), (192, 0)):  # a rank without heads
            assert not quack.faster(torch.empty(quack.ROWS, shape[1], dtype=BF16), torch.empty(shape, dtype=BF16))
    assert not quack.faster(*many)  # gradients may be wanted
    monkeypatch.undo()
    monkeypatch.setattr(quack, "library", lambda: SimpleNamespace(plain=product))
    monkeypatch.setattr(quack, "faster", lambda *given: not torch.is_grad_enabled())
    with torch.no_grad():
        assert torch.equal(linear(x, w, b), plain(x, w, b)) and torch.equal(linear(x, w), plain(x, w))
    assert calls == [(10, 8)] * 2
    assert torch.equal(linear(x, w, b.requires_grad_()), plain(x, w, b)) and len(calls) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_another_librarys_product_on_a_gpu(dtype):
    """Error at most 1.5 times PyTorch's, the same bits twice, and it is taken, but not where something maps over it."""
    x, w, b = layer(2, quack.ROWS, 1152, 3456, dtype=dtype, device="cuda")
    need(quack.obstacle(torch.device("cuda"), dtype))
    w = w / 34
    with torch.no_grad():
        for given in ((x, w, b), (x, w), (x, w[192:])):
            exact = plain(*(t.double() for t in given))
            error, pytorchs = ((y.double() - exact).norm() for y in (quack.linear(*given), plain(*given)))
            assert quack.faster(*given) and error <= 1.5 * pytorchs
            assert torch.equal(linear(*given), quack.linear(*given))
        mapped = torch.func.vmap(lambda x: linear(x, w))(x[None])[0]
        exact = plain(x.double(), w.double())
        assert (mapped.double() - exact).norm() <= 1.5 * (plain(x, w).double() - exact).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("K, N", [(1152, 3456), (1152, 1152), (4608, 1152)])
def test_another_librarys_product_has_pytorchs_bits(K, N):
    """For the layers of DiT-XL/2: the first pass of ``remat block`` takes one, the second the other."""
    x, w, b = layer(2, quack.ROWS // 2, K, N, dtype=BF16, device="cuda")
    need(quack.obstacle(torch.device("cuda"), BF16))
    with torch.no_grad():
        assert torch.equal(quack.linear(x, w, b), plain(x, w, b))
