"""Triton kernel of `kernels.project.project_each`: products of the same rows with several weights, in one launch.

Every tile is `linear.tile_product`, with the steps that the weight's own launch would take, and so has its bits.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..project import Product
from .launch import SAME_BITS, precision
from .linear import check, narrowed, tile_product, tiles
from .moe import clamped

MOST = 8  # weights of a launch


@triton.jit
def _gated_product(
    x, gate, up, row, column, depth, limit,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Two tiles as `tile_product`'s, rounded to x's dtype as its results are, and what SwiGLU makes of them in fp32."""
    gates = tl.zeros([ROWS, COLUMNS], tl.float32)
    ups = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in tl.range(0, depth, DEPTH):
        some = x.load([row, k])
        gates = tl.dot(some, tl.trans(gate.load([column, k])), gates, input_precision=PRECISION)
        ups = tl.dot(some, tl.trans(up.load([column, k])), ups, input_precision=PRECISION)
    g, sigmoid, u = clamped(gates.to(x.dtype).to(tl.float32), ups.to(x.dtype).to(tl.float32), limit)
    return g * sigmoid * u


@triton.jit
def _linear_each(
    x, w0, w1, w2, w3, w4, w5, w6, w7, ys, at, rows, depth,
    FIRST: tl.constexpr, WIDTHS: tl.constexpr, COLUMNS: tl.constexpr, PLACED: tl.constexpr, SCALES: tl.constexpr,
    UP: tl.constexpr, LIMITS: tl.constexpr, COUNT: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of one of the products: number i has the tiles of columns from FIRST[i] on, and rows of WIDTHS[i] numbers
    in memory, those at `at` if PLACED. With SCALES they are rounded first, then multiplied by that. If UP is not 0, it
    is the second weight's number.

    Limited by memory: the weights are read once for ROWS rows."""
    weights = (w0, w1, w2, w3, w4, w5, w6, w7)
    tile, row = tl.program_id(0), tl.program_id(1) * ROWS
    r = row + tl.arange(0, ROWS)
    for i in tl.static_range(COUNT):
        if (tile >= FIRST[i]) & (tile < FIRST[i + 1]):
            column = (tile - FIRST[i]) * COLUMNS[i]
            if UP[i] > 0:
                sums = _gated_product(
                    x, weights[i], weights[UP[i]], row, column, depth, LIMITS[i], ROWS, COLUMNS[i], DEPTH, PRECISION
                )
            else:
                sums = tile_product(x, weights[i], row, 0, column, depth, ROWS, COLUMNS[i], DEPTH, PRECISION)
            if SCALES[i] is not None:
                sums = sums.to(x.dtype).to(tl.float32) * SCALES[i]
            to = r.to(tl.int64)
            if PLACED[i]:
                to = tl.load(at[i] + r, mask=r < rows, other=0)
            c = column + tl.arange(0, COLUMNS[i])
            values = sums.to(ys[i].dtype.element_ty)
            tl.store(ys[i] + to[:, None] * WIDTHS[i] + c[None, :], values, mask=(r < rows)[:, None])


def multiply_each(x: Tensor, products: Sequence[Product]) -> list[Tensor]:
    """`project_each` of at least one row."""
    if (weights := sum(1 + (each.up is not None) for each in products)) > MOST:
        raise ValueError(f"{weights} weights; the Triton kernel takes up to {MOST}")
    return _launch(x.contiguous(), products)


def _launch(x: Tensor, products: Sequence[Product]) -> list[Tensor]:
    rows, depth = x.shape
    for each in products:
        check(x, each.weight, 1)
        if each.up is not None:
            check(x, each.up, 1)
    ys = [_made(x, each) for each in products]
    places = [None if each.into is None else each.into.at for each in products]
    outs = [each.weight.shape[0] for each in products]
    height, _, step, warps, _ = tiles(min(rows, 64), outs[0], depth, x.dtype)
    down = triton.cdiv(rows, height)
    columns, stages = narrowed(outs, down, x)
    first = [0]
    for out, width in zip(outs, columns, strict=True):
        first.append(first[-1] + out // width)
    pairs = list(zip(products, columns, strict=True))
    weights = [TensorDescriptor.from_tensor(each.weight.contiguous(), [width, step]) for each, width in pairs]
    ups = []
    for each, width in pairs:
        ups.append(0 if each.up is None else len(weights))
        if each.up is not None:
            weights.append(TensorDescriptor.from_tensor(each.up.contiguous(), [width, step]))
    _linear_each[(first[-1], down)](
        TensorDescriptor.from_tensor(x, [height, step]), *weights, *weights[:1] * (MOST - len(weights)),
        tuple(ys), tuple(y if at is None else at for y, at in zip(ys, places, strict=True)), rows, depth,
        FIRST=tuple(first), WIDTHS=tuple(y.stride(0) for y in ys), COLUMNS=tuple(columns),
        PLACED=tuple(at is not None for at in places), SCALES=tuple(each.scale for each in products),
        UP=tuple(ups), LIMITS=tuple(each.limit for each in products),
        COUNT=len(ys), ROWS=height, DEPTH=step, PRECISION=precision(x.dtype),
        num_warps=warps, num_stages=stages, **SAME_BITS,
    )  # fmt: skip
    return ys


def _made(x: Tensor, product: Product) -> Tensor:
    """Where a product's rows go."""
    dtype = x.dtype if product.scale is None and not product.wide else torch.float32
    if product.into is None:
        return x.new_empty(x.shape[0], product.weight.shape[0], dtype=dtype)
    rows, out = product.into.rows, product.weight.shape[0]
    if rows.dtype != dtype or rows.shape[1] != out or rows.stride(1) != 1:
        raise ValueError(f"a product of {out} numbers in {dtype} cannot go to rows {list(rows.shape)} in {rows.dtype}")
    return rows
