"""The gradient of attention's rows for Hopper, in Gluon: what `attention_backward._rows_backward` computes.

A program has 64 rows and a share of the queries that see any of them, which come 64 heads at a time. One warpgroup
finds the probabilities, another the slopes (their gradients before the softmax); each keeps half of the rows' channels
and adds to them what probabilities bring, then what slopes bring. A slope takes its probability rounded to bf16.
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

ROWS, HEADS = gl.constexpr(HOPPER_ROWS), gl.constexpr(64)  # of a program, of a step


@gluon.jit
def _steps(low, high, blocks):
    """The steps of a program: a query's blocks of 64 heads after another, and the queries'."""
    tile, part, parts = gl.program_id(0), gl.program_id(1), gl.num_programs(1)
    begin, end = gl.load(low + tile), gl.load(high + tile)
    share = (end - begin + parts - 1) // parts
    return (begin + part * share) * blocks, gl.minimum(begin + (part + 1) * share, end) * blocks


@gluon.jit
def _load(q, grad, rows, low, high, keys_s, query_s, grad_s, full, empty, keys_full, blocks, D: gl.constexpr):
    """Barriers: of the queries' halves, then of their gradients'."""
    begin, end = _steps(low, high, blocks)
    mbarrier.expect(keys_full, ROWS * D * 2)
    for side in gl.static_range(2):
        tma.async_copy_global_to_shared(rows, [gl.program_id(0) * ROWS, side * (D // 2)], keys_full, keys_s.index(side))
    for i in range(begin, end):
        turn = i - begin
        for side in gl.static_range(2):
            _copy(grad, i, side, turn, full.index(2 + side), empty.index(2 + side), grad_s.index(side), D)
        for side in gl.static_range(2):
            _copy(q, i, side, turn, full.index(side), empty.index(side), query_s.index(side), D)


@gluon.jit
def _copy(data, i, side, turn, full, empty, to, D: gl.constexpr):
    mbarrier.wait(empty, (turn & 1) ^ 1)
    mbarrier.expect(full, HEADS * D)
    tma.async_copy_global_to_shared(data, [i * HEADS, side * (D // 2)], full, to)


@gluon.jit
def _products(left_s, keys_s, full, first: gl.constexpr, turn, zero):
    """[heads, rows]: all channels of queries, or of their gradients, times those of the rows, as they arrive."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    sums = gl.zeros([HEADS, ROWS], gl.float32, layout)
    for side in gl.static_range(2):
        mbarrier.wait(full.index(first + side), turn & 1)
        keys = keys_s.index(zero + side).permute((1, 0))
        sums = warpgroup_mma(left_s.index(zero + side), keys, sums, use_acc=side == 1, is_async=True)
    return warpgroup_mma_wait(0, [sums])


