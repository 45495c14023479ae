"""The corrected interpreter against torch."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter, on machines without a GPU")


@triton.jit
def _copy(x, y, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(y + n, tl.load(x + n).to(y.dtype.element_ty))


@triton.jit
def _multiply(x, y, z, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(z + at, tl.dot(tl.load(x + at), tl.load(y + at)))


@triton.jit
def _double(x):
    tl.store(x, tl.load(x) + tl.load(x))


@triton.jit
def _sum(x, N: tl.constexpr):
    tl.store(x, tl.sum(tl.load(x + tl.arange(0, N)), 0))


def copied(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty_like(x, dtype=dtype)
    _copy[(1,)](x, y, N=x.numel())  # pyright: ignore[reportArgumentType]
    return y


def test_casts_are_torchs():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(copied(every, torch.float32).nan_to_num(7.0), every.float().nan_to_num(7.0))
    x = torch.cat([torch.randn(2**13) * 10.0**e for e in range(-4, 4)])
    x[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), -0.0])  # ties go to even
    assert torch.equal(copied(x, torch.bfloat16), x.bfloat16())
    rounded = x.clamp(-448, 448).to(torch.float8_e4m3fn)  # a GPU's cast saturates, torch's does not
    assert torch.equal(copied(x, torch.float8_e4m3fn).float(), rounded.float())


def test_products_of_bf16_are_exact():
    x, y, z = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    _multiply[(1,)](x, y, z, N=16)  # pyright: ignore[reportArgumentType]
    assert torch.equal(z, (x.double() @ y.double()).float())


def test_what_it_cannot_compute_is_refused():
    x = torch.ones(4).bfloat16()
    with pytest.raises(InterpreterError, match="arithmetic in bf16"):
        _double[(1,)](x)
    with pytest.raises(InterpreterError, match="arithmetic in .*bf16"):
        _sum[(1,)](x, N=4)  # pyright: ignore[reportArgumentType]
