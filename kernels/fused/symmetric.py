"""A Triton kernel of batches of symmetric products, which computes the tiles on and below the diagonal alone.

A tile leaves twice, the second time transposed: 10 of 16 tiles are computed for 512 rows.
"""

import triton
import triton.language as tl
from torch import Tensor

TILE, DEPTH = 128, 64  # rows and columns of a tile of the result, and what is summed up at once
WARPS, STAGES = 4, 3


@triton.jit
def _load(at, row, k, stride, TILE: tl.constexpr, DEPTH: tl.constexpr, TALL: tl.constexpr):
    """[TILE, DEPTH]: rows from `row` of what has `stride`; of its transpose, where that is what lies in memory."""
    r, d = row + tl.arange(0, TILE), k + tl.arange(0, DEPTH)
    if TALL:
        return tl.trans(tl.load(at + d.to(tl.int64)[:, None] * stride + r[None, :]))
    return tl.load(at + r.to(tl.int64)[:, None] * stride + d[None, :])


@triton.jit
def _product(
    x, out, rows, depth, stride, a, b, c,
    TILE: tl.constexpr, DEPTH: tl.constexpr, TALL: tl.constexpr, POLYNOMIAL: tl.constexpr,
):  # fmt: skip
    tile, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = ((tl.sqrt_rn((8 * tile + 1).to(tl.float32)) - 1) / 2 + 0.001).to(tl.int32)  # tiles go row by row
    j = tile - i * (i + 1) // 2
    x += matrix * rows * depth
    out += matrix * rows * rows
    sums = tl.zeros([TILE, TILE], tl.float32)
    for k in range(0, depth, DEPTH):
        left = _load(x, i * TILE, k, stride, TILE, DEPTH, TALL)
        right = _load(x, j * TILE, k, stride, TILE, DEPTH, TALL)
        sums = tl.dot(left, tl.trans(right), sums)
    r, s = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    at = r[:, None] * rows + s[None, :]
    if POLYNOMIAL:
        sums = c * sums + b * tl.load(x + at).to(tl.float32) + tl.where(r[:, None] == s[None, :], a, 0.0)
    found = sums.to(out.dtype.element_ty)
    tl.store(out + at, found)
    if i != j:
        tl.store(out + s[:, None] * rows + r[None, :], tl.trans(found))


def takes(y: Tensor) -> bool:
    """Whether the kernel takes [B, n, m], which it wants whole tiles of."""
    return y.shape[-2] % TILE == 0 and y.shape[-1] % DEPTH == 0


def product(y: Tensor, *polynomial: float) -> Tensor:
    """[B, n, n]: YYᵀ of bf16 y [B, n, m], each contiguous or the transpose of what is; or, of symmetric y and the
    factors a, b, c of a `polynomial`, a I + b Y + c YY."""
    count, rows, depth = y.shape
    tall = y.stride(-1) != 1
    out, tiles = y.new_empty(count, rows, rows), rows // TILE
    _product[tiles * (tiles + 1) // 2, count](
        y, out, rows, depth, y.stride(-1) if tall else y.stride(-2), *(polynomial or (0.0, 0.0, 0.0)),
        TILE=TILE, DEPTH=DEPTH, TALL=tall, POLYNOMIAL=bool(polynomial), num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out
