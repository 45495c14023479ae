"""Triton kernels of the experts' backward (moe.py): gradients of tokens, routing weights and both expert weights.

Nothing is added to by several programs: an expert's weights get the sum over its rows, in order, in one program a tile,
and a token gets that of its slots. The experts' hidden rows are computed again from what the forward kept.
Rounding is the definition's: the gradient of each product's result comes in x's dtype.
"""

import math
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from .launch import precision
from .moe import clamped, combine, described, rows_times_weights
from .moe_rows import Rows

TILE = 8, 256  # rows and columns of a step between the products


@triton.jit
def _swiglu_backward(
    of_hidden, projected, weights, of_weights, slot_of_row, expert_of_tile, limit, inner,
    HEIGHT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """In place: of_hidden [P, I] becomes hidden itself, computed again, and `projected` [P, 2I] its gradient. That of
    the weights [T, k] is new.

    Limited by memory: 12 I bytes a row in bf16. A pass of its own, as in the product's epilogue it takes more registers
    than there are for two programs a multiprocessor.
    """
    row = tl.program_id(0) * R
    if tl.load(expert_of_tile + row // HEIGHT) < 0:
        return
    r = row + tl.arange(0, R)
    slot = tl.load(slot_of_row + r)
    weight = tl.load(weights + slot, mask=slot >= 0, other=0.0)[:, None]
    r = r.to(tl.int64)[:, None]
    of_weight = tl.zeros([R], tl.float32)
    for low in tl.range(0, inner, C):
        c = low + tl.arange(0, C)[None, :]
        single, double, real = r * inner + c, r * 2 * inner + c, c < inner
        of_h = tl.load(of_hidden + single, mask=real, other=0.0).to(tl.float32)
        gate = tl.load(projected + double, mask=real, other=0.0).to(tl.float32)
        up = tl.load(projected + double + inner, mask=real, other=0.0).to(tl.float32)
        g, sigmoid, u = clamped(gate, up, limit)
        silu = g * sigmoid
        of_weight += tl.sum(of_h * silu * u, 1)
        tl.debug_barrier()  # all has been read that is now overwritten, whichever threads store it
        tl.store(of_hidden + single, silu * u * weight, mask=real)
        of_product = of_h * weight
        of_gate = tl.where(gate <= limit, of_product * u * sigmoid * (1.0 + g * (1.0 - sigmoid)), 0.0)
        of_up = tl.where((up >= -limit) & (up <= limit), of_product * silu, 0.0)
        tl.store(projected + double, of_gate, mask=real)
        tl.store(projected + double + inner, of_up, mask=real)
    tl.store(of_weights + slot, of_weight, mask=slot >= 0)


@triton.jit
def _rows_times_tokens(
    rows, tokens, out, slot_of_row, first, count, high, wide, token_width,
    K: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, DEPTH: tl.constexpr, GATHERED_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[e] [high, wide], a gradient of weights: an expert's rows [P, high], transposed, times its gathered tokens
    [T, wide]; or its tokens [T, high] times its rows [P, wide] if GATHERED_FIRST. Zeros for an expert without rows.

    Limited by the L2 cache, 48 KiB for 4.2 MFLOP of 128 by 256 by 64 (as two of 128 by 128, which took up to 1.3 times
    as long, 64), and by short sums: 384 rows of an expert are 6 steps. What is gathered is the shorter side. Operands
    lie with their sums' axis outside, which wgmma takes in bf16.
    """
    tile, expert = tl.program_id(0), tl.program_id(1)
    across = wide // WIDE
    m, n = tile // across * HIGH, tile % across * WIDE
    start, own = tl.load(first + expert), tl.load(count + expert)
    step = tl.arange(0, DEPTH)
    if GATHERED_FIRST:
        at = tokens + m + tl.arange(0, HIGH)
    else:
        at = tokens + n + tl.arange(0, WIDE)
    sums = tl.zeros([HIGH, WIDE], tl.float32)
    for low in tl.range(0, own, DEPTH):
        slot = tl.load(slot_of_row + start + low + step)
        token = (slot // K).to(tl.int64)[:, None] * token_width
        gathered = tl.load(at[None, :] + token, mask=(slot >= 0)[:, None], other=0.0)
        if GATHERED_FIRST:
            sums = tl.dot(tl.trans(gathered), rows.load([start + low, n]), sums, input_precision=PRECISION)
        else:
            sums = tl.dot(tl.trans(rows.load([start + low, m])), gathered, sums, input_precision=PRECISION)
    out.store([expert * high + m, n], sums.to(out.dtype))


def _weights_grad(x: Tensor, tokens: Tensor, rows: Rows, like: Tensor, gathered_first: bool) -> Tensor:
    """Of `like` [E, m, n], from x [P, n] and tokens [T, m] if `gathered_first`, or x [P, m] and tokens [T, n]."""
    experts, high, wide = like.shape
    out = torch.empty_like(like)
    most, stages = ((64, 64), 2) if x.dtype == torch.float32 else ((128, 256), 5) if gathered_first else ((256, 128), 7)
    m, n = math.gcd(high, most[0]), math.gcd(wide, most[1])
    step = min(rows.height, 32 if x.dtype == torch.float32 else 64)
    _rows_times_tokens[(high // m * (wide // n), experts)](
        described(x, step, n if gathered_first else m), tokens, described(out, m, n),
        rows.slot, rows.first, rows.counts, high, wide, tokens.shape[1],
        K=rows.row.numel() // tokens.shape[0], HIGH=m, WIDE=n, DEPTH=step, GATHERED_FIRST=gathered_first,
        PRECISION=precision(x.dtype), num_warps=8 if m * n > 2**14 else 4, num_stages=stages,
    )  # fmt: skip
    return out


def experts_backward(
    grad: Tensor, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, projected: Tensor, rows: Rows,
    limit: float, needed: Sequence[bool], stored: Callable[[Tensor], Tensor] = lambda hidden: hidden,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, weights, gate_up and down for that of the result [T, d]. `projected` is used up: overwritten.

    `needed` says of x, ids, weights, gate_up and down which are wanted; `stored`, what the second product was given.
    """
    grad = grad.to(x.dtype).contiguous()
    hidden, of_weights = (
        rows_times_weights(grad, down, rows, transposed=False, gathered=True),
        torch.empty_like(weights),
    )
    _swiglu_backward[(hidden.shape[0] // TILE[0],)](
        hidden, projected, weights, of_weights, rows.slot, rows.expert, limit, hidden.shape[1],
        HEIGHT=rows.height, R=TILE[0], C=TILE[1], num_warps=4,
    )  # fmt: skip
    increment_version(projected)  # so that a second backward, which would find gradients there, is refused
    of_x = of_gate_up = of_down = None
    if needed[4]:
        of_down = _weights_grad(stored(hidden), grad, rows, down, gathered_first=True)
    del hidden
    if needed[3]:
        of_gate_up = _weights_grad(projected, x, rows, gate_up, gathered_first=False)
    if needed[0]:
        by_row = rows_times_weights(projected, gate_up, rows, transposed=False)
        of_x = combine(by_row, rows, weights.shape[1], x.dtype)
    return of_x, of_weights if needed[2] else None, of_gate_up, of_down
