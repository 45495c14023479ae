"""Triton kernels of RMSNorm and RoPE in one pass over memory: queries' heads, window rows, attention's output.

A row is one head of a token, or a token. Its sum of squares is one reduction over its channels, in a tile whose shape
depends on the width alone. What the norm gives is rounded to x's dtype before it is rotated, as in the reference.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..norm import Norm
from .launch import SAME_BITS, check_dtypes, next_power

TILE = 8192  # numbers of a tile
PROGRAMS = 528  # four on each of an H100's multiprocessors; each keeps a sum for the weight's gradient


@triton.jit
def turn(x_RD, rotation, token_R, width, PAIRS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BACK: tl.constexpr):
    """The last 2 PAIRS of `width` channels rotated by the angles at `token_R` (-1: none), as pairs (2k, 2k + 1)."""
    even, odd = tl.split(tl.reshape(x_RD, [R, D // 2, 2]))
    pair = tl.arange(0, D // 2) - (width // 2 - PAIRS)
    at = rotation + (token_R * PAIRS)[:, None] * 2 + pair[None, :] * 2
    turned = ((pair >= 0) & (pair < PAIRS))[None, :] & (token_R >= 0)[:, None]
    cos, sin = tl.load(at, mask=turned, other=1.0), tl.load(at + 1, mask=turned, other=0.0)
    if BACK:
        sin = -sin
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [R, D])


@triton.jit
def _tile(
    x, weight, rotation, scales, tile, rows, heads, width, eps, TO: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr,
    SCALES: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """R rows, normed and rotated, for a result of type TO; their scales are stored if SCALES."""
    r, d = tile.to(tl.int64) * R + tl.arange(0, R), tl.arange(0, D)
    at, real = r[:, None] * width + d[None, :], (r < rows)[:, None] & (d < width)[None, :]
    x_RD = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x_RD * x_RD, 1) / width + eps)
        x_RD *= scale[:, None]
        if WEIGHT:
            x_RD *= tl.load(weight + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
        if SCALES:
            tl.store(scales + r, scale, mask=r < rows)
    if PAIRS > 0:
        x_RD = x_RD.to(TO).to(tl.float32)
        x_RD = turn(x_RD, rotation, tl.where(r < rows, r // heads, -1), width, PAIRS, R, D, BACK)
    return x_RD, r, at, real


@triton.jit
def _forward(
    x, weight, rotation, y, scales, rows, heads, width, eps,
    R: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    x_RD, _, at, real = _tile(
        x, weight, rotation, scales, tl.program_id(0), rows, heads, width, eps, y.dtype.element_ty,
        R, D, PAIRS, NORM, WEIGHT, NORM and not WEIGHT, BACK,
    )  # fmt: skip
    tl.store(y + at, x_RD, mask=real)


@triton.jit
def _norm_each(
    xs, weights, rotations, ys, places, rows, heads, widths, eps, ends,
    R: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr,
    PLACED: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """A tile of one of some tensors, of which number i has the programs up to ends[i]; its rows go to those at
    places[i], if PLACED."""
    start = 0
    for i in tl.static_range(COUNT):
        if (tl.program_id(0) >= start) & (tl.program_id(0) < ends[i]):
            x_RD, r, at, real = _tile(
                xs[i], weights[i], rotations[i], xs[i], tl.program_id(0) - start, rows[i], heads[i], widths[i], eps[i],
                ys[i].dtype.element_ty, R[i], D[i], PAIRS[i], NORM[i], WEIGHT[i], False, False,
            )  # fmt: skip
            if PLACED[i]:
                to = tl.load(places[i] + r, mask=r < rows[i], other=0)
                at = to[:, None] * widths[i] + tl.arange(0, D[i])[None, :]
            tl.store(ys[i] + at, x_RD, mask=real)
        start = ends[i]


@triton.jit
def _backward(
    x, scales, weight, rotation, grad, grad_x, parts, rows, heads, width, eps,
    R: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """`x` is what came in; or, normed without a weight, what became of it: the part of a gradient that goes along it is
    the same before and after both are turned."""
    d = tl.arange(0, D)
    of_weight = tl.zeros([D], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0)):
        r = tl.full([R], tile, tl.int64) * R + tl.arange(0, R)
        at, real = r[:, None] * width + d[None, :], (r < rows)[:, None] & (d < width)[None, :]
        g_RD = tl.load(grad + at, mask=real, other=0.0).to(tl.float32)
        if NORM and not WEIGHT:
            x_RD = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
            scale = tl.load(scales + r, mask=r < rows, other=0.0)[:, None]
            g_RD = (g_RD - x_RD * (tl.sum(g_RD * x_RD, 1) / width)[:, None]) * scale
        if PAIRS > 0:
            g_RD = turn(g_RD, rotation, tl.where(r < rows, r // heads, -1), width, PAIRS, R, D, not BACK)
        if WEIGHT:
            x_RD = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(x_RD * x_RD, 1) / width + eps)[:, None]
            x_RD *= scale
            of_weight += tl.sum(g_RD * x_RD, 0)
            g_RD *= tl.load(weight + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
            g_RD = (g_RD - x_RD * (tl.sum(g_RD * x_RD, 1) / width)[:, None]) * scale
        tl.store(grad_x + at, g_RD, mask=real)
    if WEIGHT:
        tl.store(parts + tl.program_id(0).to(tl.int64) * width + d, of_weight, mask=d < width)


def angles(rotation: Tensor | None, x: Tensor) -> tuple[Tensor, int]:
    """cos and sin fp32 [T, pairs, 2], and the number of pairs."""
    if rotation is None:
        return x, 0
    return torch.view_as_real(rotation.contiguous()), rotation.shape[-1]


@triton.jit
def _in_place(
    x, rotation, rows, heads, width, R: tl.constexpr, C: tl.constexpr, PAIRS: tl.constexpr, BACK: tl.constexpr
):
    r, c = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, C)
    at, real = r[:, None] * width + width - 2 * PAIRS + c[None, :], (r < rows)[:, None] & (c < 2 * PAIRS)[None, :]
    x_RC = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    turned = turn(x_RC, rotation, tl.where(r < rows, r // heads, -1), 2 * PAIRS, PAIRS, R, C, BACK)
    tl.store(x + at, turned, mask=real)


def rope_in_place(x: Tensor, rotation: Tensor, back: bool) -> None:
    """RoPE of rotation complex64 [T, pairs] (or back) on the last channels of x [T, H, D], a row after another."""
    rows, width, (table, pairs) = x.numel() // x.shape[-1], x.shape[-1], angles(rotation, x)
    channels = next_power(2 * pairs)
    tile = max(TILE // channels, 1)
    if rows:
        _in_place[(triton.cdiv(rows, tile),)](
            x, table, rows, x.shape[1], width, R=tile, C=channels, PAIRS=pairs, BACK=back, num_warps=8, **SAME_BITS
        )


def norm_each(norms: Sequence[Norm]) -> list[Tensor]:
    """`kernels.norm.norm_each` of at least one row, in one launch."""
    xs = [each.x.contiguous() for each in norms]
    check_dtypes(**{f"x{i}": x for i, x in enumerate(xs)})
    ys = [torch.empty_like(x) if each.into is None else each.into.rows for each, x in zip(norms, xs, strict=True)]
    turns = [angles(each.rotation, x) for each, x in zip(norms, xs, strict=True)]
    widths = [x.shape[-1] for x in xs]
    rows = [x.numel() // width for x, width in zip(xs, widths, strict=True)]
    heads = [n // x.shape[0] for x, n in zip(xs, rows, strict=True)]
    sizes = [next_power(width) for width in widths]
    tiles = [max(TILE // size, 1) for size in sizes]
    places = [None if each.into is None else each.into.at for each in norms]
    for x, y, each in zip(xs, ys, norms, strict=True):
        if each.into is not None and (y.dtype != x.dtype or not y.is_contiguous() or y.shape[1:] != x.shape[1:]):
            raise ValueError(f"normed {list(x.shape)} in {x.dtype} cannot go to rows {list(y.shape)} in {y.dtype}")
    ends = tuple(accumulate(triton.cdiv(n, tile) for n, tile in zip(rows, tiles, strict=True)))
    _norm_each[(ends[-1],)](
        tuple(xs), tuple(x if each.weight is None else each.weight for x, each in zip(xs, norms, strict=True)),
        tuple(table for table, _ in turns), tuple(ys),
        tuple(y if at is None else at for y, at in zip(ys, places, strict=True)), tuple(rows), tuple(heads),
        tuple(widths), tuple(each.eps or 0.0 for each in norms), ends,
        R=tuple(tiles), D=tuple(sizes), PAIRS=tuple(pairs for _, pairs in turns),
        NORM=tuple(each.eps is not None for each in norms), WEIGHT=tuple(each.weight is not None for each in norms),
        PLACED=tuple(at is not None for at in places), COUNT=len(norms), num_warps=8, **SAME_BITS,
    )  # fmt: skip
    return ys


class NormRope(torch.autograd.Function):
    """RMSNorm (if `eps` is given; times `weight`, if given), then RoPE (if `rotation` is given; or back).

    x [T, D] or [T, H, D], bf16 or fp32; weight fp32 [D]; rotation complex64 [T, pairs]. Returns x's dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, rotation: Tensor | None, eps: float | None, back: bool
    ) -> Tensor:
        width = x.shape[-1]
        check_dtypes(x=x)
        if rotation is not None and width % 2:
            raise ValueError(f"{width} channels; the Triton kernels turn pairs of an even number")
        x = x.contiguous()
        y, plain = torch.empty_like(x), eps is not None and weight is None
        table, pairs = angles(rotation, x)
        rows, heads = x.numel() // width, x.numel() // width // max(x.shape[0], 1)
        tile = max(TILE // next_power(width), 1)
        scales = x.new_empty(rows, dtype=torch.float32) if plain else y
        if rows:
            _forward[(triton.cdiv(rows, tile),)](
                x, x if weight is None else weight, table, y, scales, rows, heads, width, eps or 0.0,
                R=tile, D=next_power(width), PAIRS=pairs, NORM=eps is not None, WEIGHT=weight is not None,
                BACK=back, num_warps=8, **SAME_BITS,
            )  # fmt: skip
        # Without a weight the result is kept, which whoever reads it keeps too, and not x.
        ctx.save_for_backward(*((y, scales) if plain else (x if eps is not None else None, None)), weight, rotation)
        ctx.eps, ctx.back, ctx.shape = eps, back, (rows, heads, tile)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, scales, weight, rotation = ctx.saved_tensors
        rows, heads, tile = ctx.shape
        grad = grads[0].contiguous()
        of_x, width = torch.empty_like(grad), grad.shape[-1]
        table, pairs = angles(rotation, grad)
        programs = max(min(triton.cdiv(rows, tile), PROGRAMS), 1)
        parts = grad.new_empty(programs, width, dtype=torch.float32)
        _backward[(programs,)](
            grad if x is None else x, parts if scales is None else scales, grad if weight is None else weight, table,
            grad, of_x, parts, rows, heads, width, ctx.eps or 0.0,
            R=tile, D=next_power(width), PAIRS=pairs, NORM=x is not None, WEIGHT=weight is not None,
            BACK=ctx.back, num_warps=8,
        )  # fmt: skip
        return of_x, None if weight is None else parts.sum(0).to(weight.dtype), None, None, None
