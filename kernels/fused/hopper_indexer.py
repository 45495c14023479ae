"""The indexer's scores for Hopper, in Gluon: what `indexer._scores` computes.

An item is 256 entry numbers and some queries in a row. Each of four warpgroups holds the keys of 64 of the entries in
registers while their document lasts; queries pass by in shared memory, and are multiplied, 64 heads at once, and summed
up over heads, one warpgroup's sums under the others' products. A query's scores come from one product of one shape,
whoever is beside it.
"""

import torch.nn.functional as F
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper import barrier, programs

HEADS, WIDTH = gl.constexpr(64), gl.constexpr(128)
KEYS, GROUPS = gl.constexpr(64), gl.constexpr(4)  # of a warpgroup; warpgroups
STAGES = gl.constexpr(8)  # queries in shared memory


@gluon.jit
def _item(item, most, tiles, group, queries):
    """First of its entry numbers, and its queries, which are none where no query of the group has so many entries."""
    number = item // tiles
    # Turned by one from group to group: a program gets tiles of high and of low numbers, which fewer queries see.
    low = (item + number) % tiles * GROUPS * KEYS
    end = gl.where(low < gl.load(most + number), gl.minimum(number * group + group, queries), 0)
    return low, number * group, end


@gluon.jit
def _load(
    q, keys, counts, most, entry_first, keys_s, query_s, full, empty, keys_full, keys_empty,
    tiles, group, queries, items,
):  # fmt: skip
    step, turn = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        low, begin, end = _item(item, most, tiles, group, queries)
        before = -1
        for t in range(begin, end):
            count, entry = gl.load(counts + t), gl.load(entry_first + t)
            if low < count:
                if entry != before:
                    mbarrier.wait(keys_empty, (turn & 1) ^ 1)
                    mbarrier.expect(keys_full, GROUPS * KEYS * WIDTH * 2)
                    for i in gl.static_range(GROUPS):
                        tma.async_copy_global_to_shared(keys, [entry + low + i * KEYS, 0], keys_full, keys_s.index(i))
                    turn += 1
                    before = entry
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(stage), HEADS * WIDTH * 2)
                tma.async_copy_global_to_shared(q, [t * HEADS, 0], full.index(stage), query_s.index(stage))
                step += 1


@gluon.jit
def _multiply(
    own: gl.constexpr, weights, out, counts, most, entry_first, keys_s, query_s, full, empty, keys_full, keys_empty,
    width, tiles, group, queries, items, BF16: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    lane = gl.arange(0, KEYS, gl.SliceLayout(1, layout))
    h = gl.arange(0, HEADS, gl.SliceLayout(0, layout))
    own_keys = gl.zeros([KEYS, WIDTH], gl.bfloat16, operand)
    step, turn = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        low, begin, end = _item(item, most, tiles, group, queries)
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
    q, keys, weights, out, counts, most, entry_first, width, tiles, group, queries, items, BF16: gl.constexpr
):
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
                    0, weights, out, counts, most, entry_first, keys_s, query_s, full, empty, keys_full, keys_empty,
                    width, tiles, group, queries, items, BF16,
                ),
            ),
            (
                _multiply,
                (
                    1, weights, out, counts, most, entry_first, keys_s, query_s, full, empty, keys_full, keys_empty,
                    width, tiles, group, queries, items, BF16,
                ),
            ),
            (
                _multiply,
                (
                    2, weights, out, counts, most, entry_first, keys_s, query_s, full, empty, keys_full, keys_empty,
                    width, tiles, group, queries, items, BF16,
                ),
            ),
            (
                _multiply,
                (
                    3, weights, out, counts, most, entry_first, keys_s, query_s, full, empty, keys_full, keys_empty,
                    width, tiles, group, queries, items, BF16,
                ),
            ),
            (
                _load,
                (
                    q, keys, counts, most, entry_first, keys_s, query_s, full, empty, keys_full, keys_empty,
                    tiles, group, queries, items,
                ),
            ),
        ],
        [4, 4, 4, 1],
        [112, 112, 112, 40],
    )  # fmt: skip


def scores(
    q: Tensor, weights: Tensor, keys: Tensor, out: Tensor, counts: Tensor, entry_first: Tensor, ring: bool, bf16: bool
) -> None:  # fmt: skip
    """Fills out fp32 [T, width] with what T queries score the `counts` int32 [T] first entries of their documents.

    bf16 q [T, 64, 128] and keys [N, 128], weights fp32 [T, 64]; with `ring` every query is of a document of its own.
    """
    queries, width = out.shape
    layout = gl.NVMMASharedLayout(128, 16, 2)
    tiles = -(-width // 256)
    # Items enough for the programs to end together, queries enough for an item to be worth its keys.
    group = 1 if ring else min(max(queries * tiles // (16 * 132), 8), 32)
    groups = -(-queries // group)
    most = F.pad(counts, (0, groups * group - queries)).unflatten(0, (groups, group)).amax(1)
    items = tiles * groups
    scores_kernel[(programs(items, q.device),)](
        TensorDescriptor.from_tensor(q.flatten(0, 1), [64, 128], layout),
        TensorDescriptor.from_tensor(keys, [64, 128], layout),
        weights, out, counts, most, entry_first, width, tiles, group, queries, items, BF16=bf16, num_warps=4,
    )  # fmt: skip
