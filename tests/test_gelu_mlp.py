"""The mlp with GELU in its products: against the plain one in fp64 on a CPU, and against fp64 on a GPU."""

import sys

import pytest
import torch
from conftest import need, normal

from odit import ops, random, remat
from odit.kernels import bias_gelu, gelu_mlp, quack

KEY = random.key(9)
SITES = {"kept": gelu_mlp.mlp, "lean": gelu_mlp.lean_mlp}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def drawn(B, L, D, F, dtype=torch.float64, device="cpu", bias=True):
    """Tokens, the mlp's parameters and a cotangent."""

    def leaf(name, *shape, std=1.0):
        return (std * normal(random.fold_in(KEY, name), shape, device)).to(dtype)

    p = {
        "fc1": {"w": leaf("w1", F, D, std=D**-0.5), "b": leaf("b1", F)},
        "fc2": {"w": leaf("w2", D, F, std=F**-0.5), "b": leaf("b2", D)},
    }
    if not bias:
        del p["fc2"]["b"]
    return leaf("h", B, L, D), p, leaf("dy", B, L, D)


def leaves(p):
    return [x for layer in p.values() for x in layer.values()]


def everything(mlp, h, p, dy, wanted=None):
    """What it gives and the gradients of its input and parameters, or of those at ``wanted``."""
    ends = [x.detach().requires_grad_(wanted is None or i in wanted) for i, x in enumerate([h, *leaves(p)])]
    given = iter(ends[1:])
    y = mlp(ends[0], {layer: {name: next(given) for name in found} for layer, found in p.items()})
    return [y.detach(), *torch.autograd.grad(y, [x for x in ends if x.requires_grad], dy)]


def distance(a, b):
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("B, L, D, F, bias", [(1, 1, 8, 16, True), (3, 5, 12, 48, True), (2, 7, 8, 24, False)])
def test_it_is_the_plain_one(site, B, L, D, F, bias):
    args = drawn(B, L, D, F, bias=bias)
    for found, expected in zip(everything(SITES[site], *args), everything(ops.mlp, *args), strict=True):
        assert distance(found, expected) <= 1e-14


@pytest.mark.parametrize("wanted", [{0}, {1}, {2, 3}, {4}, {0, 2}])
def test_the_rest_is_right_where_some_is_frozen(wanted):
    args = drawn(2, 3, 8, 16)
    for found, expected in zip(
        everything(gelu_mlp.mlp, *args, wanted), everything(ops.mlp, *args, wanted), strict=True
    ):
        assert distance(found, expected) <= 1e-14


@pytest.mark.parametrize("site", SITES)
def test_it_is_one_operator_when_compiled(site):
    args = drawn(2, 3, 8, 16)
    compiled = torch.compile(SITES[site], backend="aot_eager", fullgraph=True)
    for found, expected in zip(everything(compiled, *args), everything(ops.mlp, *args), strict=True):
        assert distance(found, expected) <= 1e-14


def test_selective_recomputation_runs_no_product_again(monkeypatch):
    h, p, dy = drawn(2, 3, 8, 16)
    count, plain = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: count.append(1) or plain(*args))
    found = everything(lambda x, p: remat.selective(lean_block)(p, x), h, p, dy)
    assert len(count) == 2
    for a, b in zip(found, everything(ops.mlp, h, p, dy), strict=True):
        assert distance(a, b) <= 1e-14
    assert gelu_mlp.site("selective") is gelu_mlp.lean_mlp and gelu_mlp.site("none") is gelu_mlp.mlp


def lean_block(p, x):
    return gelu_mlp.lean_mlp(x, p)


# what trains -> sizes of what a layer keeps beside its weights: x 48, z 96, h 96
KEPT = {
    "all": ((0, 1, 2, 3, 4), [48, 96, 96], [0, 48, 96]),
    "fc1": ((1, 2), [48, 96], [48, 96]),
    "fc2": ((3, 4), [96, 96], [0, 96]),
    "nothing of it": ((0,), [96], [96]),
}


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("what", KEPT)
def test_what_is_kept(site, what):
    h, p, _ = drawn(2, 3, 8, 16)
    wanted, kept_, lean = KEPT[what]
    ends = [x.requires_grad_(i in wanted) for i, x in enumerate([h, *leaves(p)])]
    weights, kept = {x.data_ptr() for x in ends[1:]}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        SITES[site](h, p)
    assert sorted(x.numel() for x in kept if x.data_ptr() not in weights) == (lean if site == "lean" else kept_)


@pytest.mark.parametrize("site", SITES)
def test_a_gradient_that_is_none_stays_none(site):
    class Nothing(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, d: None)

    h, p, _ = drawn(2, 3, 8, 16)
    y = Nothing.apply(SITES[site](h.requires_grad_(), p))
    assert torch.autograd.grad(y.sum(), [h], allow_unused=True) == (None,)


def test_where_it_does_not_serve_the_other_one_does(monkeypatch):
    h, p, dy = drawn(2, 3, 8, 16)
    calls = []
    monkeypatch.setattr(bias_gelu, "mlp", lambda h, p: calls.append(1) or ops.mlp(h, p))
    with torch.no_grad():
        gelu_mlp.mlp(h, p)
    torch.func.jvp(lambda h: gelu_mlp.mlp(h, p), (h,), (dy,))
    torch.func.vmap(lambda h: gelu_mlp.mlp(h, p))(h[:, None])
    gated = p | {"gate": p["fc1"]}
    gelu_mlp.mlp(h, gated)
    assert len(calls) == 4
    gelu_mlp.mlp(h, p)
    assert len(calls) == 4


