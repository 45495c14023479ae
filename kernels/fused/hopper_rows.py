"""The gradient of attention's rows for Hopper, in Gluon: what `attention_backward._rows_backward` computes.

A program has 64 rows and a share of the queries that see any of them. Queries come 64 heads at a time, in two halves.
One warpgroup finds the probabilities of the first half and their gradients, another those of the second; each keeps
half of the rows' channels and adds both halves' products to them, the first before the second.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper import barrier, described
from .launch import HOPPER_ROWS

ROWS, HALF = gl.constexpr(HOPPER_ROWS), gl.constexpr(32)  # rows of a program; heads of half a step


@gluon.jit
def _steps(low, high, blocks):
    """The steps of a program: a query's blocks of 64 heads after another, and the queries'."""
    tile, part, parts = gl.program_id(0), gl.program_id(1), gl.num_programs(1)
    begin, end = gl.load(low + tile), gl.load(high + tile)
    share = (end - begin + parts - 1) // parts
    return (begin + part * share) * blocks, gl.minimum(begin + (part + 1) * share, end) * blocks


@gluon.jit
def _load(q, grad, rows, low, high, keys_s, query_s, grad_s, full, empty, keys_full, blocks, D: gl.constexpr):
    begin, end = _steps(low, high, blocks)
    mbarrier.expect(keys_full, ROWS * D * 2)
    for side in gl.static_range(2):
        tma.async_copy_global_to_shared(rows, [gl.program_id(0) * ROWS, side * (D // 2)], keys_full, keys_s.index(side))
    for i in range(begin, end):
        for half in gl.static_range(2):
            mbarrier.wait(empty.index(half), ((i - begin) & 1) ^ 1)
            mbarrier.expect(full.index(half), 2 * HALF * D * 2)
            for side in gl.static_range(2):
                at, to = [(2 * i + half) * HALF, side * (D // 2)], 2 * half + side
                tma.async_copy_global_to_shared(q, at, full.index(half), query_s.index(to))
                tma.async_copy_global_to_shared(grad, at, full.index(half), grad_s.index(to))


@gluon.jit
def _multiply(
    own: gl.constexpr, parts, lse, delta, first, position, low, high, keys_s, query_s, grad_s, weights_s, slope_s,
    full, empty, weights_full, keys_full, scale, ratio, blocks, D: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Scores the `own` half of each step's heads; sums up the `own` half of the channels."""
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    begin, end = _steps(low, high, blocks)
    r = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, of_scores))
    h = own * HALF + gl.arange(0, HALF, gl.SliceLayout(0, of_scores))
    sums = gl.zeros([ROWS, D // 2], gl.float32, of_sums)
    mbarrier.wait(keys_full, 0)
    for i in range(begin, end):
        turn = i - begin
        # Always 0, which the compiler does not know: else it keeps the operands' addresses in registers.
        zero = turn >> 30
        t = i // blocks
        lse_H = gl.load(lse + i.to(gl.int64) * (2 * HALF) + h)
        delta_H = gl.load(delta + i.to(gl.int64) * (2 * HALF) + h)
        start = gl.load(first + t)
        if W > 0:
            seen = (r >= start) & (r <= t) & (r > t - W)
        else:
            seen = (r >= start) & (r < start + (gl.load(position + t) + 1) // ratio)
        mbarrier.wait(full.index(own), turn & 1)
        scores = gl.zeros([ROWS, HALF], gl.float32, of_scores)
        inner = gl.zeros([ROWS, HALF], gl.float32, of_scores)
        mine = zero + 2 * own
        scores = warpgroup_mma(
            keys_s.index(zero), query_s.index(mine).permute((1, 0)), scores, use_acc=False, is_async=True
        )
        scores = warpgroup_mma(keys_s.index(zero + 1), query_s.index(mine + 1).permute((1, 0)), scores, is_async=True)
        inner = warpgroup_mma(
            keys_s.index(zero), grad_s.index(mine).permute((1, 0)), inner, use_acc=False, is_async=True
        )
        inner = warpgroup_mma(keys_s.index(zero + 1), grad_s.index(mine + 1).permute((1, 0)), inner, is_async=True)
        scores, inner = warpgroup_mma_wait(0, [scores, inner])
        weights = gl.where(seen[:, None], gl.exp2(scores * scale - lse_H[None, :]), 0.0)
        slope = weights * (inner - delta_H[None, :]) * (scale * 0.6931471805599453)
        weights_s.index(own).store(weights.to(gl.bfloat16))
        slope_s.index(own).store(slope.to(gl.bfloat16))
        fence_async_shared()
        barrier()
        mbarrier.arrive(weights_full.index(own), count=1)
        for half in gl.static_range(2):
            if half != own:
                mbarrier.wait(weights_full.index(half), turn & 1)
                mbarrier.wait(full.index(half), turn & 1)
            side = zero + 2 * half + own
            sums = warpgroup_mma(weights_s.index(zero + half), grad_s.index(side), sums, is_async=True)
            sums = warpgroup_mma(slope_s.index(zero + half), query_s.index(side), sums, is_async=True)
            sums = warpgroup_mma_wait(0, [sums])
            barrier()
            mbarrier.arrive(empty.index(half), count=1)
    at = (gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)).to(gl.int64) * ROWS
    at += gl.arange(0, ROWS, gl.SliceLayout(1, of_sums))
    d = own * (D // 2) + gl.arange(0, D // 2, gl.SliceLayout(0, of_sums))
    gl.store(parts + at[:, None] * D + d[None, :], sums)


@gluon.jit
def rows_kernel(
    q, grad, rows, parts, lse, delta, first, position, low, high, scale, ratio, blocks, D: gl.constexpr, W: gl.constexpr
):
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    narrow: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    keys_s = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, D // 2], shared)
    query_s = gl.allocate_shared_memory(gl.bfloat16, [4, HALF, D // 2], shared)  # first half's channels, second's
    grad_s = gl.allocate_shared_memory(gl.bfloat16, [4, HALF, D // 2], shared)
    weights_s = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, HALF], narrow)
    slope_s = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, HALF], narrow)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    weights_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    keys_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
        mbarrier.init(weights_full.index(i), count=1)
    mbarrier.init(keys_full, count=1)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0,
                    parts, lse, delta, first, position, low, high, keys_s, query_s, grad_s, weights_s, slope_s,
                    full, empty, weights_full, keys_full, scale, ratio, blocks, D, W,
                ),
            ),
            (
                _multiply,
                (
                    1,
                    parts, lse, delta, first, position, low, high, keys_s, query_s, grad_s, weights_s, slope_s,
                    full, empty, weights_full, keys_full, scale, ratio, blocks, D, W,
                ),
            ),
            (_load, (q, grad, rows, low, high, keys_s, query_s, grad_s, full, empty, keys_full, blocks, D)),
        ],
        [4, 1],
        [232, 32],
    )  # fmt: skip


def rows_backward(
    q: Tensor, rows: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, parts: Tensor, first: Tensor, position: Tensor,
    low: Tensor, high: Tensor, scale: float, ratio: int, window: int,
) -> None:  # fmt: skip
    """Fills parts fp32 [P, tiles * 64, D] with 64 rows' gradients a tile from P shares of the queries `low` ... `high`.

    Arguments as `attention_backward._rows_backward` has them; bf16, D = 512, a multiple of 64 heads.
    """
    _, heads, width = q.shape
    rows_kernel[(low.numel(), parts.shape[0])](
        described(q.flatten(0, 1), 32), described(grad.flatten(0, 1), 32), described(rows, 64), parts, lse, delta,
        first, position, low, high, scale, ratio, heads // 64, D=width, W=window, num_warps=4,
    )  # fmt: skip
