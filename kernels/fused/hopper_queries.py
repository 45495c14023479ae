"""The gradient of attention's queries for Hopper, in Gluon, and each query's products with its chosen entries: what
`attention_backward._queries_backward` computes.

Tiles of 32 keys are taken in pairs. One warpgroup finds the probabilities of a pair's first tile and their gradients,
another those of its second; each keeps half of the query's channels and adds both tiles to them, the first before the
second. A chosen entry's product takes the place of the entry in shared memory on its way out.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper import barrier, described, programs
from .launch import HOPPER_KEYS

HEADS, BLOCK = gl.constexpr(64), gl.constexpr(HOPPER_KEYS)  # of one program, of one tile of keys


@gluon.jit
def _item(item, position, ratio, topk, W: gl.constexpr, BLOCKS: gl.constexpr, KIND: gl.constexpr):
    """Query, first of its heads among all queries', position, entries, and the end of the tiles' places."""
    t = item // BLOCKS
    place = gl.load(position + t)
    count = 0
    if KIND != 0:
        count = (place + 1) // ratio
        if KIND == 2:
            count = gl.minimum(count, topk)
    WINDOW: gl.constexpr = (W + BLOCK - 1) // BLOCK * BLOCK  # where the tiles of entries begin
    return t, item * HEADS, place, count, WINDOW + count


@gluon.jit
def _load_tile(
    rows, entries, entry_data, chosen, keys_s, full, empty, i, place, first, first_entry, count, turn,
    tile: gl.constexpr, D: gl.constexpr, W: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    WINDOW: gl.constexpr = (W + BLOCK - 1) // BLOCK * BLOCK
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    at = i - WINDOW + gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
    index = at
    if KIND == 2:
        index = first_entry + gl.load(chosen + at, mask=(at >= 0) & (at < count), other=0)
    for side in gl.static_range(2):
        buffer = 2 * tile + side
        mbarrier.wait(empty.index(buffer), (turn & 1) ^ 1)
        if i < WINDOW:
            mbarrier.expect(full.index(buffer), BLOCK * D)
            at_row = [first + place - (W - 1) + i, side * (D // 2)]
            tma.async_copy_global_to_shared(rows, at_row, full.index(buffer), keys_s.index(buffer))
            mbarrier.arrive(full.index(buffer), count=127)  # the barrier awaits all threads that could copy
        elif KIND == 2:
            d = side * (D // 2) + gl.arange(0, D // 2, gl.SliceLayout(0, layout))
            where = entry_data + index.to(gl.int64)[:, None] * D + d[None, :]
            async_copy.async_copy_global_to_shared(keys_s.index(buffer), where)
            async_copy.mbarrier_arrive(full.index(buffer), increment_count=False)
        else:
            mbarrier.expect(full.index(buffer), BLOCK * D)
            at_entry = [first_entry + i - WINDOW, side * (D // 2)]
            tma.async_copy_global_to_shared(entries, at_entry, full.index(buffer), keys_s.index(buffer))
            mbarrier.arrive(full.index(buffer), count=127)


@gluon.jit
def _load(
    q, grad, rows, entries, entry_data, chosen, position, row_first, entry_first,
    keys_s, query_s, grad_s, full, empty, query_full, query_empty,
    ratio, topk, items,
    D: gl.constexpr, W: gl.constexpr, BLOCKS: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    turn = 0
    second_turn = 0
    query_turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        t, head, place, count, end = _item(item, position, ratio, topk, W, BLOCKS, KIND)
        mbarrier.wait(query_empty, (query_turn & 1) ^ 1)
        mbarrier.expect(query_full, 2 * HEADS * D * 2)
        for side in gl.static_range(2):
            at = [head, side * (D // 2)]
            tma.async_copy_global_to_shared(q, at, query_full, query_s.index(side))
            tma.async_copy_global_to_shared(grad, at, query_full, grad_s.index(side))
        query_turn += 1
        first = gl.load(row_first + t)
        first_entry = gl.load(entry_first + t)
        own = chosen + t.to(gl.int64) * topk
        for i in range(0, end, 2 * BLOCK):
            _load_tile(
                rows, entries, entry_data, own, keys_s, full, empty, i, place, first, first_entry, count,
                turn, 0, D, W, KIND,
            )  # fmt: skip
            turn += 1
            if i + BLOCK < end:
                _load_tile(
                    rows, entries, entry_data, own, keys_s, full, empty, i + BLOCK, place, first, first_entry, count,
                    second_turn, 1, D, W, KIND,
                )  # fmt: skip
                second_turn += 1


@gluon.jit
def _add(
    sums, pairs, of_rows, chosen, i, row, place, first, first_entry, count, zero, keys_s, query_s, grad_s, weights_s,
    slope_s, full, empty, weights_full, turn, own: gl.constexpr, tile: gl.constexpr,
    D: gl.constexpr, W: gl.constexpr, KIND: gl.constexpr, ATOMIC: gl.constexpr,
):  # fmt: skip
    """Adds a tile to the own half of the query's channels; the tile's own products to `pairs`, from `row` on, or, with
    ATOMIC, to what is there for its entries and, in `of_rows`, for its rows."""
    WINDOW: gl.constexpr = (W + BLOCK - 1) // BLOCK * BLOCK
    of_keys_: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    if tile != own:
        mbarrier.wait(weights_full.index(tile), turn & 1)
        mbarrier.wait(full.index(2 * tile + own), turn & 1)
        fence_async_shared()
    keys = keys_s.index(zero + 2 * tile + own)
    slope = slope_s.index(zero + tile)
    if KIND == 2:
        if ATOMIC or i >= WINDOW:
            sums = warpgroup_mma(slope, keys, sums, is_async=True)
            for part in gl.static_range(2):  # one after the other, or registers would not do
                query = query_s.index(zero + own).permute((1, 0)).slice(part * (D // 4), D // 4)
                grad = grad_s.index(zero + own).permute((1, 0)).slice(part * (D // 4), D // 4)
                of_keys = gl.zeros([D // 4, BLOCK], gl.float32, of_keys_)
                of_keys = warpgroup_mma(query, slope, of_keys, use_acc=False, is_async=True)
                of_keys = warpgroup_mma(grad, weights_s.index(zero + tile), of_keys, is_async=True)
                sums, of_keys = warpgroup_mma_wait(0, [sums, of_keys])
                barrier()
                keys.permute((1, 0)).slice(part * (D // 4), D // 4).store(of_keys.to(gl.bfloat16))
            if ATOMIC:
                barrier()
                layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
                at = i + gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
                number = place - (W - 1) + at
                seen = (number >= 0) & (at < W)
                to, index = of_rows, first + number
                if i >= WINDOW:
                    seen = at - WINDOW < count
                    to, index = pairs, first_entry + gl.load(chosen + at - WINDOW, mask=seen, other=0)
                d = own * (D // 2) + gl.arange(0, D // 2, gl.SliceLayout(0, layout))
                to += index.to(gl.int64)[:, None] * D + d[None, :]
                gl.atomic_add(to, keys.load(layout).to(gl.float32), mask=seen[:, None], sem="relaxed")
                fence_async_shared()
            else:
                fence_async_shared()
                barrier()
                tma.async_copy_shared_to_global(pairs, [row + i - WINDOW, own * (D // 2)], keys)
                tma.store_wait(0)
        else:
            sums = warpgroup_mma(slope, keys, sums, is_async=True)
            sums = warpgroup_mma_wait(0, [sums])
    else:
        sums = warpgroup_mma(slope, keys, sums, is_async=True)
        sums = warpgroup_mma_wait(0, [sums])
    barrier()
    mbarrier.arrive(empty.index(2 * tile + own), count=1)
    return sums


@gluon.jit
def _multiply(
    own: gl.constexpr, grad_q, pairs, of_rows, chosen, lse, delta, position, row_first, entry_first,
    keys_s, query_s, grad_s, weights_s, slope_s, full, empty, query_full, query_empty, weights_full,
    scale, ratio, topk, items,
    D: gl.constexpr, W: gl.constexpr, BLOCKS: gl.constexpr, KIND: gl.constexpr, ATOMIC: gl.constexpr,
):  # fmt: skip
    """Scores the `own` tile of each pair; sums up the `own` half of the channels."""
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    WINDOW: gl.constexpr = (W + BLOCK - 1) // BLOCK * BLOCK
    h = gl.arange(0, HEADS, gl.SliceLayout(1, of_scores))
    lane = gl.arange(0, BLOCK, gl.SliceLayout(0, of_scores))
    turn = 0
    second_turn = 0
    query_turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        t, head, place, count, end = _item(item, position, ratio, topk, W, BLOCKS, KIND)
        lse_H = gl.load(lse + head.to(gl.int64) + h)
        delta_H = gl.load(delta + head.to(gl.int64) + h)
        first = gl.load(row_first + t)
        first_entry = gl.load(entry_first + t)
        of_query = chosen + t.to(gl.int64) * topk
        sums = gl.zeros([HEADS, D // 2], gl.float32, of_sums)
        mbarrier.wait(query_full, query_turn & 1)
        query_turn += 1
        for i in range(0, end, 2 * BLOCK):
            # Always 0, which the compiler does not know: else it keeps the operands' addresses in registers.
            zero = turn >> 30
            first_pair = item * ((topk + BLOCK - 1) // BLOCK * BLOCK)
            more = i + BLOCK < end
            own_turn = second_turn if own == 1 else turn
            if (i + own * BLOCK) < end:
                mbarrier.wait(full.index(2 * own), own_turn & 1)
                mbarrier.wait(full.index(2 * own + 1), own_turn & 1)
                fence_async_shared()
                scores = gl.zeros([HEADS, BLOCK], gl.float32, of_scores)
                inner = gl.zeros([HEADS, BLOCK], gl.float32, of_scores)
                for side in gl.static_range(2):
                    keys = keys_s.index(zero + 2 * own + side).permute((1, 0))
                    scores = warpgroup_mma(query_s.index(zero + side), keys, scores, use_acc=side == 1, is_async=True)
                for side in gl.static_range(2):
                    keys = keys_s.index(zero + 2 * own + side).permute((1, 0))
                    inner = warpgroup_mma(grad_s.index(zero + side), keys, inner, use_acc=side == 1, is_async=True)
                scores, inner = warpgroup_mma_wait(0, [scores, inner])
                at = i + own * BLOCK + lane
                number = place - (W - 1) + at
                seen = (number >= 0) & (at < W)
                if KIND != 0:
                    seen = seen | ((at >= WINDOW) & (at - WINDOW < count))
                weights = gl.where(seen[None, :], gl.exp2(scores * scale - lse_H[:, None]), 0.0)
                slope = weights * (inner - delta_H[:, None]) * (scale * 0.6931471805599453)
                slope_s.index(own).store(slope.to(gl.bfloat16))
                if KIND == 2:
                    weights_s.index(own).store(weights.to(gl.bfloat16))
                fence_async_shared()
                barrier()
                mbarrier.arrive(weights_full.index(own), count=1)
            sums = _add(
                sums, pairs, of_rows, of_query, i, first_pair, place, first, first_entry, count, zero, keys_s, query_s,
                grad_s, weights_s, slope_s, full, empty, weights_full, turn, own, 0, D, W, KIND, ATOMIC,
            )  # fmt: skip
            if more:
                sums = _add(
                    sums, pairs, of_rows, of_query, i + BLOCK, first_pair, place, first, first_entry, count,
                    second_turn >> 30, keys_s, query_s, grad_s, weights_s, slope_s, full, empty, weights_full,
                    second_turn, own, 1, D, W, KIND, ATOMIC,
                )  # fmt: skip
                second_turn += 1
            turn += 1
        barrier()
        mbarrier.arrive(query_empty, count=1)
        # 16 bytes a thread, not by the tensor memory accelerator, in whose queue loads that wait for memory stand.
        wide: gl.constexpr = gl.BlockedLayout([2, 8], [8, 4], [4, 1], [1, 0])
        row = (head + gl.arange(0, HEADS, gl.SliceLayout(1, wide))).to(gl.int64)
        d = own * (D // 2) + gl.arange(0, D // 2, gl.SliceLayout(0, wide))
        gl.store(grad_q + row[:, None] * D + d[None, :], gl.convert_layout(sums.to(gl.bfloat16), wide))


@gluon.jit
def queries_kernel(
    q, grad, rows, entries, entry_data, chosen, lse, delta, grad_q, pairs, of_rows, position, row_first, entry_first,
    scale, ratio, topk, items,
    D: gl.constexpr, W: gl.constexpr, BLOCKS: gl.constexpr, KIND: gl.constexpr, ATOMIC: gl.constexpr,
):  # fmt: skip
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    narrow: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    keys_s = gl.allocate_shared_memory(gl.bfloat16, [4, BLOCK, D // 2], shared)  # first tile's halves, second's
    query_s = gl.allocate_shared_memory(gl.bfloat16, [2, HEADS, D // 2], shared)
    grad_s = gl.allocate_shared_memory(gl.bfloat16, [2, HEADS, D // 2], shared)
    weights_s = gl.allocate_shared_memory(gl.bfloat16, [2, HEADS, BLOCK], narrow)
    slope_s = gl.allocate_shared_memory(gl.bfloat16, [2, HEADS, BLOCK], narrow)
    full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    weights_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    query_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    query_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(full.index(i), count=128)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(weights_full.index(i), count=1)
    mbarrier.init(query_full, count=1)
    mbarrier.init(query_empty, count=2)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0, grad_q, pairs, of_rows, chosen, lse, delta, position, row_first, entry_first, keys_s, query_s,
                    grad_s, weights_s, slope_s, full, empty, query_full, query_empty, weights_full, scale, ratio, topk,
                    items, D, W, BLOCKS, KIND, ATOMIC,
                ),
            ),
            (
                _multiply,
                (
                    1, grad_q, pairs, of_rows, chosen, lse, delta, position, row_first, entry_first, keys_s, query_s,
                    grad_s, weights_s, slope_s, full, empty, query_full, query_empty, weights_full, scale, ratio, topk,
                    items, D, W, BLOCKS, KIND, ATOMIC,
                ),
            ),
            (
                _load,
                (
                    q, grad, rows, entries, entry_data, chosen, position, row_first, entry_first,
                    keys_s, query_s, grad_s, full, empty, query_full, query_empty, ratio, topk, items,
                    D, W, BLOCKS, KIND,
                ),
            ),
        ],
        [4, 4],
        [216, 72],
    )  # fmt: skip


def queries_backward(
    q: Tensor, rows: Tensor, entries: Tensor, chosen: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, grad_q: Tensor,
    pairs: Tensor, of_rows: Tensor, position: Tensor, row_first: Tensor, entry_first: Tensor, scale: float, ratio: int,
    topk: int, window: int, kind: int, atomic: bool,
) -> None:  # fmt: skip
    """Fills grad_q and, if entries are chosen, their pairs [.., D] in bf16; or adds, if `atomic`, the entries' and the
    rows' own gradients to `pairs` fp32 [N, D] and `of_rows` fp32 [R, D].

    Arguments as `attention_backward._queries_backward` has them; bf16, D = 512, a multiple of 64 heads.
    """
    queries, heads, width = q.shape
    items = queries * (heads // 64)
    queries_kernel[(programs(items, q.device),)](
        described(q.flatten(0, 1), 64), described(grad.flatten(0, 1), 64), described(rows, 32), described(entries, 32),
        entries, chosen, lse, delta, grad_q,
        described(pairs, 32) if kind == 2 and not atomic else pairs, of_rows, position, row_first, entry_first,
        scale, ratio, topk, items, D=width, W=window, BLOCKS=heads // 64, KIND=kind, ATOMIC=atomic, num_warps=4,
    )  # fmt: skip