@pytest.mark.parametrize(
    "cut, stays",
    [
        (lambda x: x[:, :32], True),
        (lambda x: x[2:, 8:], True),
        (lambda x: x[:, 4:36], False),
        (lambda x: x.view(-1)[: 8 * 33].view(8, 33)[:, :32], False),
        (lambda x: x.t(), False),
        (lambda x: x[0, 16:32], True),
        (lambda x: x[0, 3:19], False),
    ],
)
def test_rows_that_start_anywhere_are_copied(cut, stays):
    x = cut(torch.arange(640.0).view(16, 40))
    found = quack.aligned(x)
    assert torch.equal(found, x) and (found is x) == stays


def test_what_decides_is_traced_when_compiled():
    wide, narrow = (torch.zeros(4, n, dtype=torch.bfloat16) for n in (16, 12))
    asked = torch.compile(lambda *xs: xs[0] + quack.takes(*xs), backend="aot_eager", fullgraph=True)
    for args, served in ((wide, wide), True), ((wide, narrow), False), ((wide, wide.float()), False):
        assert asked(*args)[0, 0].item() == served == quack.takes(*args)


MLP = gelu_mlp.Mlp("gelu", 64, 256)


@pytest.mark.parametrize(
    "capability, dtype, mlp, why",
    [
        ((9, 0), torch.bfloat16, MLP, None),
        ((9, 0), torch.float32, MLP, "float32 is not half precision"),
        ((8, 0), torch.bfloat16, MLP, "not measured on compute capability 8.0"),
        ((9, 0), torch.bfloat16, gelu_mlp.Mlp("swiglu", 64, 256), "model.mlp is swiglu"),
        ((9, 0), torch.bfloat16, gelu_mlp.Mlp("gelu", 60, 240), "width 60 or ffn 240 is no multiple of 8"),
        ((9, 0), torch.bfloat16, gelu_mlp.Mlp("gelu", 64, 256, 4), None),
        (
            (9, 0),
            torch.bfloat16,
            gelu_mlp.Mlp("gelu", 64, 256, 3),
            "width 64 or ffn 256 over 3 ranks is no multiple of 8",
        ),
    ],
)
def test_where_it_serves(capability, dtype, mlp, why):
    assert gelu_mlp.serves(capability, dtype, mlp) == why


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(quack, "library", quack.library.__wrapped__)
    monkeypatch.setattr(quack, "missing", quack.missing.__wrapped__)
    monkeypatch.setitem(sys.modules, "quack", None)
    device = torch.device("cuda")
    found, line = gelu_mlp.chosen(ops.Ops(), device, torch.bfloat16, MLP, "none")
    assert found == ops.Ops() and line == "GELU beside the products of the mlp (quack-kernels is not installed)"
    monkeypatch.setattr(quack, "library", lambda: {}["x"])
    assert gelu_mlp.obstacle(device, torch.bfloat16, MLP) == "quack-kernels cannot be loaded (KeyError)"
    monkeypatch.setattr(quack, "library", lambda: None)
    found, line = gelu_mlp.chosen(ops.Ops(), device, torch.bfloat16, MLP, "selective")
    assert found.mlp is gelu_mlp.lean_mlp and line == "GELU in the products of the mlp (quack-kernels)"


@pytest.mark.gpu
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("B, L, D", [(1, 1, 128), (2, 17, 384), (5, 256, 1152), (2, 1021, 1536)])
def test_numbers_on_a_gpu(site, precision, B, L, D):
    """At most 1.5 times the error of eager, and the same bits twice."""
    device, dtype = torch.device("cuda"), HALF[precision]
    need(gelu_mlp.obstacle(device, dtype, gelu_mlp.Mlp("gelu", D, 4 * D)))
    args = drawn(B, L, D, 4 * D, dtype, device)
    h, p, dy = args
    exact = everything(
        ops.mlp, h.double(), {k: {n: x.double() for n, x in v.items()} for k, v in p.items()}, dy.double()
    )
    found, again, eager = (everything(mlp, *args) for mlp in (SITES[site], SITES[site], ops.mlp))
    for a, b, c, d in zip(found, again, eager, exact, strict=True):
        assert torch.equal(a, b)
        assert distance(a, d) <= max(1.5 * distance(c, d), torch.finfo(dtype).eps / 3)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", HALF)
def test_pictures_on_a_gpu(precision):
    """Without gradients, of many rows and of few."""
    dtype = HALF[precision]
    need(gelu_mlp.obstacle(torch.device("cuda"), dtype, MLP))
    for L in (16, gelu_mlp.LEAST, quack.ROWS):
        h, p, _ = drawn(2, L, 128, 512, dtype, "cuda")
        double = {layer: {name: x.double() for name, x in found.items()} for layer, found in p.items()}
        with torch.no_grad():
            exact = ops.mlp(h.double(), double)
            assert distance(gelu_mlp.mlp(h, p), exact) <= 1.5 * distance(ops.mlp(h, p), exact)


@pytest.mark.gpu
def test_part_of_a_weight_on_a_gpu():
    """As a rank of megatron has it: rows of fc1 and columns of fc2, the last ones where no row may start."""
    need(gelu_mlp.obstacle(torch.device("cuda"), torch.bfloat16, MLP))
    h, p, dy = drawn(2, 64, 128, 512, torch.bfloat16, "cuda")
    for part in (slice(0, 256), slice(256, 512), slice(4, 260)):
        mine = {
            "fc1": {"w": p["fc1"]["w"][part], "b": p["fc1"]["b"][part]},
            "fc2": {"w": p["fc2"]["w"][:, part], "b": p["fc2"]["b"]},
        }
        for found, expected in zip(
            everything(gelu_mlp.mlp, h, mine, dy), everything(ops.mlp, h, mine, dy), strict=True
        ):
            assert distance(found, expected.double()) <= 0.01
