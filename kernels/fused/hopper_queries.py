"""The gradient of attention's queries for Hopper, in Gluon, and each query's products with its chosen entries: what
`attention_backward._queries_backward` computes.

One warpgroup finds the probabilities of a tile of 64 keys, another the slopes (their gradients before the softmax);
each keeps half of the query's channels. The keys' gradients are found when the keys are no longer needed, while the
next ones are fetched. A slope takes its probability rounded to bf16.
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

from .hopper import barrier, described, masked, programs
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
def _load(
    q, grad, rows, entries, entry_data, chosen, position, row_first, entry_first,
    keys_s, query_s, grad_s, full, empty, query_full, query_empty,
    ratio, topk, items,
    D: gl.constexpr, W: gl.constexpr, BLOCKS: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    WINDOW: gl.constexpr = (W + BLOCK - 1) // BLOCK * BLOCK
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    d = gl.arange(0, D // 2, gl.SliceLayout(0, layout))
    lane = gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
    turn = 0
    query_turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        t, head, place, count, end = _item(item, position, ratio, topk, W, BLOCKS, KIND)
        mbarrier.wait(query_empty, (query_turn & 1) ^ 1)
        mbarrier.expect(query_full, 2 * HEADS * D * 2)
        for side in gl.static_range(2):
            corner = [head, side * (D // 2)]
            tma.async_copy_global_to_shared(q, corner, query_full, query_s.index(side))
            tma.async_copy_global_to_shared(grad, corner, query_full, grad_s.index(side))
        query_turn += 1
        first = gl.load(row_first + t)
        first_entry = gl.load(entry_first + t)
        own = chosen + t.to(gl.int64) * topk
        for i in range(0, end, BLOCK):
            at = i - WINDOW + lane
            index = at
            if KIND == 2:
                index = first_entry + gl.load(own + at, mask=(at >= 0) & (at < count), other=0)
            for side in gl.static_range(2):
                bar, to = full.index(side), keys_s.index(side)
                mbarrier.wait(empty.index(side), (turn & 1) ^ 1)
                if i < WINDOW:
                    mbarrier.expect(bar, BLOCK * D)
                    row = first + place - (W - 1) + i
                    tma.async_copy_global_to_shared(rows, [row, side * (D // 2)], bar, to)
                    mbarrier.arrive(bar, count=127)  # the barrier awaits all threads that could copy
                elif KIND == 2:
                    where = entry_data + index.to(gl.int64)[:, None] * D + (side * (D // 2) + d)[None, :]
                    async_copy.async_copy_global_to_shared(to, where)
                    async_copy.mbarrier_arrive(bar, increment_count=False)
                else:
                    mbarrier.expect(bar, BLOCK * D)
                    row = first_entry + i - WINDOW
                    tma.async_copy_global_to_shared(entries, [row, side * (D // 2)], bar, to)
                    mbarrier.arrive(bar, count=127)
            turn += 1


@gluon.jit
def _products(left_s, keys_s, full, turn, zero):
    """[heads, keys]: all channels of the query, or of its gradient, times those of the keys, as they arrive."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    sums = gl.zeros([HEADS, BLOCK], gl.float32, layout)
    for side in gl.static_range(2):
        mbarrier.wait(full.index(side), turn & 1)
        fence_async_shared()
        keys = keys_s.index(zero + side).permute((1, 0))
        sums = warpgroup_mma(left_s.index(zero + side), keys, sums, use_acc=side == 1, is_async=True)
    return warpgroup_mma_wait(0, [sums])


