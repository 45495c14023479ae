"""Triton kernels of model/step.py's `step` and of the cache's lengths: all that a decoding step's places need.

What is computed is `step`'s, but that the entry which a request may finish stands at the request's own number.
Legend: B requests, K kinds of compressors, R of the requests in a program.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import next_power

SOME = 64  # requests of a program


class Kind(NamedTuple):
    """Of compressors: the tokens of an entry, and of a ring."""

    ratio: int
    ring: int


class Made(NamedTuple):
    """What the layout of a step is made of; lists have K tensors."""

    cu_seqlens: Tensor  # int64 [B + 1]
    slots: Tensor  # int64 [B], as the following
    past: Tensor
    lengths: Tensor  # 1 each
    to: Tensor  # in the window's ring
    rings: list[Tensor]  # int64 [B]: in the compressors' rings
    rows: list[Tensor]  # int64 [B]: of the finished entries in their pools; 0 for none
    position: Tensor  # int32 [B], as the following
    row_first: Tensor  # of the window's ring
    entry_first: Tensor  # of the request's pages in the table
    firsts: list[Tensor]  # of the compressors' rings
    numbers: list[Tensor]  # of the finished entries; -1 for none
    rotations: Tensor  # complex64 [2 + K, B, pairs]: of tokens by the first and the second frequencies, of entries


@triton.jit
def _step(
    length, slots, table, frequencies, others, wide, narrow, angles, requests, pages, room, size, ring,
    GIVEN: tl.constexpr, RATIOS: tl.constexpr, RINGS: tl.constexpr, COUNT: tl.constexpr, PAIRS: tl.constexpr,
    R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A row of `wide` int64 and of `narrow` int32 has `room` numbers; `angles` are after as many ones."""
    b = tl.program_id(0) * R + tl.arange(0, R)
    real = b < requests
    slot = tl.load(slots + b, mask=real, other=0) if GIVEN else b.to(tl.int64)
    past = tl.load(length + slot, mask=real, other=0)
    tl.store(wide + b, b.to(tl.int64), mask=b <= requests)
    tl.store(wide + room + b, slot, mask=real)
    tl.store(wide + 2 * room + b, past, mask=real)
    tl.store(wide + 3 * room + b, tl.full([R], 1, tl.int64), mask=real)
    tl.store(wide + 4 * room + b, slot * ring + past % ring, mask=real)
    tl.store(narrow + b, past.to(tl.int32), mask=real)
    tl.store(narrow + room + b, (slot * ring).to(tl.int32), mask=real)
    tl.store(narrow + 2 * room + b, (slot * pages).to(tl.int32), mask=real)
    p = tl.arange(0, P)
    some, at = real[:, None] & (p < PAIRS)[None, :], b[:, None] * PAIRS + p[None, :]
    first = tl.load(frequencies + p, mask=p < PAIRS, other=0.0)[None, :]
    second = tl.load(others + p, mask=p < PAIRS, other=0.0)[None, :]
    each, behind = requests * PAIRS, (2 + COUNT) * requests * PAIRS
    for i in tl.static_range(2 + COUNT):
        tl.store(angles + i * each + at, tl.full([R, P], 1.0, tl.float32), mask=some)
    angles += behind
    tl.store(angles + at, past.to(tl.float32)[:, None] * first, mask=some)
    tl.store(angles + each + at, past.to(tl.float32)[:, None] * second, mask=some)
    for i in tl.static_range(COUNT):
        ends = (past + 1) % RATIOS[i] == 0
        own = (past + 1) // RATIOS[i] - 1
        number = tl.where(ends, own, -1)
        of_page = size // RATIOS[i]
        page = tl.load(table + slot * pages + own // of_page, mask=real & ends, other=0).to(tl.int64)
        row = tl.where(ends, page * of_page + own % of_page, 0)
        tl.store(wide + (5 + 2 * i) * room + b, slot * RINGS[i] + past % RINGS[i], mask=real)
        tl.store(wide + (6 + 2 * i) * room + b, row, mask=real)
        tl.store(narrow + (3 + 2 * i) * room + b, (slot * RINGS[i]).to(tl.int32), mask=real)
        tl.store(narrow + (4 + 2 * i) * room + b, number.to(tl.int32), mask=real)
        at_first = (number * RATIOS[i]).to(tl.float32)
        tl.store(angles + (2 + i) * each + at, at_first[:, None] * second, mask=some)


def step(
    length: Tensor, slots: Tensor | None, table: Tensor, page: int, ring: int, kinds: list[Kind],
    frequencies: tuple[Tensor, Tensor],
) -> Made:  # fmt: skip
    """For the next token of each of the requests in `slots` int64 [B] (None: in all): length int64 [slots], table int32
    [slots, pages]; `page` tokens of a page, `ring` of the window's ring; both frequencies fp32 [pairs]."""
    requests = length.numel() if slots is None else slots.numel()
    count, pairs = len(kinds), frequencies[0].numel()
    room = -(-(requests + 1) // 16) * 16  # every row is as aligned as a tensor of its own
    wide = length.new_empty(5 + 2 * count, room)
    narrow = length.new_empty(3 + 2 * count, room, dtype=torch.int32)
    angles = length.new_empty(2, 2 + count, requests, pairs, dtype=torch.float32)
    if requests:
        _step[(triton.cdiv(requests + 1, SOME),)](
            length, length if slots is None else slots, table, *frequencies, wide, narrow, angles,
            requests, table.shape[1], room, page, ring, GIVEN=slots is not None,
            RATIOS=tuple(kind.ratio for kind in kinds), RINGS=tuple(kind.ring for kind in kinds), COUNT=count,
            PAIRS=pairs, R=SOME, P=next_power(pairs), num_warps=4,
        )  # fmt: skip
    rows, numbers = wide[:, :requests].unbind(), narrow[:, :requests].unbind()
    return Made(
        wide[0, : requests + 1], *rows[1:5], list(rows[5::2]), list(rows[6::2]),
        *numbers[:3], list(numbers[3::2]), list(numbers[4::2]), torch.polar(*angles),
    )  # fmt: skip


@triton.jit
def _advance(length, held, slots, tokens, requests, GIVEN: tl.constexpr, R: tl.constexpr):
    b = tl.program_id(0) * R + tl.arange(0, R)
    real = b < requests
    slot = tl.load(slots + b, mask=real, other=0) if GIVEN else b
    now = tl.load(length + slot, mask=real, other=0) + tl.load(tokens + b, mask=real, other=0)
    tl.store(length + slot, now, mask=real)
    tl.store(held + slot, tl.maximum(tl.load(held + slot, mask=real, other=0), now), mask=real)


def advance(length: Tensor, held: Tensor, slots: Tensor | None, tokens: Tensor) -> None:
    """`Cache.advance`'s lengths."""
    if requests := tokens.numel():
        _advance[(triton.cdiv(requests, SOME),)](
            length, held, tokens if slots is None else slots, tokens, requests, GIVEN=slots is not None, R=SOME
        )
