"""Triton kernel of `kernels.project`: products with a weight whose every row has the same bits in any batch.

The sum over a row's channels goes in steps of `DEPTH`, which depends on the weight alone, and is never split; how many
rows and columns a program takes depends on the batch, and does not touch a row's sum. The backward's products are
cuBLAS's: the same in every run of one shape, which is all that a gradient needs.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import hopper_linear
from .launch import STEP, check_dtypes, is_hopper, multiprocessors, precision


@triton.jit
def tile_place(tile, down, across, GROUP: tl.constexpr):
    """Row and column, in tiles, of a tile of a result. Neighbours in time share weights and rows in the L2 cache: GROUP
    tiles of rows go across together."""
    band = tile // (GROUP * across)
    height = tl.minimum(down - band * GROUP, GROUP)
    return band * GROUP + tile % (GROUP * across) % height, tile % (GROUP * across) // height


@triton.jit
def tile_product(
    x, weight, row, x_column, column, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x[row:, x_column:] times weight[column:]ᵀ over `depth` channels, in fp32."""
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in tl.range(0, depth, DEPTH):
        some = x.load([row, x_column + k])
        sums = tl.dot(some, tl.trans(weight.load([column, k])), sums, input_precision=PRECISION)
    return sums


@triton.jit
def store_wide(y, sums, row, column, rows, columns, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile of y [.., width] at a row and column, up to `rows` and `columns`. In fp32 it goes without a descriptor,
    whose store would take it through more shared memory than operands leave."""
    r, c = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    tl.store(y + r.to(tl.int64) * width + c, sums, mask=(r < rows) & (c < columns))


@triton.jit
def _linear(
    x, weight, y, rows, depth, out,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """y[:, g * out:] = x[:, g * depth:] times weight[g * out:]ᵀ of group g, the grid's second axis."""
    g = tl.program_id(1)
    down, across = tile_place(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(out, COLUMNS), GROUP)
    row, column = down * ROWS, g * out + across * COLUMNS
    sums = tile_product(x, weight, row, g * depth, column, depth, ROWS, COLUMNS, DEPTH, PRECISION)
    if WIDE:
        store_wide(y, sums, row, column, rows, (g + 1) * out, tl.num_programs(1) * out, ROWS, COLUMNS)
    else:
        y.store([row, column], sums.to(y.dtype))


def tiles(rows: int, out: int, depth: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """ROWS, COLUMNS, DEPTH, warps, stages. Powers of two; COLUMNS and DEPTH divide `out` and `depth`."""
    step = math.gcd(depth, 64 if dtype == torch.bfloat16 else 32)
    if dtype == torch.float32:
        return 32 if rows > 16 else 16, math.gcd(out, 64), step, 4, 2
    if rows <= 64:
        return 16 if rows <= 16 else 64, math.gcd(out, 64), step, 4, 5
    columns = math.gcd(out, 256)
    return 128, columns, step, 8 if columns == 256 else 4, 4


def narrowed(outs: Sequence[int], down: int, x: Tensor) -> tuple[list[int], int]:
    """COLUMNS of each of some results, and stages, for few rows of x, which are `down` tiles: as in `tiles`, but
    narrower ones where there are too few for all multiprocessors, and more stages, for as many bytes on their way."""
    widest = 64
    while widest > STEP and down * sum(out // math.gcd(out, widest) for out in outs) < multiprocessors(x.device):
        widest //= 2
    stages = 2 if x.dtype == torch.float32 else 5 if widest == 64 else 8
    return [math.gcd(out, widest) for out in outs], stages


def check(x: Tensor, weight: Tensor, groups: int) -> None:
    """ValueError, by name, for a shape that the kernel does not take."""
    check_dtypes(x=x, weight=weight)
    for name, size in (("in_features", weight.shape[1]), ("out_features of a group", weight.shape[0] // groups)):
        if size % STEP:
            raise ValueError(f"{name}: {size}; the Triton kernels take multiples of {STEP}")


def multiply(x: Tensor, weight: Tensor, groups: int = 1, wide: bool = False) -> Tensor:
    """x [T, G * i] times weight [G * o, i] -> [T, G * o], a block of the weight a group; in fp32 if `wide`."""
    check(x, weight, groups)
    rows, depth, out = x.shape[0], weight.shape[1], weight.shape[0] // groups
    y = x.new_empty(rows, groups * out, dtype=torch.float32 if wide else x.dtype)
    if rows == 0:
        return y
    # A step of 64 channels must not reach into the next group's.
    if rows > 64 and x.dtype == torch.bfloat16 and is_hopper(x.device) and (groups == 1 or depth % 64 == 0):
        hopper_linear.multiply(x.contiguous(), weight.contiguous(), y, groups)
        return y
    height, columns, step, warps, stages = tiles(rows, out, depth, x.dtype)
    if rows <= 64:
        (columns, *_), stages = narrowed([out] * groups, 1, x)
    _linear[(triton.cdiv(rows, height) * (out // columns), groups)](
        TensorDescriptor.from_tensor(x.contiguous(), [height, step]),
        TensorDescriptor.from_tensor(weight.contiguous(), [columns, step]),
        y if wide else TensorDescriptor.from_tensor(y, [height, columns]),
        rows, depth, out,
        ROWS=height, COLUMNS=columns, DEPTH=step, GROUP=8, PRECISION=precision(x.dtype), WIDE=wide,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


class Linear(torch.autograd.Function):
    """`multiply` with its gradients, whose products round to x's dtype first (our choice where y is fp32)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, groups: int, wide: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.groups = groups
        return multiply(x, weight, groups, wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        blocks = weight.unflatten(0, (ctx.groups, -1))  # [G, o, i]
        grad = _grouped(grads[0].to(x.dtype), ctx.groups)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = x.new_empty(x.shape)
            torch.bmm(grad, blocks, out=_grouped(of_x, ctx.groups))
        if ctx.needs_input_grad[1]:
            of_weight = torch.bmm(grad.transpose(1, 2), _grouped(x, ctx.groups)).flatten(0, 1)
        return of_x, of_weight, None, None


def _grouped(x: Tensor, groups: int) -> Tensor:
    """x [T, G * i] as [G, T, i], which cuBLAS reads and writes where it lies."""
    return x.unflatten(1, (groups, -1)).transpose(0, 1)
