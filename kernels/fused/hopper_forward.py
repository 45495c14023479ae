"""The forward of `kernels.attention.attend` for Hopper, in Gluon: what `attention.py` computes, with loads and products
in different warps.

Tiles of 64 keys are taken in pairs. One warpgroup scores a pair's first tile, another its second; each keeps half of
the output's channels and adds both tiles to them, the first before the second, so that a row's sums have the order of
its tiles. While one computes a softmax, the other multiplies. Four more warps fetch keys and the next query
(hopper_loads.py). Programs stay and take one query after another. Tiles, order and the split at every 1,024 entries are
those of `attention.py`.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper import barrier, described, masked, programs
from .hopper_loads import BLOCK, HEADS, item_of, load
from .launch import SAME_BITS


@gluon.jit
def _score(query_s, keys_s, full, first: gl.constexpr, turn, zero, layout: gl.constexpr):
    """[heads, keys]: the query's products with a tile, whose halves are multiplied as they arrive."""
    scores = gl.zeros([HEADS, BLOCK], gl.float32, layout)
    for half in gl.static_range(2):
        mbarrier.wait(full.index(first + half), turn & 1)
        fence_async_shared()
        keys = keys_s.index(zero + first + half).permute((1, 0))
        scores = warpgroup_mma(query_s.index(zero + half), keys, scores, use_acc=half == 1, is_async=True)
    return warpgroup_mma_wait(0, [scores])


