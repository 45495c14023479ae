"""Triton kernels of `kernels.embedding.embed`: rows of a table, and their gradient without atomics.

Tokens are sorted, stably. The program of a token that is the first of its number adds up the gradients of all with that
number, in their order; the others do nothing, and rows of no token keep zeros.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import next_power

CHANNELS = 1024  # of a program, at most
TILE = 8192  # numbers of a tile of gradients


@triton.jit
def _embed(tokens, table, out, width, COPIES: tl.constexpr, C: tl.constexpr):
    """Limited by memory: a row is read once, and stored COPIES times."""
    t, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * C + tl.arange(0, C)
    row = tl.load(table + tl.load(tokens + t) * width + c, mask=c < width, other=0.0)
    for i in tl.static_range(COPIES):
        tl.store(out + (t * COPIES + i) * width + c, row, mask=c < width)


@triton.jit
def _embed_backward(numbers, order, ends, grad, out, width, COPIES: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Most tokens come once: the first of a number goes alone, further ones in tiles of R.

    Limited by the latency of four loads one after another; then by the most frequent token, whose tiles come in turn.
    """
    first, c = tl.program_id(0), tl.program_id(1) * C + tl.arange(0, C)
    number, there = tl.load(numbers + first), c < width
    if tl.load(numbers + first - 1, mask=first > 0, other=-1) == number:
        return
    token, end = tl.load(order + first) * COPIES, tl.load(ends + first)
    sums_C = tl.zeros([C], tl.float32)
    for j in tl.static_range(COPIES):
        sums_C += tl.load(grad + (token + j) * width + c, mask=there, other=0.0).to(tl.float32)
    if end > first + 1:
        sums = tl.zeros([R, C], tl.float32)
        for i in range(first + 1, end, R):
            at = i + tl.arange(0, R)
            real = (at < end)[:, None] & there[None, :]
            rows = (tl.load(order + at, mask=at < end, other=0) * COPIES)[:, None] * width + c[None, :]
            for j in tl.static_range(COPIES):
                sums += tl.load(grad + rows + j * width, mask=real, other=0.0).to(tl.float32)
        sums_C += tl.sum(sums, 0)
    tl.store(out + number.to(tl.int64) * width + c, sums_C, mask=there)


class Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, table: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows, width = table.shape
        out = table.new_empty(tokens.numel(), copies, width)
        if tokens.numel():
            block = min(next_power(width), CHANNELS)
            _embed[(tokens.numel(), triton.cdiv(width, block))](
                tokens.contiguous(), table.contiguous(), out, width, COPIES=copies, C=block, num_warps=4
            )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (tokens,) = ctx.saved_tensors
        count, copies, width = grads[0].shape
        out = grads[0].new_zeros(ctx.rows, width)
        if count:
            numbers, order = torch.sort(tokens.int(), stable=True)
            ends = torch.searchsorted(numbers, numbers, right=True, out_int32=True)
            block = min(next_power(width), CHANNELS)
            _embed_backward[(count, triton.cdiv(width, block))](
                numbers, order, ends, grads[0].contiguous(), out, width,
                COPIES=copies, R=max(TILE // block, 1), C=block, num_warps=8, num_stages=1,
            )  # fmt: skip
        return None, out, None
