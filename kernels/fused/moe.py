"""Triton kernels of the experts: products of sorted rows with their expert's weights, forward, and the sum by token.

An expert's slots are neighbouring rows (moe_rows.py), padded to whole tiles with zeros. A row's sums over channels go
in steps that depend on the weights' shapes alone and are never split, so that they do not depend on which other rows
the expert has. What stands between the two products is fp32, as in the definition. The backward is moe_backward.py.
Legend: T tokens, E experts, k slots of a token, P rows, d hidden size, I width of an expert.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import SAME_BITS, STEP, check_dtypes, multiprocessors, precision
from .moe_rows import Rows, sort_rows

CHANNELS = 1024  # that a program adds up
BAND = 8  # tiles of rows that share a tile of weights in the L2 cache


class Tiles(NamedTuple):
    """Of one program: columns of the result, channels of a step, warps, stages of the loads' pipeline."""

    columns: int
    depth: int
    warps: int
    stages: int


@triton.jit
def locate(tile, expert_of_tile, first, count, across, ROWS: tl.constexpr, BAND: tl.constexpr):
    """Expert, first row and number of the column tile of `tile`, of which there are `across` for a tile of rows.

    An expert's tiles are neighbours in time, and bands of BAND tiles of rows go across together: each tile of weights
    is read from memory once for as many rows, and the rows stay in the L2 cache.
    """
    expert = tl.load(expert_of_tile + tile // across)
    start, rows = tl.load(first + expert), tl.load(count + expert)
    tile -= start // ROWS * across
    band = tile // (BAND * across)
    height = tl.minimum(tl.cdiv(rows, ROWS) - band * BAND, BAND)
    inside = tile - band * BAND * across
    return expert, start + (band * BAND + inside % height) * ROWS, inside // height


@triton.jit
def clamped(gate, up, limit):
    """min(gate, limit), its sigmoid, and up between -limit and limit; NaN stays."""
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate, 1.0 / (1.0 + tl.exp(-gate)), up


@triton.jit
def _up(
    x, gate_up, projected, hidden, weights, slot_of_row, expert_of_tile, first, count, total, limit, depth, inner,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden = weight * swiglu(gate_up of gathered rows of x); `projected` is what the backward needs, if KEEP.

    Limited by 48 KiB of shared memory and 4.2 MFLOP a step (two tiles of 128 by 128 by 64 in 8 warps, 128 registers of
    sums a thread), so one program a multiprocessor: loads of its next tile run while it stores three of 32 KiB.
    """
    across = inner // COLUMNS
    for tile in tl.range(tl.program_id(0), tl.load(total) * across, tl.num_programs(0), flatten=True):
        expert, row, number = locate(tile, expert_of_tile, first, count, across, ROWS, BAND)
        column = number * COLUMNS
        slot = tl.load(slot_of_row + row + tl.arange(0, ROWS))
        real = slot >= 0
        at = x + (slot // K).to(tl.int64)[:, None] * depth + tl.arange(0, DEPTH)[None, :]
        gates = tl.zeros([ROWS, COLUMNS], tl.float32)
        ups = tl.zeros([ROWS, COLUMNS], tl.float32)
        first_gate = expert * 2 * inner + column
        for k in tl.range(0, depth, DEPTH):
            some = tl.load(at + k, mask=real[:, None], other=0.0)
            gates = tl.dot(some, tl.trans(gate_up.load([first_gate, k])), gates, input_precision=PRECISION)
            ups = tl.dot(some, tl.trans(gate_up.load([first_gate + inner, k])), ups, input_precision=PRECISION)
        gate, up = gates.to(hidden.dtype), ups.to(hidden.dtype)
        if KEEP:
            projected.store([row, column], gate)
            projected.store([row, inner + column], up)
        weight = tl.load(weights + slot, mask=real, other=0.0)
        g, sigmoid, u = clamped(gate.to(tl.float32), up.to(tl.float32), limit)
        hidden.store([row, column], (g * sigmoid * u * weight[:, None]).to(hidden.dtype))


@triton.jit
def _rows_times_weights(
    rows, weights, out, slot_of_row, expert_of_tile, first, count, total, depth, width,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
    GATHERED: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [P, width] = rows [P, depth] times an expert's weights: [width, depth] if TRANSPOSED, or [depth, width].

    `rows` are described, or those of their tokens in [T, depth] if GATHERED.
    Limited by the L2 cache: 48 KiB for 4.2 MFLOP of 128 by 256 by 64, 5 TB/s at 450 TFLOP/s. 8 warps, 128 registers of
    sums a thread, one program a multiprocessor, which stores in halves while it loads its next tile.
    """
    across = width // COLUMNS
    for tile in tl.range(tl.program_id(0), tl.load(total) * across, tl.num_programs(0), flatten=True):
        expert, row, number = locate(tile, expert_of_tile, first, count, across, ROWS, BAND)
        column = number * COLUMNS
        if GATHERED:
            slot = tl.load(slot_of_row + row + tl.arange(0, ROWS))
            at = rows + (slot // K).to(tl.int64)[:, None] * depth + tl.arange(0, DEPTH)[None, :]
            real = (slot >= 0)[:, None]
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in tl.range(0, depth, DEPTH):
            if GATHERED:
                some = tl.load(at + k, mask=real, other=0.0)
            else:
                some = rows.load([row, k])
            if TRANSPOSED:
                block = tl.trans(weights.load([expert * width + column, k]))
            else:
                block = weights.load([expert * depth + k, column])
            sums = tl.dot(some, block, sums, input_precision=PRECISION)
        left, right = tl.split(tl.permute(tl.reshape(sums, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))
        out.store([row, column], left.to(out.dtype))
        out.store([row, column + COLUMNS // 2], right.to(out.dtype))


@triton.jit
def _combine(rows, row_of_slot, shared, out, width, K: tl.constexpr, C: tl.constexpr, SHARED: tl.constexpr):
    """out [T, width]: the k rows of a token, summed in slot order in fp32, and `shared` [T, width], if SHARED. Limited
    by memory: it reads P rows once."""
    token, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * C + tl.arange(0, C)
    sums = tl.zeros([C], tl.float32)
    for i in tl.static_range(K):
        row = tl.load(row_of_slot + token * K + i).to(tl.int64)
        sums += tl.load(rows + row * width + c, mask=c < width, other=0.0).to(tl.float32)
    if SHARED:
        sums += tl.load(shared + token * width + c, mask=c < width, other=0.0).to(tl.float32)
    tl.store(out + token * width + c, sums, mask=c < width)


def height_of(slots: int, experts: int, dtype: torch.dtype) -> int:
    """Rows of a tile, by how many an expert has on average; a row's result has the same bits in any."""
    mean = slots / experts
    if dtype == torch.float32:
        return 16 if mean <= 16 else 32
    return 16 if mean <= 16 else 64 if mean <= 64 else 128


def tiles(height: int, width: int, depth: int, dtype: torch.dtype, results: int = 1) -> Tiles:
    """For `results` side by side, each of `width` columns and summed over `depth`, which powers of two divide."""
    if dtype == torch.float32:
        return Tiles(math.gcd(width, 64), math.gcd(depth, 32), 4, 2)
    step = math.gcd(depth, 64)
    if height < 128:
        return Tiles(math.gcd(width, 64), step, 4, 4)
    columns = math.gcd(width, 256 // results)
    return Tiles(columns, step, *((8, 4) if columns * results == 256 else (4, 3)))


def described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x [.., N] as rows of N, so many rows and columns at a time, for the tensor memory accelerator."""
    return TensorDescriptor.from_tensor(x.flatten(0, -2), [rows, columns])


def programs(rows: Rows, across: int, warps: int) -> tuple[int]:
    """As many as run at once, which then take one tile after another; two of 4 warps share a multiprocessor."""
    at_once = multiprocessors(rows.slot.device) * (1 if warps == 8 else 2)
    return (min(rows.expert.numel() * across, at_once),)


def project_up(
    x: Tensor, weights: Tensor, gate_up: Tensor, rows: Rows, limit: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """What the backward needs of the first product, [P, 2I], or nothing unless `keep`; and hidden [P, I]."""
    depth, inner, k = x.shape[1], gate_up.shape[1] // 2, weights.shape[1]
    hidden = x.new_empty(rows.slot.numel(), inner)
    projected = x.new_empty(rows.slot.numel(), 2 * inner) if keep else hidden
    columns, step, warps, stages = tiles(rows.height, inner, depth, x.dtype, results=2)
    _up[programs(rows, inner // columns, warps)](
        x, described(gate_up, columns, step),
        described(projected, rows.height, columns), described(hidden, rows.height, columns),
        weights, rows.slot, rows.expert, rows.first, rows.counts, rows.total, limit, depth, inner,
        K=k, ROWS=rows.height, COLUMNS=columns, DEPTH=step, BAND=BAND, KEEP=keep, PRECISION=precision(x.dtype),
        num_warps=warps, num_stages=stages, **SAME_BITS,
    )  # fmt: skip
    return projected, hidden


def rows_times_weights(x: Tensor, weights: Tensor, rows: Rows, transposed: bool, gathered: bool = False) -> Tensor:
    """x [P, i], or of tokens [T, i] if `gathered`, times weights [E, o, i], if `transposed`, or [E, i, o] -> [P, o]."""
    depth, width = x.shape[1], weights.shape[1 if transposed else 2]
    columns, step, warps, stages = tiles(rows.height, width, depth, x.dtype)
    out = x.new_empty(rows.slot.numel(), width)
    _rows_times_weights[programs(rows, width // columns, warps)](
        x if gathered else described(x, rows.height, step),
        described(weights, *((columns, step) if transposed else (step, columns))),
        described(out, rows.height, columns // 2),
        rows.slot, rows.expert, rows.first, rows.counts, rows.total, depth, width,
        K=rows.row.numel() // x.shape[0] if gathered else 1,
        ROWS=rows.height, COLUMNS=columns, DEPTH=step, BAND=BAND, GATHERED=gathered, TRANSPOSED=transposed,
        PRECISION=precision(x.dtype), num_warps=warps, num_stages=stages, **SAME_BITS,
    )  # fmt: skip
    return out


def combine(x: Tensor, rows: Rows, k: int, dtype: torch.dtype, shared: Tensor | None = None) -> Tensor:
    """Sums [T, N] of rows [P, N] by token, and of `shared` [T, N] if there is one."""
    tokens, width = rows.row.numel() // k, x.shape[1]
    out = x.new_empty(tokens, width, dtype=dtype)
    _combine[(tokens, triton.cdiv(width, CHANNELS))](
        x, rows.row, x if shared is None else shared, out, width,
        K=k, C=CHANNELS, SHARED=shared is not None, num_warps=4, **SAME_BITS,
    )  # fmt: skip
    return out


def check(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> None:
    """ValueError, by name, for what the kernels do not take."""
    check_dtypes(x=x, gate_up=gate_up, down=down)
    if weights.dtype != torch.float32:
        raise ValueError(f"weights: {weights.dtype}; the Triton kernels take float32")
    for name, size in (("hidden size", x.shape[1]), ("width of an expert", down.shape[2])):
        if size % STEP:
            raise ValueError(f"{name}: {size}; the Triton kernels take multiples of {STEP}")


class Experts(torch.autograd.Function):
    """`kernels.moe.experts`. `keep` says whether there will be a backward; it keeps the first product, not `hidden`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, shared: Tensor | None,
        limit: float, keep: bool,
    ) -> Tensor:  # fmt: skip
        check(x, weights, gate_up, down)
        dtype = torch.float32
        if shared is not None:
            dtype, shared = check_dtypes(x=x, shared=shared), shared.contiguous()
        if ids.numel() == 0:
            ctx.save_for_backward(x, weights, gate_up, down)
            return x.new_zeros(x.shape, dtype=dtype)
        x, weights, gate_up, down = (a.contiguous() for a in (x, weights, gate_up, down))
        experts, k = gate_up.shape[0], ids.shape[1]
        rows = sort_rows(ids, experts, height_of(ids.numel(), experts, x.dtype))
        projected, hidden = project_up(x, weights, gate_up, rows, limit, keep)
        ctx.save_for_backward(x, weights, gate_up, down, projected, *rows[1:])
        ctx.height, ctx.limit = rows.height, limit
        out = rows_times_weights(hidden, down, rows, transposed=True)
        del hidden  # as large as half of `out`, where memory is fullest
        return combine(out, rows, k, dtype, shared)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from .moe_backward import experts_backward

        x, weights, gate_up, down, *saved = ctx.saved_tensors
        if not saved:
            zeros = [torch.zeros_like(a) for a in (weights, gate_up, down)]
            return torch.zeros_like(x), None, *zeros, grads[0] if ctx.needs_input_grad[5] else None, None, None
        projected, *rest = saved
        of_x, *others = experts_backward(
            grads[0], x, weights, gate_up, down, projected, Rows(ctx.height, *rest), ctx.limit, ctx.needs_input_grad
        )
        return of_x, None, *others, grads[0] if ctx.needs_input_grad[5] else None, None, None
