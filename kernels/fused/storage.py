"""Triton kernel of what low-precision storage makes of rows and of the indexer's queries, in one pass over memory."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compress import hadamard, round_fp4, round_fp8
from .launch import SAME_BITS, check_dtypes, check_width

TILE = 4096  # numbers of a program


@triton.jit
def _store_rounded(x, y, rows, plain, R: tl.constexpr, D: tl.constexpr, TURN: tl.constexpr, FP4: tl.constexpr):
    """y: the first `plain` channels of x [rows, D] in FP8; or, if TURN, x rotated and, if FP4, then rounded.

    Limited by memory: 4 bytes a number of bf16.
    """
    r, d = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, D)
    at, real = r[:, None] * D + d[None, :], (r < rows)[:, None]
    x_RD = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    if TURN:
        x_RD = hadamard(x_RD, R, D).to(y.dtype.element_ty).to(tl.float32)
        if FP4:
            x_RD = round_fp4(x_RD, R, D, 32 if D >= 32 else D)
    else:
        x_RD = round_fp8(x_RD, plain, R, D, 64 if D >= 64 else D)
    tl.store(y + at, x_RD, mask=real)


def _stored(x: Tensor, plain: int, turn: bool, fp4: bool) -> Tensor:
    y, width = torch.empty_like(x, memory_format=torch.contiguous_format), x.shape[-1]
    check_width("channels", width, least=8)
    if rows := x.numel() // width:
        height = max(TILE // width, 1)
        _store_rounded[(triton.cdiv(rows, height),)](
            x.contiguous(), y, rows, plain, R=height, D=width, TURN=turn, FP4=fp4, num_warps=4, **SAME_BITS
        )
    return y


class Stored(torch.autograd.Function):
    """`kernels.compress.stored` in FP8 or FP4."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plain: int, storage: str) -> Tensor:
        check_dtypes(x=x)
        ctx.turn = storage == "fp4"
        return _stored(x, plain, ctx.turn, fp4=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _stored(grads[0], 0, True, fp4=False) if ctx.turn else grads[0], None, None
