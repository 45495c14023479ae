"""Triton kernels of `kernels.compress`: a window of tokens becomes one entry, in one pass over memory.

For each channel a softmax over the window's tokens (with `overlap` also over those of the window before), the weighted
sum, RMSNorm, RoPE and, if asked for, the rounding of low-precision storage. A program is one entry; tokens come in
tiles that begin at the window's first, so that an entry has the same bits from a pack, a chunk or a decoding step.
Legend: T tokens, N entries, D an entry's channels, C those of a token (2 D with overlap, else D).
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compress import Pooling, Storage
from ..places import Windows
from .launch import SAME_BITS, check_dtypes, check_width
from .norm import PROGRAMS, turn

ROUNDING = {"full": 0, "fp8": 8, "fp4": 4}
TILE = 4096  # numbers of a tile of tokens
SOME, SHARE = 16, 256  # entries whose gradients for the bias a program adds up at once, and in all: a multiple


@triton.jit
def power_of_two(amax, largest: tl.constexpr):
    """2^ceil(log2(amax / largest)), from the bits of the quotient."""
    bits = (amax / largest).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + tl.where((bits & 0x7FFFFF) != 0, 1, 0)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def round_fp8(x_ND, plain, N: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr):
    """The first `plain` channels as FP8 with a scale for each 64 holds them (kernels/formats.py); the others as is."""
    first = (tl.arange(0, D) < plain)[None, :]
    groups = tl.reshape(tl.where(first, x_ND, 0.0), [N, D // GROUP, GROUP])
    scale = power_of_two(tl.maximum(tl.max(tl.abs(groups), 2), 1e-4), 448.0)[:, :, None]
    rounded = (groups / scale).to(tl.float8e4nv).to(tl.float32) * scale
    return tl.where(first, tl.reshape(rounded, [N, D]), x_ND)


@triton.jit
def round_fp4(x_ND, N: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr):
    """x [N, D] as FP4 with a scale for each 32 channels holds it (kernels/formats.py)."""
    groups = tl.reshape(x_ND, [N, D // GROUP, GROUP])
    scale = power_of_two(tl.maximum(tl.max(tl.abs(groups), 2), 7.052966104933725e-38), 6.0)[:, :, None]
    size = tl.abs(groups / scale)
    # To nearest, ties to even, among 0, 0.5, 1, 1.5, 2, 3, 4, 6: steps of 0.5 up to 2, of 1 up to 4, of 2 beyond.
    step = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
    steps = size / step
    whole = tl.floor(steps)
    rest = steps - whole
    odd = whole - 2.0 * tl.floor(whole * 0.5)
    whole += tl.where((rest > 0.5) | ((rest == 0.5) & (odd == 1.0)), 1.0, 0.0)
    return tl.reshape(tl.where(groups < 0.0, -whole, whole) * step * scale, [N, D])


@triton.jit
def hadamard(x_ND, N: tl.constexpr, D: tl.constexpr):
    """x [N, D] times H / sqrt(D), H in Sylvester's order; the sums of kernels/hadamard.py, in its order."""
    y = x_ND
    for step in tl.static_range(0, 10):
        if (1 << step) < D:
            # The pair's axis is moved last, where `split` and `join` work.
            pairs = tl.permute(tl.reshape(y, [N, D // (2 << step), 2, 1 << step]), [0, 1, 3, 2])
            low, high = tl.split(pairs)
            y = tl.reshape(tl.permute(tl.join(low + high, low - high), [0, 1, 3, 2]), [N, D])
    return y * (1.0 / tl.sqrt(D * 1.0))


@triton.jit
def _tile(
    values, scores, bias, first, number, i, slots,
    RATIO: tl.constexpr, C: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, OVERLAP: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    """Tokens i ... i + STEP of an entry: offsets [STEP, D] in memory, values, scores with their bias, which are there.

    With OVERLAP the tokens of the window before come first, with the first half of their channels.
    """
    at, d = i + tl.arange(0, STEP), tl.arange(0, D)
    position = (number - (1 if OVERLAP else 0)) * RATIO + at
    channel = tl.where(at < RATIO, 0, D) if OVERLAP else at * 0
    real = (position >= 0) & (at < (2 * RATIO if OVERLAP else RATIO))
    if RING:
        row = first + position % slots
    else:
        row = first + position
    offset = row.to(tl.int64)[:, None] * C + channel[:, None] + d[None, :]
    v = tl.load(values + offset, mask=real[:, None], other=0.0).to(tl.float32)
    s = tl.load(scores + offset, mask=real[:, None], other=0.0).to(tl.float32)
    s += tl.load(bias + (at % RATIO)[:, None] * C + channel[:, None] + d[None, :], mask=real[:, None], other=0.0)
    return offset, v, tl.where(real[:, None], s, float("-inf")), real


@triton.jit
def _pooled(
    values, scores, bias, first, number, slots,
    RATIO: tl.constexpr, C: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, OVERLAP: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    """The weighted sum of an entry's tokens [D], and the logarithm of its softmax's denominator [D]."""
    TOKENS: tl.constexpr = 2 * RATIO if OVERLAP else RATIO
    largest = tl.full([D], float("-inf"), tl.float32)
    total, sums = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    for i in range(0, TOKENS, STEP):
        _, v, s, _ = _tile(values, scores, bias, first, number, i, slots, RATIO, C, D, STEP, OVERLAP, RING)
        new = tl.maximum(largest, tl.max(s, 0))
        base = tl.where(new == float("-inf"), 0.0, new)  # a tile of the window before the first has no token
        shrink, weights = tl.exp(largest - base), tl.exp(s - base[None, :])
        total, sums = total * shrink + tl.sum(weights, 0), sums * shrink + tl.sum(weights * v, 0)
        largest = new
    return sums / total, largest + tl.log(total)


@triton.jit
def _entry(
    values, scores, bias, weight, rotation, out, e, to, first, number, slots, eps,
    RATIO: tl.constexpr, C: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, PAIRS: tl.constexpr,
    OVERLAP: tl.constexpr, RING: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """Entry e, to row `to` of `out`."""
    d = tl.arange(0, D)
    at = out + to.to(tl.int64) * D + d
    n = tl.load(number + e)
    if n < 0:  # no entry: zeros, as attention may multiply what stands there with a weight of 0
        tl.store(at, tl.zeros([D], out.dtype.element_ty))
    else:
        x, _ = _pooled(values, scores, bias, tl.load(first + e), n, slots, RATIO, C, D, STEP, OVERLAP, RING)
        # Rounded where the reference rounds: pooled, normed, rotated, transformed.
        x = x.to(out.dtype.element_ty).to(tl.float32)
        x *= tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        x = (x * tl.load(weight + d).to(tl.float32)).to(out.dtype.element_ty).to(tl.float32)
        x = turn(x[None, :], rotation, e + tl.zeros([1], tl.int32), D, PAIRS, 1, D, False)
        x = x.to(out.dtype.element_ty).to(tl.float32)
        if ROUNDING == 8:
            x = round_fp8(x, D - 2 * PAIRS, 1, D, 64 if D >= 64 else D)
        if ROUNDING == 4:
            x = hadamard(x, 1, D).to(out.dtype.element_ty).to(tl.float32)
            x = round_fp4(x, 1, D, 32 if D >= 32 else D)
        tl.store(at, tl.reshape(x, [D]))


@triton.jit
def _forward(
    values, scores, bias, weight, rotation, out, first, number, slots, eps,
    RATIO: tl.constexpr, C: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, PAIRS: tl.constexpr,
    OVERLAP: tl.constexpr, RING: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0)
    _entry(
        values, scores, bias, weight, rotation, out, e, e, first, number, slots, eps,
        RATIO, C, D, STEP, PAIRS, OVERLAP, RING, ROUNDING,
    )  # fmt: skip


@triton.jit
def _compress_each(
    values, scores, biases, weights, rotation, outs, rows, first, number, slots, eps,
    RATIO: tl.constexpr, C: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, PAIRS: tl.constexpr,
    OVERLAP: tl.constexpr, ROUNDING: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """An entry of each kind, of which each program of the second axis has one, to a row of its pool."""
    e = tl.program_id(0)
    to = tl.load(rows + e)
    for i in tl.static_range(COUNT):
        if tl.program_id(1) == i:
            _entry(
                values[i], scores[i], biases[i], weights[i], rotation, outs[i], e, to, first, number, slots, eps[i],
                RATIO, C[i], D[i], STEP[i], PAIRS, OVERLAP, True, ROUNDING[i],
            )  # fmt: skip


@triton.jit
def _backward(
    values, scores, bias, weight, rotation, grad, grad_values, grad_scores, parts, first, number, entries, eps,
    RATIO: tl.constexpr, C: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, PAIRS: tl.constexpr,
    OVERLAP: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = 2 * RATIO if OVERLAP else RATIO
    d = tl.arange(0, D)
    of_weight = tl.zeros([D], tl.float32)
    for e in range(tl.program_id(0), entries, tl.num_programs(0)):
        start, n = tl.load(first + e), tl.load(number + e)
        if n >= 0:  # else no entry, and no gradient
            pooled, lse = _pooled(values, scores, bias, start, n, 1, RATIO, C, D, STEP, OVERLAP, False)
            g = tl.load(grad + tl.full([], e, tl.int64) * D + d).to(tl.float32)[None, :]
            if ROUNDING == 4:
                g = hadamard(g, 1, D)
            g = tl.reshape(turn(g, rotation, e + tl.zeros([1], tl.int32), D, PAIRS, 1, D, True), [D])
            scale = tl.rsqrt(tl.sum(pooled * pooled, 0) / D + eps)
            x = pooled * scale
            of_weight += g * x
            g *= tl.load(weight + d).to(tl.float32)
            g = (g - x * (tl.sum(g * x, 0) / D)) * scale
            for i in range(0, TOKENS, STEP):
                offset, v, s, real = _tile(values, scores, bias, start, n, i, 1, RATIO, C, D, STEP, OVERLAP, False)
                of_v = tl.exp(s - lse[None, :]) * g[None, :]
                tl.store(grad_values + offset, of_v, mask=real[:, None])
                tl.store(grad_scores + offset, of_v * (v - pooled[None, :]), mask=real[:, None])
    tl.store(parts + tl.program_id(0) * D + d, of_weight)


@triton.jit
def _bias_backward(
    grad_scores, parts, first, number, entries, share,
    RATIO: tl.constexpr, C: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, SOME: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The sum over a share of the entries of a slot's score gradients: program (slot, channels, part)."""
    slot, c, part = tl.program_id(0), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.program_id(2)
    sums = tl.zeros([CHANNELS], tl.float32)
    for i in range(part * share, tl.minimum(part * share + share, entries), SOME):
        e = i + tl.arange(0, SOME)
        position = tl.load(number + e, mask=e < entries, other=0) * RATIO + slot
        if OVERLAP:  # the first half of the channels is that of the window before
            position -= tl.where(tl.program_id(1) * CHANNELS < D, RATIO, 0)
        row = (tl.load(first + e, mask=e < entries, other=0) + position).to(tl.int64)
        real = (e < entries) & (position >= 0)
        some = tl.load(grad_scores + row[:, None] * C + c[None, :], mask=real[:, None], other=0.0)
        sums += tl.sum(some, 0)
    tl.store(parts + (part * RATIO + slot) * C + c, sums)


def _shape(bias: Tensor, width: int) -> dict[str, Any]:
    check_width("an entry's channels", width, least=8)
    step = min(max(TILE // width, 1), 2 * bias.shape[0] if bias.shape[1] > width else bias.shape[0])
    return {
        "RATIO": bias.shape[0], "C": bias.shape[1], "D": width, "STEP": 1 << (step.bit_length() - 1),
        "OVERLAP": bias.shape[1] > width,
    }  # fmt: skip


def compress_each(poolings: Sequence[Pooling], windows: Windows, rows: Tensor) -> None:
    """`kernels.compress.compress_each` of at least one entry from rings, in one launch."""
    shapes = [_shape(each.bias, each.weight.shape[0]) for each in poolings]
    rotation = torch.view_as_real(windows.rotation.contiguous())
    of = {name: tuple(shape[name] for shape in shapes) for name in ("C", "D", "STEP")}
    _compress_each[(windows.number.shape[0], len(poolings))](
        *(tuple(part) for part in zip(*((p.values, p.scores, p.bias, p.weight) for p in poolings), strict=True)),
        rotation, tuple(each.pool for each in poolings), rows, windows.first, windows.number, windows.slots,
        tuple(each.eps for each in poolings), RATIO=shapes[0]["RATIO"], OVERLAP=shapes[0]["OVERLAP"], **of,
        PAIRS=rotation.shape[1], ROUNDING=tuple(ROUNDING[each.storage] for each in poolings), COUNT=len(poolings),
        num_warps=4, **SAME_BITS,
    )  # fmt: skip


class Compress(torch.autograd.Function):
    """`kernels.compress.compress`; the gradient is that of windows in a pack, and straight through what is rounded."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scores: Tensor, bias: Tensor, weight: Tensor, windows: Windows, eps: float,
        dtype: torch.dtype, storage: Storage,
    ) -> Tensor:  # fmt: skip
        check_dtypes(values=values, scores=scores)
        values, scores = values.contiguous(), scores.contiguous()
        ctx.save_for_backward(values, scores, bias, weight)
        ctx.windows, ctx.eps, ctx.rounding = windows, eps, ROUNDING[storage]
        entries, width = windows.number.shape[0], weight.shape[0]
        out = values.new_empty(entries, width, dtype=dtype)
        if entries:
            rotation = torch.view_as_real(windows.rotation.contiguous())
            _forward[(entries,)](
                values, scores, bias, weight, rotation, out, windows.first, windows.number, max(windows.slots, 1), eps,
                **_shape(bias, width), PAIRS=rotation.shape[1], RING=windows.slots > 0, ROUNDING=ctx.rounding,
                num_warps=4, **SAME_BITS,
            )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, scores, bias, weight = ctx.saved_tensors
        windows: Windows = ctx.windows
        entries, width = windows.number.shape[0], weight.shape[0]
        # Tokens that no entry has yet, and halves of channels that none will use, get zeros.
        of_values, of_scores = values.new_zeros(2, *values.shape)
        programs, shares = min(entries, PROGRAMS), triton.cdiv(entries, SHARE)
        parts, of_bias = values.new_empty(programs, width), bias.new_empty(shares, *bias.shape)
        if entries:
            shape = _shape(bias, width)
            rotation = torch.view_as_real(windows.rotation.contiguous())
            _backward[(programs,)](
                values, scores, bias, weight, rotation, grads[0].contiguous(), of_values, of_scores, parts,
                windows.first, windows.number, entries, ctx.eps,
                **shape, PAIRS=rotation.shape[1], ROUNDING=ctx.rounding, num_warps=4,
            )  # fmt: skip
            channels = min(width, 128)
            _bias_backward[(bias.shape[0], bias.shape[1] // channels, shares)](
                of_scores, of_bias, windows.first, windows.number, entries, SHARE,
                RATIO=shape["RATIO"], C=shape["C"], D=width, CHANNELS=channels, SOME=SOME, OVERLAP=shape["OVERLAP"],
            )  # fmt: skip
        of_bias = of_bias[0] if shares == 1 else of_bias.sum(0)
        return of_values, of_scores, of_bias, parts.sum(0).to(weight.dtype), None, None, None, None
