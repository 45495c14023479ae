"""Triton kernels that sort the slots of a batch by expert, stably, by counting: nothing waits for the device.

A slot is one of a token's k experts; slot `t * k + j` is token t's j-th. An expert's slots become neighbouring rows, in
the order of the slots, from a multiple of `height` on: a tile of `height` rows has one expert, and the rows behind an
expert's last are padding. How many tiles there can be at most is known on the host; those behind the last have none.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import next_power

BLOCK = 256  # slots of a program
TILE = 8192  # counts of a step of the program that plans
FEW, STEP = 65_536, 4096  # comparisons of a slot with an expert: of one launch, and of its steps


class Rows(NamedTuple):
    """int32 each. P rows in all."""

    height: int  # rows of a tile
    slot: Tensor  # [P]: of a row; -1 for padding
    row: Tensor  # [T * k]: of a slot
    expert: Tensor  # [P / height]: of a tile; -1 for none
    first: Tensor  # [E]: an expert's first row
    counts: Tensor  # [E]: its slots
    total: Tensor  # [1]: tiles with an expert, which come first


@triton.jit
def _count(ids, counts, slots, BLOCK: tl.constexpr, E: tl.constexpr, STEP: tl.constexpr):
    """counts[block, e]: slots of the block with expert e. Limited by the launch: 8 bytes a slot."""
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(ids + slot, mask=slot < slots, other=-1).to(tl.int32)
    for low in tl.range(0, E, STEP):
        e = low + tl.arange(0, STEP)
        tl.store(counts + block * E + e, tl.sum((own[:, None] == e[None, :]).to(tl.int32), 0))


@triton.jit
def _plan(
    counts, expert, first, count, total, blocks, experts, tiles,
    HEIGHT: tl.constexpr, E: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program, limited by its steps' latency, of which there are blocks / STEP + tiles / STEP.

    counts [blocks, E] become those of the blocks before; then where each expert's rows begin, and whose each tile is.
    """
    e, step = tl.arange(0, E), tl.arange(0, STEP)
    before = tl.zeros([E], tl.int32)
    for low in tl.range(0, blocks, STEP):
        at, real = (low + step)[:, None] * E + e[None, :], (low + step < blocks)[:, None]
        own = tl.load(counts + at, mask=real, other=0)
        tl.store(counts + at, tl.cumsum(own, 0) - own + before[None, :], mask=real)
        before += tl.sum(own, 0)
    needed = (before + HEIGHT - 1) // HEIGHT
    ends = tl.cumsum(needed, 0)
    used = tl.sum(needed, 0)
    tl.store(total, used)
    tl.store(first + e, (ends - needed) * HEIGHT, mask=e < experts)
    tl.store(count + e, before, mask=e < experts)
    for low in tl.range(0, tiles, STEP):
        tile = low + step
        own = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), 1)
        tl.store(expert + tile, tl.where(tile < used, own, -1), mask=tile < tiles)