@gluon.jit
def _store(
    out, parts, sums, total, t, head, heads, split, queries, half: gl.constexpr, D: gl.constexpr, SPLITS: gl.constexpr
):
    """The output's half of the channels, or a split's sums."""
    layout: gl.constexpr = sums.type.layout
    if SPLITS == 1:
        inverse = gl.convert_layout(1.0 / total, gl.SliceLayout(1, layout))
        # 16 bytes a thread, not by the tensor memory accelerator, in whose queue loads that wait for memory stand.
        wide: gl.constexpr = gl.BlockedLayout([2, 8], [8, 4], [4, 1], [1, 0])
        h = gl.arange(0, HEADS, gl.SliceLayout(1, wide))
        d = half * (D // 2) + gl.arange(0, D // 2, gl.SliceLayout(0, wide))
        values = gl.convert_layout((sums * inverse[:, None]).to(gl.bfloat16), wide)
        gl.store(out + (t * heads + head + h).to(gl.int64)[:, None] * D + d[None, :], values)
    else:
        h = (split.to(gl.int64) * queries + t) * heads + head + gl.arange(0, HEADS, gl.SliceLayout(1, layout))
        d = half * (D // 2) + gl.arange(0, D // 2, gl.SliceLayout(0, layout))
        gl.store(parts + h[:, None] * D + d[None, :], sums)


@gluon.jit
def _first(
    sinks, out, parts, lse, partial, position, keys_s, query_s, weights_s, stats_s, full, empty,
    query_full, query_empty, stats_full, weights_full, scale, heads, ratio, topk, queries, items, blocks, splits,
    D: gl.constexpr, W: gl.constexpr, LIMIT: gl.constexpr, KIND: gl.constexpr, SPLITS: gl.constexpr,
):  # fmt: skip
    """Scores the first tile of each pair; sums up the lower half of the channels."""
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    h = gl.arange(0, HEADS, gl.SliceLayout(1, of_scores))
    turn = 0
    second_turn = 0
    query_turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        t, head, split, place, count, begin, end = item_of(item, position, blocks, splits, ratio, topk, W, KIND, LIMIT)
        if end > 0:
            low = split * LIMIT
            largest = gl.load(sinks + head + h).to(gl.float32) * 1.4426950408889634
            total = gl.full([HEADS], 0.0, gl.float32, gl.SliceLayout(1, of_scores)) + gl.where(split == 0, 1.0, 0.0)
            sums = gl.zeros([HEADS, D // 2], gl.float32, of_sums)
            mbarrier.wait(query_full, query_turn & 1)
            query_turn += 1
            for i in range(begin, end, 2 * BLOCK):
                last = i + 2 * BLOCK >= end
                # Always 0, which the compiler does not know: else it keeps the operands' addresses in registers.
                zero = turn >> 30
                scores = _score(query_s, keys_s, full, 0, turn, zero, of_scores)
                barrier()
                mbarrier.arrive(query_empty, count=1, pred=last)
                scores = masked(scores, i, place, low, count, W, KIND)
                new = gl.maximum(largest, gl.max(scores, 1) * scale)
                stats_s.index(0).store(new)
                barrier()
                mbarrier.arrive(stats_full.index(0), count=1)
                weights = gl.exp2(gl.fma(scores, gl.full_like(scores, 1.0) * scale, -new[:, None]))
                shrink = gl.exp2(largest - new)
                total = gl.fma(total, shrink, gl.sum(weights, 1))
                weights_s.index(zero).store(weights.to(gl.bfloat16))
                stats_s.index(1).store(total)
                fence_async_shared()
                barrier()
                mbarrier.arrive(weights_full.index(0), count=1)
                sums *= gl.convert_layout(shrink, gl.SliceLayout(1, of_sums))[:, None]
                sums = warpgroup_mma(weights_s.index(zero), keys_s.index(zero), sums, is_async=True)
                sums = warpgroup_mma_wait(0, [sums])
                barrier()
                mbarrier.arrive(empty.index(0), count=1)
                # The second tile.
                mbarrier.wait(stats_full.index(1), turn & 1)
                largest = stats_s.index(2).load(gl.SliceLayout(1, of_scores))
                shrink = gl.exp2(new - largest)
                sums *= gl.convert_layout(shrink, gl.SliceLayout(1, of_sums))[:, None]
                mbarrier.wait(weights_full.index(1), turn & 1)
                of_second = stats_s.index(3).load(gl.SliceLayout(1, of_scores))
                total = gl.fma(total, shrink, of_second * gl.where(i + 2 * BLOCK >= end, 1.0, 0.0))
                if i + BLOCK < end:
                    mbarrier.wait(full.index(2), second_turn & 1)
                    fence_async_shared()
                    sums = warpgroup_mma(weights_s.index(zero + 1), keys_s.index(zero + 2), sums, is_async=True)
                    sums = warpgroup_mma_wait(0, [sums])
                    barrier()
                    mbarrier.arrive(empty.index(2), count=1)
                    second_turn += 1
                turn += 1
            if SPLITS == 1:
                gl.store(lse + (t * heads + head).to(gl.int64) + h, largest + gl.log2(total))
            else:
                part = (split.to(gl.int64) * queries + t) * heads + head + h
                gl.store(partial + part * 2, largest)
                gl.store(partial + part * 2 + 1, total)
            _store(out, parts, sums, total, t, head, heads, split, queries, 0, D, SPLITS)


@gluon.jit
def _second(
    sinks, out, parts, position, keys_s, query_s, weights_s, stats_s, full, empty, query_full, query_empty,
    stats_full, weights_full, scale, heads, ratio, topk, queries, items, blocks, splits,
    D: gl.constexpr, W: gl.constexpr, LIMIT: gl.constexpr, KIND: gl.constexpr, SPLITS: gl.constexpr,
):  # fmt: skip
    """Scores the second tile of each pair; sums up the upper half of the channels."""
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    h = gl.arange(0, HEADS, gl.SliceLayout(1, of_scores))
    turn = 0
    second_turn = 0
    query_turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        t, head, split, place, count, begin, end = item_of(item, position, blocks, splits, ratio, topk, W, KIND, LIMIT)
        if end > 0:
            low = split * LIMIT
            largest = gl.load(sinks + head + h).to(gl.float32) * 1.4426950408889634
            total = gl.zeros([HEADS], gl.float32, gl.SliceLayout(1, of_scores))  # of the second tiles
            whole = total
            sums = gl.zeros([HEADS, D // 2], gl.float32, of_sums)
            mbarrier.wait(query_full, query_turn & 1)
            query_turn += 1
            for i in range(begin, end, 2 * BLOCK):
                last = i + 2 * BLOCK >= end
                more = i + BLOCK < end
                # Always 0, which the compiler does not know: else it keeps the operands' addresses in registers.
                zero = turn >> 30
                scores = gl.zeros([HEADS, BLOCK], gl.float32, of_scores)
                if more:
                    scores = _score(query_s, keys_s, full, 2, second_turn, zero, of_scores)
                barrier()
                mbarrier.arrive(query_empty, count=1, pred=last)
                scores = masked(scores, i + BLOCK, place, low, gl.where(more, count, 0), W, KIND)
                peak = gl.max(scores, 1) * scale
                mbarrier.wait(stats_full.index(0), turn & 1)
                before = stats_s.index(0).load(gl.SliceLayout(1, of_scores))
                new = gl.maximum(before, peak)
                stats_s.index(2).store(new)
                barrier()
                mbarrier.arrive(stats_full.index(1), count=1)
                shrink = gl.exp2(largest - before)
                total *= shrink
                sums *= gl.convert_layout(shrink, gl.SliceLayout(1, of_sums))[:, None]
                mbarrier.wait(weights_full.index(0), turn & 1)
                mbarrier.wait(full.index(1), turn & 1)
                fence_async_shared()
                sums = warpgroup_mma(weights_s.index(zero), keys_s.index(zero + 1), sums, is_async=True)
                # While that is under way: the second tile's weights.
                weights = gl.exp2(gl.fma(scores, gl.full_like(scores, 1.0) * scale, -new[:, None]))
                shrink = gl.exp2(before - new)
                total = gl.fma(total, shrink, gl.sum(weights, 1))
                whole = gl.fma(stats_s.index(1).load(gl.SliceLayout(1, of_scores)), shrink, total)
                largest = new
                weights_s.index(zero + 1).store(weights.to(gl.bfloat16))
                stats_s.index(3).store(total)
                fence_async_shared()
                barrier()
                mbarrier.arrive(weights_full.index(1), count=1)
                sums = warpgroup_mma_wait(0, [sums])
                barrier()
                mbarrier.arrive(empty.index(1), count=1)
                if more:
                    sums *= gl.convert_layout(shrink, gl.SliceLayout(1, of_sums))[:, None]
                    sums = warpgroup_mma(weights_s.index(zero + 1), keys_s.index(zero + 3), sums, is_async=True)
                    sums = warpgroup_mma_wait(0, [sums])
                    barrier()
                    mbarrier.arrive(empty.index(3), count=1)
                    second_turn += 1
                turn += 1
            _store(out, parts, sums, whole, t, head, heads, split, queries, 1, D, SPLITS)


@gluon.jit
def forward_kernel(
    q, rows, entries, row_data, entry_data, chosen, sinks, out, lse, partial, parts, position, row_first, entry_first,
    table, scale, heads, slots, ratio, topk, queries, items, blocks, splits,
    D: gl.constexpr, W: gl.constexpr, LIMIT: gl.constexpr, KIND: gl.constexpr, RING: gl.constexpr, PAGE: gl.constexpr,
    SPLITS: gl.constexpr,
):  # fmt: skip
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    keys_s = gl.allocate_shared_memory(gl.bfloat16, [4, BLOCK, D // 2], shared)  # first tile's halves, second's
    query_s = gl.allocate_shared_memory(gl.bfloat16, [2, HEADS, D // 2], shared)
    weights_s = gl.allocate_shared_memory(gl.bfloat16, [2, HEADS, BLOCK], shared)
    stats_s = gl.allocate_shared_memory(gl.float32, [4, HEADS], plain)  # maximum and total, of the first, of the second
    full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    weights_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    stats_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    query_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    query_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(full.index(i), count=128)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(weights_full.index(i), count=1)
        mbarrier.init(stats_full.index(i), count=1)
    mbarrier.init(query_full, count=1)
    mbarrier.init(query_empty, count=2)
    gl.warp_specialize(
        [
            (
                _first,
                (
                    sinks, out, parts, lse, partial, position, keys_s, query_s, weights_s, stats_s, full, empty,
                    query_full, query_empty, stats_full, weights_full, scale, heads, ratio, topk, queries, items,
                    blocks, splits, D, W, LIMIT, KIND, SPLITS,
                ),
            ),
            (
                _second,
                (
                    sinks, out, parts, position, keys_s, query_s, weights_s, stats_s, full, empty,
                    query_full, query_empty, stats_full, weights_full, scale, heads, ratio, topk, queries, items,
                    blocks, splits, D, W, LIMIT, KIND, SPLITS,
                ),
            ),
            (
                load,
                (
                    q, rows, entries, row_data, entry_data, chosen, position, row_first, entry_first, table,
                    keys_s, query_s, full, empty, query_full, query_empty, heads, slots, ratio,
                    topk, items, blocks, splits, D, W, LIMIT, KIND, RING, PAGE,
                ),
            ),
        ],
        [4, 4],
        [200, 104],
    )  # fmt: skip


def forward(
    q: Tensor, rows: Tensor, entries: Tensor, chosen: Tensor, sinks: Tensor, out: Tensor, lse: Tensor, partial: Tensor,
    parts: Tensor, position: Tensor, row_first: Tensor, entry_first: Tensor, scale: float, slots: int, ratio: int,
    topk: int, splits: int, window: int, kind: int, limit: int, table: Tensor | None = None, page: int = 0,
) -> None:  # fmt: skip
    """Launches the kernel; arguments as `attention._forward` has them. bf16, D = 512, a multiple of 64 heads."""
    if slots and kind == 0:  # Triton 3.6 does not compile a ring without entries: an entry that never comes
        kind, ratio = 1, 2**30
    queries, heads, width = q.shape
    items = queries * (heads // 64) * splits
    forward_kernel[(programs(items, q.device),)](
        described(q.flatten(0, 1), 64), described(rows, 64), described(entries, 64), rows, entries, chosen, sinks,
        out, lse, partial, parts, position, row_first, entry_first, table,
        scale, heads, slots, ratio, topk, queries, items, heads // 64, splits,
        D=width, W=window, LIMIT=limit, KIND=kind, RING=slots > 0, PAGE=page, SPLITS=min(splits, 2),
        num_warps=4, **SAME_BITS,
    )  # fmt: skip
