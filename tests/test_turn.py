"""The turn between space and time against a transposed copy: in Triton's interpreter, and compiled on a GPU."""

import pytest
import torch
from conftest import normal

from odit import ops, random

pytest.importorskip("triton")

from odit.kernels.turn import turn

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 72), (1, 4, 1, 384), (3, 16, 7, 130), (2, 5, 4, 1152)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(shape, dtype, device="cpu"):
    return normal(random.key(len(shape)), shape, device).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, device="cpu"):
    x = draw(shape, dtype, device).requires_grad_()
    used = draw((shape[0], shape[2], shape[1], shape[3]), dtype, device)
    found, expected = turn(x), ops.turn(x)
    assert torch.equal(found, expected) and found.is_contiguous()
    assert torch.equal(*(torch.autograd.grad(y, x, used)[0] for y in (found, expected)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (8, 16, 256, 1152)])
def test_values_and_gradients_on_a_gpu(shape, dtype):
    test_values_and_gradients(shape, dtype, "cuda")


def test_strides_of_its_input_are_free():
    x = draw((2, 3, 5, 16), torch.float32)
    for view in (x.transpose(1, 2), x[:, :, 1:4], x.transpose(0, 3), x[..., ::2]):
        assert torch.equal(turn(view), ops.turn(view))


def test_mapped_and_differentiated_forward():
    x, dx = draw((4, 2, 3, 5, 8), torch.float32), draw((4, 2, 3, 5, 8), torch.float32).flip(0)
    assert torch.equal(torch.vmap(turn)(x), torch.vmap(ops.turn)(x))
    found = torch.func.jvp(turn, (x[0],), (dx[0],))
    assert all(torch.equal(a, ops.turn(b)) for a, b in zip(found, (x[0], dx[0])))


def test_fp64_takes_the_reference():
    x = draw((2, 3, 4, 8), torch.float64)
    assert torch.equal(turn(x), ops.turn(x))


def test_second_derivatives():
    x = draw((2, 3, 4, 8), torch.float32)
    found, expected = (torch.func.grad(lambda y, f=f: torch.func.grad(lambda z: (f(z) ** 3).sum())(y).square().sum())(x)
                       for f in (turn, ops.turn))  # fmt: skip
    torch.testing.assert_close(found, expected)