@triton.jit
def _before(ids, slot, own, start, slots, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Of a block's slots from `start` on, how many before each have its expert."""
    found = tl.zeros([BLOCK], tl.int32)
    for low in tl.range(0, BLOCK, STEP):
        other = start + low + tl.arange(0, STEP)
        theirs = tl.load(ids + other, mask=other < slots, other=-1).to(tl.int32)
        found += tl.sum(((theirs[None, :] == own[:, None]) & (other[None, :] < slot[:, None])).to(tl.int32), 1)
    return found


@triton.jit
def _place(
    ids, counts, first, slot_of_row, row_of_slot, slots, BLOCK: tl.constexpr, E: tl.constexpr, STEP: tl.constexpr
):
    """A slot's row: its expert's first, plus that expert's slots before. Limited by BLOCK comparisons a slot."""
    block, n = tl.program_id(0), tl.arange(0, BLOCK)
    slot = block * BLOCK + n
    real = slot < slots
    own = tl.load(ids + slot, mask=real, other=-1).to(tl.int32)
    row = tl.load(first + own, mask=real, other=0) + tl.load(counts + block * E + own, mask=real, other=0)
    row += _before(ids, slot, own, block * BLOCK, slots, BLOCK, STEP)
    tl.store(row_of_slot + slot, row, mask=real)
    tl.store(slot_of_row + row, slot, mask=real)


@triton.jit
def _sort(
    ids, starts, expert, first, count, total, slot_of_row, row_of_slot, slots, experts, tiles,
    HEIGHT: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr, STEP: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """All of it for few slots, and what is no slot of a row: each program counts all slots, then places its block's.
    Limited by its steps' latency, of which there are slots / STEP + BLOCK / SOME."""
    block, e = tl.program_id(0), tl.arange(0, E)
    every, earlier = tl.zeros([STEP, E], tl.int32), tl.zeros([STEP, E], tl.int32)
    for low in tl.range(0, slots, STEP):
        slot = low + tl.arange(0, STEP)
        own = tl.load(ids + slot, mask=slot < slots, other=-1).to(tl.int32)
        is_own = (own[:, None] == e[None, :]).to(tl.int32)
        every += is_own
        earlier += tl.where((slot < block * BLOCK)[:, None], is_own, 0)
    counts = tl.sum(every, 0)
    needed = (counts + HEIGHT - 1) // HEIGHT
    ends = tl.cumsum(needed, 0)
    begins = ends - needed
    used = tl.sum(needed, 0)
    tl.store(starts + block * E + e, begins * HEIGHT + tl.sum(earlier, 0))
    if block == 0:
        tl.store(total, used)
        tl.store(first + e, begins * HEIGHT, mask=e < experts)
        tl.store(count + e, counts, mask=e < experts)
    for low in tl.range(block * STEP, tiles, tl.num_programs(0) * STEP):
        tile = low + tl.arange(0, STEP)
        past = ends[None, :] <= tile[:, None]
        own = tl.sum(past.to(tl.int32), 1)
        tl.store(expert + tile, tl.where(tile < used, own, -1), mask=tile < tiles)
        left = counts[None, :] - (tile[:, None] - begins[None, :]) * HEIGHT
        left = tl.sum(tl.where((begins[None, :] <= tile[:, None]) & ~past, left, 0), 1)
        h = tl.arange(0, HEIGHT)[None, :]
        padding = (h >= left[:, None]) & (tile < tiles)[:, None]
        tl.store(slot_of_row + tile[:, None] * HEIGHT + h, -1, mask=padding)
    tl.debug_barrier()  # what was stored at `starts` is read by other threads
    slot = block * BLOCK + tl.arange(0, BLOCK)
    real = slot < slots
    own = tl.load(ids + slot, mask=real, other=-1).to(tl.int32)
    row = tl.load(starts + block * E + own, mask=real, other=0)
    row += _before(ids, slot, own, block * BLOCK, slots, BLOCK, SOME)
    tl.store(row_of_slot + slot, row, mask=real)
    tl.store(slot_of_row + row, slot, mask=real)


def sort_rows(ids: Tensor, experts: int, height: int) -> Rows:
    """Rows of ids int64 [T, k], each from 0 to `experts` - 1."""
    slots, width = ids.numel(), next_power(experts)
    tiles = min((slots + experts * (height - 1)) // height, slots)
    blocks = triton.cdiv(slots, BLOCK)

    def ints(*shape: int) -> Tensor:
        return ids.new_empty(shape, dtype=torch.int32)

    few = slots * width <= FEW
    slot = ints(tiles * height) if few else ids.new_full((tiles * height,), -1, dtype=torch.int32)
    rows = Rows(height, slot, ints(slots), ints(tiles), ints(experts), ints(experts), ints(1))
    counts, ids = ints(blocks, width), ids.contiguous()
    if few:
        _sort[(blocks,)](
            ids, counts, rows.expert, rows.first, rows.counts, rows.total, rows.slot, rows.row, slots, experts, tiles,
            HEIGHT=height, BLOCK=BLOCK, E=width, STEP=max(STEP // width, 1), SOME=32, num_warps=8,
        )  # fmt: skip
        return rows
    _count[(blocks,)](ids, counts, slots, BLOCK=BLOCK, E=width, STEP=min(width, 64), num_warps=8)
    _plan[(1,)](
        counts, rows.expert, rows.first, rows.counts, rows.total, blocks, experts, tiles,
        HEIGHT=height, E=width, STEP=TILE // width, num_warps=8,
    )  # fmt: skip
    _place[(blocks,)](ids, counts, rows.first, rows.slot, rows.row, slots, BLOCK=BLOCK, E=width, STEP=32, num_warps=8)
    return rows