@gluon.jit
def _store(sums, parts, own: gl.constexpr, D: gl.constexpr):
    layout: gl.constexpr = sums.type.layout
    at = (gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)).to(gl.int64) * ROWS
    at += gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    d = own * (D // 2) + gl.arange(0, D // 2, gl.SliceLayout(0, layout))
    gl.store(parts + at[:, None] * D + d[None, :], sums)


@gluon.jit
def _weigh(
    parts, lse, first, position, low, high, keys_s, query_s, grad_s, weights_s, slope_s,
    full, empty, weights_full, slope_full, keys_full, scale, ratio, blocks, D: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """The probabilities; the lower half of the channels."""
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    begin, end = _steps(low, high, blocks)
    h = gl.arange(0, HEADS, gl.SliceLayout(1, of_scores))
    r = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, of_scores))
    sums = gl.zeros([ROWS, D // 2], gl.float32, of_sums)
    mbarrier.wait(keys_full, 0)
    for i in range(begin, end):
        turn = i - begin
        # Always 0, which the compiler does not know: else it keeps the operands' addresses in registers.
        zero = turn >> 30
        t = i // blocks
        lse_H = gl.load(lse + i.to(gl.int64) * HEADS + h)
        start = gl.load(first + t)
        if W > 0:
            seen = (r >= start) & (r <= t) & (r > t - W)
        else:
            seen = (r >= start) & (r < start + (gl.load(position + t) + 1) // ratio)
        # The queries are there: the other warpgroup has read the weights of the step before for the last time.
        scores = _products(query_s, keys_s, full, 0, turn, zero)
        weights = gl.where(seen[None, :], gl.exp2(scores * scale - lse_H[:, None]), 0.0)
        weights_s.index(zero).store(weights.to(gl.bfloat16))
        fence_async_shared()
        barrier()
        mbarrier.arrive(weights_full, count=1)
        mbarrier.wait(full.index(2), turn & 1)
        sums = warpgroup_mma(weights_s.index(zero).permute((1, 0)), grad_s.index(zero), sums, is_async=True)
        sums = warpgroup_mma_wait(0, [sums])
        barrier()
        mbarrier.arrive(empty.index(2), count=1)
        mbarrier.wait(slope_full, turn & 1)
        sums = warpgroup_mma(slope_s.index(zero).permute((1, 0)), query_s.index(zero), sums, is_async=True)
        sums = warpgroup_mma_wait(0, [sums])
        barrier()
        mbarrier.arrive(empty.index(0), count=1)
    _store(sums, parts, 0, D)


@gluon.jit
def _incline(
    parts, delta, low, high, keys_s, query_s, grad_s, weights_s, slope_s,
    full, empty, weights_full, slope_full, keys_full, scale, blocks, D: gl.constexpr,
):  # fmt: skip
    """The slopes; the upper half of the channels."""
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    begin, end = _steps(low, high, blocks)
    h = gl.arange(0, HEADS, gl.SliceLayout(1, of_scores))
    sums = gl.zeros([ROWS, D // 2], gl.float32, of_sums)
    mbarrier.wait(keys_full, 0)
    for i in range(begin, end):
        turn = i - begin
        zero = turn >> 30
        delta_H = gl.load(delta + i.to(gl.int64) * HEADS + h)
        inner = _products(grad_s, keys_s, full, 2, turn, zero)
        mbarrier.wait(weights_full, turn & 1)
        sums = warpgroup_mma(weights_s.index(zero).permute((1, 0)), grad_s.index(zero + 1), sums, is_async=True)
        # While that is under way: it reads the weights too.
        weights = weights_s.index(zero).load(of_scores).to(gl.float32)
        slope = weights * (inner - delta_H[:, None]) * (scale * 0.6931471805599453)
        slope_s.index(zero).store(slope.to(gl.bfloat16))
        fence_async_shared()
        barrier()
        mbarrier.arrive(slope_full, count=1)
        mbarrier.arrive(empty.index(2), count=1)
        sums = warpgroup_mma_wait(0, [sums])
        barrier()
        mbarrier.arrive(empty.index(3), count=1)
        mbarrier.wait(full.index(1), turn & 1)
        sums = warpgroup_mma(slope_s.index(zero).permute((1, 0)), query_s.index(zero + 1), sums, is_async=True)
        sums = warpgroup_mma_wait(0, [sums])
        barrier()
        mbarrier.arrive(empty.index(1), count=1)
    _store(sums, parts, 1, D)


@gluon.jit
def rows_kernel(
    q, grad, rows, parts, lse, delta, first, position, low, high, scale, ratio, blocks, D: gl.constexpr, W: gl.constexpr
):
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    keys_s = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, D // 2], shared)  # halves of the channels
    query_s = gl.allocate_shared_memory(gl.bfloat16, [2, HEADS, D // 2], shared)
    grad_s = gl.allocate_shared_memory(gl.bfloat16, [2, HEADS, D // 2], shared)
    weights_s = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, ROWS], shared)
    slope_s = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, ROWS], shared)
    full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    weights_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    slope_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    keys_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(full.index(i), count=1)
        # Both warpgroups read the lower half of the gradients, and only the own half of anything else to its end.
        mbarrier.init(empty.index(i), count=2 if i == 2 else 1)
    mbarrier.init(weights_full, count=1)
    mbarrier.init(slope_full, count=1)
    mbarrier.init(keys_full, count=1)
    gl.warp_specialize(
        [
            (
                _weigh,
                (
                    parts, lse, first, position, low, high, keys_s, query_s, grad_s, weights_s, slope_s,
                    full, empty, weights_full, slope_full, keys_full, scale, ratio, blocks, D, W,
                ),
            ),
            (
                _incline,
                (
                    parts, delta, low, high, keys_s, query_s, grad_s, weights_s, slope_s,
                    full, empty, weights_full, slope_full, keys_full, scale, blocks, D,
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
        described(q.flatten(0, 1), 64), described(grad.flatten(0, 1), 64), described(rows, 64), parts, lse, delta,
        first, position, low, high, scale, ratio, heads // 64, D=width, W=window, num_warps=4,
    )  # fmt: skip