@gluon.jit
def _add(
    own: gl.constexpr, sums, pairs, of_rows, chosen, i, row, place, first, first_entry, count, zero,
    keys_s, query_s, grad_s, weights_s, slope_s, empty, weights_empty,
    D: gl.constexpr, W: gl.constexpr, KIND: gl.constexpr, ATOMIC: gl.constexpr,
):  # fmt: skip
    """Adds a tile to the own half of the query's channels; the keys' own products to `pairs`, from `row` on, or, with
    ATOMIC, to what is there for its entries and, in `of_rows`, for its rows."""
    WINDOW: gl.constexpr = (W + BLOCK - 1) // BLOCK * BLOCK
    sums = warpgroup_mma(slope_s.index(zero), keys_s.index(zero + own), sums, is_async=True)
    sums = warpgroup_mma_wait(0, [sums])
    barrier()
    mbarrier.arrive(empty.index(own), count=1)
    if KIND == 2:
        if ATOMIC or i >= WINDOW:
            layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 8, 16])
            # Whole rows, 16 bytes a thread, of fp32 or of bf16.
            rows: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
            wide: gl.constexpr = rows if ATOMIC else gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
            at = i + gl.arange(0, BLOCK, gl.SliceLayout(1, wide))
            to, index, seen = pairs, row + at - WINDOW, at - WINDOW < count
            if ATOMIC:
                if i < WINDOW:
                    number = place - (W - 1) + at
                    to, index, seen = of_rows, first + number, (number >= 0) & (at < W)
                else:
                    index = first_entry + gl.load(chosen + at - WINDOW, mask=seen, other=0)
            for part in gl.static_range(4):  # one after the other, or registers would not do
                query = query_s.index(zero + own).slice(part * (D // 8), D // 8, dim=1)
                grad = grad_s.index(zero + own).slice(part * (D // 8), D // 8, dim=1)
                products = gl.zeros([BLOCK, D // 8], gl.float32, layout)
                slope, weights = slope_s.index(zero).permute((1, 0)), weights_s.index(zero).permute((1, 0))
                products = warpgroup_mma(slope, query, products, use_acc=False, is_async=True)
                products = warpgroup_mma(weights, grad, products, is_async=True)
                products = warpgroup_mma_wait(0, [products])
                values = gl.convert_layout(products.to(gl.bfloat16), wide)
                d = own * (D // 2) + part * (D // 8) + gl.arange(0, D // 8, gl.SliceLayout(0, wide))
                where = to + index.to(gl.int64)[:, None] * D + d[None, :]
                if ATOMIC:
                    gl.atomic_add(where, values.to(gl.float32), mask=seen[:, None], sem="relaxed")
                else:
                    gl.store(where, values)
    barrier()
    mbarrier.arrive(weights_empty, count=1)
    return sums


@gluon.jit
def _store(grad_q, head, sums, own: gl.constexpr, D: gl.constexpr):
    # 16 bytes a thread, not by the tensor memory accelerator, in whose queue loads that wait for memory stand.
    wide: gl.constexpr = gl.BlockedLayout([2, 8], [8, 4], [4, 1], [1, 0])
    row = (head + gl.arange(0, HEADS, gl.SliceLayout(1, wide))).to(gl.int64)
    d = own * (D // 2) + gl.arange(0, D // 2, gl.SliceLayout(0, wide))
    gl.store(grad_q + row[:, None] * D + d[None, :], gl.convert_layout(sums.to(gl.bfloat16), wide))


@gluon.jit
def _multiply(
    own: gl.constexpr, grad_q, pairs, of_rows, chosen, of_heads, position, row_first, entry_first,
    keys_s, query_s, grad_s, weights_s, slope_s, full, empty, query_full, query_empty,
    weights_full, weights_empty, slope_full, scale, ratio, topk, items,
    D: gl.constexpr, W: gl.constexpr, BLOCKS: gl.constexpr, KIND: gl.constexpr, ATOMIC: gl.constexpr,
):  # fmt: skip
    """The first warpgroup, whose `of_heads` is lse: the probabilities, and the lower half of the channels. The second,
    whose is delta: the slopes, and the upper half."""
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    h = gl.arange(0, HEADS, gl.SliceLayout(1, of_scores))
    turn = 0
    query_turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        t, head, place, count, end = _item(item, position, ratio, topk, W, BLOCKS, KIND)
        number_H = gl.load(of_heads + head.to(gl.int64) + h)
        first, first_entry = gl.load(row_first + t), gl.load(entry_first + t)
        row = item * ((topk + BLOCK - 1) // BLOCK * BLOCK)
        sums = gl.zeros([HEADS, D // 2], gl.float32, of_sums)
        mbarrier.wait(query_full, query_turn & 1)
        query_turn += 1
        for i in range(0, end, BLOCK):
            # Always 0, which the compiler does not know: else it keeps the operands' addresses in registers.
            zero = turn >> 30
            if own == 0:
                scores = masked(_products(query_s, keys_s, full, turn, zero), i, place, 0, count, W, KIND)
                weights = gl.exp2(scores * scale - number_H[:, None])
                mbarrier.wait(weights_empty, (turn & 1) ^ 1)
                weights_s.index(zero).store(weights.to(gl.bfloat16))
            else:
                inner = _products(grad_s, keys_s, full, turn, zero)
                mbarrier.wait(weights_full, turn & 1)
                weights = weights_s.index(zero).load(of_scores).to(gl.float32)
                slope = weights * (inner - number_H[:, None]) * (scale * 0.6931471805599453)
                # Since the weights are there, nobody reads the slopes of the tile before.
                slope_s.index(zero).store(slope.to(gl.bfloat16))
            fence_async_shared()
            barrier()
            mbarrier.arrive(weights_full if own == 0 else slope_full, count=1)
            if KIND != 2:  # the pairs need the query once more
                mbarrier.arrive(query_empty, count=1, pred=i + BLOCK >= end)
            if own == 0:
                mbarrier.wait(slope_full, turn & 1)
            sums = _add(
                own, sums, pairs, of_rows, chosen + t.to(gl.int64) * topk, i, row, place, first, first_entry, count,
                zero, keys_s, query_s, grad_s, weights_s, slope_s, empty, weights_empty, D, W, KIND, ATOMIC,
            )  # fmt: skip
            turn += 1
        if KIND == 2:
            mbarrier.arrive(query_empty, count=1)
        _store(grad_q, head, sums, own, D)


@gluon.jit
def queries_kernel(
    q, grad, rows, entries, entry_data, chosen, lse, delta, grad_q, pairs, of_rows, position, row_first, entry_first,
    scale, ratio, topk, items,
    D: gl.constexpr, W: gl.constexpr, BLOCKS: gl.constexpr, KIND: gl.constexpr, ATOMIC: gl.constexpr,
):  # fmt: skip
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    keys_s = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, D // 2], shared)  # halves of the channels
    query_s = gl.allocate_shared_memory(gl.bfloat16, [2, HEADS, D // 2], shared)
    grad_s = gl.allocate_shared_memory(gl.bfloat16, [2, HEADS, D // 2], shared)
    weights_s = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, BLOCK], shared)
    slope_s = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, BLOCK], shared)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    query_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    query_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    weights_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    weights_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    slope_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=128)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(query_full, count=1)
    mbarrier.init(query_empty, count=2)
    mbarrier.init(weights_full, count=1)
    mbarrier.init(weights_empty, count=2)
    mbarrier.init(slope_full, count=1)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0, grad_q, pairs, of_rows, chosen, lse, position, row_first, entry_first, keys_s, query_s, grad_s,
                    weights_s, slope_s, full, empty, query_full, query_empty, weights_full, weights_empty, slope_full,
                    scale, ratio, topk, items, D, W, BLOCKS, KIND, ATOMIC,
                ),
            ),
            (
                _multiply,
                (
                    1, grad_q, pairs, of_rows, chosen, delta, position, row_first, entry_first, keys_s, query_s, grad_s,
                    weights_s, slope_s, full, empty, query_full, query_empty, weights_full, weights_empty, slope_full,
                    scale, ratio, topk, items, D, W, BLOCKS, KIND, ATOMIC,
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
        described(q.flatten(0, 1), 64), described(grad.flatten(0, 1), 64), described(rows, 64), described(entries, 64),
        entries, chosen, lse, delta, grad_q,
        pairs, of_rows, position, row_first, entry_first, scale, ratio, topk, items,
        D=width, W=window, BLOCKS=heads // 64, KIND=kind, ATOMIC=atomic, num_warps=4,
    )  # fmt: skip
