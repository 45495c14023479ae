"""The indexer's scores for Hopper, in Gluon: what `indexer._scores` computes.

An item is 256 entry numbers and some queries in a row, of which one has so many entries; programs go through a list of
them in turn, or those with few would wait for others. Each of four warpgroups holds the keys of 64 of the entries in
registers while their document lasts; queries pass by in shared memory, and are multiplied, 64 heads at once, and summed
up over heads, one warpgroup's sums under the others' products. A query's scores come from one product of one shape,
whoever is beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..places import Seen
from .hopper import barrier, paged_row, programs
from .launch import next_power

HEADS, WIDTH = gl.constexpr(64), gl.constexpr(128)
KEYS, GROUPS = gl.constexpr(64), gl.constexpr(4)  # of a warpgroup; warpgroups
STAGES = gl.constexpr(8)  # queries in shared memory
TILE = 256  # entry numbers of an item


@triton.jit
def _plan(
    position, counts, plan, ratio, queries, tiles, groups, topk,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """How many entries of each query have to be scored: none where all are chosen. How many items there are, then, one
    after another, group * tiles + tile."""
    found = 0
    for start in range(0, groups, BLOCK):
        g = start + tl.arange(0, BLOCK)
        t = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        count = (tl.load(position + t, mask=t < queries, other=-1) + 1) // ratio
        count = tl.where(count > topk, count, 0)
        tl.store(counts + t, count, mask=t < queries)
        needed = (tl.max(count, 1) + TILE - 1) // TILE
        to = plan + 1 + found + tl.cumsum(needed, 0) - needed
        for tile in range(0, tl.max(needed, 0)):
            tl.store(to + tile, g * tiles + tile, mask=tile < needed)
        found += tl.sum(needed, 0)
    tl.store(plan, found)


@gluon.jit
def _item(plan, i, tiles, group, queries):
    """First of its entry numbers, first of its queries, and their end."""
    item = gl.load(plan + 1 + i)
    number = item // tiles
    return item % tiles * GROUPS * KEYS, number * group, gl.minimum(number * group + group, queries)


@gluon.jit
def _load(
    q, keys, counts, plan, entry_first, table, keys_s, query_s, full, empty, keys_full, keys_empty,
    tiles, group, queries, total, PAGE: gl.constexpr,
):  # fmt: skip
    step, turn = 0, 0
    for i in range(gl.program_id(0), gl.load(plan), gl.num_programs(0)):
        low, begin, end = _item(plan, i, tiles, group, queries)
        before = -1
        for t in range(begin, end):
            count, entry = gl.load(counts + t), gl.load(entry_first + t)
            if low < count:
                if entry != before:
                    mbarrier.wait(keys_empty, (turn & 1) ^ 1)
                    mbarrier.expect(keys_full, GROUPS * KEYS * WIDTH * 2)
                    for part in gl.static_range(GROUPS):
                        row = entry + low + part * KEYS
                        if PAGE > 0:  # nobody sees what would be behind the table's end
                            number = gl.minimum(low + part * KEYS, (total - entry) * PAGE - KEYS)
                            row = paged_row(table, entry, number, PAGE)
                        tma.async_copy_global_to_shared(keys, [row, 0], keys_full, keys_s.index(part))
                    turn += 1
                    before = entry
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(stage), HEADS * WIDTH * 2)
                tma.async_copy_global_to_shared(q, [t * HEADS, 0], full.index(stage), query_s.index(stage))
                step += 1


@gluon.jit
def _multiply(
    own: gl.constexpr, weights, out, counts, plan, entry_first, keys_s, query_s, full, empty, keys_full, keys_empty,
    width, tiles, group, queries, BF16: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    lane = gl.arange(0, KEYS, gl.SliceLayout(1, layout))
    h = gl.arange(0, HEADS, gl.SliceLayout(0, layout))
    own_keys = gl.zeros([KEYS, WIDTH], gl.bfloat16, operand)
    step, turn = 0, 0
    for i in range(gl.program_id(0), gl.load(plan), gl.num_programs(0)):
        low, begin, end = _item(plan, i, tiles, group, queries)
        n = low + own * KEYS + lane
        before = -1
        for t in range(begin, end):
            count, entry = gl.load(counts + t), gl.load(entry_first + t)
            if low < count:
                weights_H = gl.load(weights + t.to(gl.int64) * HEADS + h)
                fresh = entry != before
                if fresh:
                    mbarrier.wait(keys_full, turn & 1)
                    own_keys = keys_s.index(own).load(operand)
                    turn += 1
                    before = entry
                stage = step % STAGES
                mbarrier.wait(full.index(stage), (step // STAGES) & 1)
                products = gl.zeros([KEYS, HEADS], gl.float32, layout)
                query = query_s.index(stage).permute((1, 0))
                products = warpgroup_mma(own_keys, query, products, use_acc=False, is_async=True)
                products = warpgroup_mma_wait(0, [products])
                barrier()
                mbarrier.arrive(empty.index(stage), count=1)
                # Not before: loads into registers may be under way until a product has used them.
                mbarrier.arrive(keys_empty, count=1, pred=fresh)
                sums = gl.sum(gl.maximum(products, 0.0) * weights_H[None, :], 1)
                if BF16:
                    sums = sums.to(gl.bfloat16).to(gl.float32)
                # Behind `count` nothing is read, and nothing but the tile's own numbers is written.
                gl.store(out + t.to(gl.int64) * width + n, sums + 0.0, mask=n < count)
                step += 1


@gluon.jit
def scores_kernel(
    q, keys, weights, out, counts, plan, entry_first, table, width, tiles, group, queries, total,
    BF16: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    keys_s = gl.allocate_shared_memory(gl.bfloat16, [GROUPS, KEYS, WIDTH], shared)
    query_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, HEADS, WIDTH], shared)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    keys_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    mbarrier.init(keys_full, count=1)
    mbarrier.init(keys_empty, count=GROUPS)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0, weights, out, counts, plan, entry_first, keys_s, query_s, full, empty, keys_full, keys_empty,
                    width, tiles, group, queries, BF16,
                ),
            ),
            (
                _multiply,
                (
                    1, weights, out, counts, plan, entry_first, keys_s, query_s, full, empty, keys_full, keys_empty,
                    width, tiles, group, queries, BF16,
                ),
            ),
            (
                _multiply,
                (
                    2, weights, out, counts, plan, entry_first, keys_s, query_s, full, empty, keys_full, keys_empty,
                    width, tiles, group, queries, BF16,
                ),
            ),
            (
                _multiply,
                (
                    3, weights, out, counts, plan, entry_first, keys_s, query_s, full, empty, keys_full, keys_empty,
                    width, tiles, group, queries, BF16,
                ),
            ),
            (
                _load,
                (
                    q, keys, counts, plan, entry_first, table, keys_s, query_s, full, empty, keys_full, keys_empty,
                    tiles, group, queries, total, PAGE,
                ),
            ),
        ],
        [4, 4, 4, 1],
        [112, 112, 112, 40],
    )  # fmt: skip


def scores(q: Tensor, weights: Tensor, keys: Tensor, out: Tensor, seen: Seen, topk: int, bf16: bool) -> None:
    """Fills out fp32 [T, width] with what T queries score the entries that they see, if those are more than `topk`.

    bf16 q [T, 64, 128] and keys [N, 128], weights fp32 [T, 64]. ValueError for pages that are no tiles of keys.
    """
    if seen.page % KEYS.value:
        raise ValueError(f"page: {seen.page} entries; the indexer's kernel for Hopper takes multiples of {KEYS.value}")
    queries, width = out.shape
    layout = gl.NVMMASharedLayout(128, 16, 2)
    tiles = -(-width // TILE)
    # Queries enough for an item to be worth its keys, and items enough for all programs; in a ring queries share none.
    group = 1 if seen.slots else 32 if queries * tiles >= 32768 else 8
    counts, plan = planned(seen, topk, tiles, group)
    scores_kernel[(programs(plan.numel() - 1, q.device),)](
        TensorDescriptor.from_tensor(q.flatten(0, 1), [64, 128], layout),
        TensorDescriptor.from_tensor(keys, [64, 128], layout),
        weights, out, counts, plan, seen.entry_first, seen.table, width, tiles, group, queries,
        None if seen.table is None else len(seen.table), BF16=bf16, PAGE=seen.page, num_warps=4,
    )  # fmt: skip


def planned(seen: Seen, topk: int, tiles: int, group: int) -> tuple[Tensor, Tensor]:
    """int32 [T]: how many entries of each query have to be scored; and how many items there are, then their numbers,
    group of queries * tiles + tile, rising."""
    queries = len(seen.position)
    groups = -(-queries // group)
    counts, plan = torch.empty_like(seen.position), seen.position.new_empty(1 + groups * tiles)
    _plan[(1,)](
        seen.position, counts, plan, seen.ratio, queries, tiles, groups, topk,
        GROUP=group, BLOCK=min(next_power(groups), 16384 // group, 1024), TILE=TILE, num_warps=16,
    )  # fmt: skip
    return counts, plan
