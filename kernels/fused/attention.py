"""Triton kernels of `kernels.attention.attend`, forward; attention_backward.py has the backward.

Legend: T queries, H heads, D channels, W the window, K chosen entries of a query, R rows, N entries.

A program is one query and a block of its heads, so decoding runs the program that training runs. Keys come in tiles of
`BLOCK` that begin at places relative to the query (window) or to its document's first entry (entries), never to the
pack, the chunk or the cache. Scores and sums are fp32, probabilities meet the values in the rows' dtype, the running
maximum starts with the sink. A document's entries beyond 1,024 are other programs, whose sums are merged in order.

On a Hopper GPU, 64 heads of 512 channels in bf16 go to kernels of the same tiles in Gluon (hopper_*.py).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import say
from ..places import Seen
from .launch import LOG2E, SAME_BITS, Tiles, check_dtypes, check_width, is_hopper, next_power, precision
from .norm import rope_in_place

SPLIT = 1024  # entries of a document that one program sums up
PART_BYTES = 2**30  # of memory for the sums of a chunk of queries' splits
HEAD_DIM = "powers of two from 16 to 256, and 512 in bfloat16 with a multiple of 64 heads on a Hopper GPU"
NONE, DENSE, CHOSEN = 0, 1, 2  # a query's entries: none, all that are complete, those with an index


@triton.jit
def _keys(
    rows, entries, chosen, i, place, first, first_entry, low, count,
    row_stride, entry_stride, slots,
    D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Tile i of what a query at `place` sees: keys [BLOCK, D] and which of them are real; window tiles come first."""
    ENTRIES: tl.constexpr = tl.cdiv(W, BLOCK) * BLOCK  # where the tiles of entries begin
    at = i + tl.arange(0, BLOCK)
    number = place - (W - 1) + at
    seen = (number >= 0) & (at < W)
    if RING:
        index = first + number % slots
    else:
        index = first + number
    where = rows + index.to(tl.int64) * row_stride
    if KIND != 0:
        number = low + at - ENTRIES
        entry = (at >= ENTRIES) & (number < count)
        if KIND == 2:
            number = tl.load(chosen + number, mask=entry, other=0)
        where = tl.where(entry, entries + (first_entry + number).to(tl.int64) * entry_stride, where)
        seen = seen | entry
    return tl.load(where[:, None] + tl.arange(0, D)[None, :], mask=seen[:, None], other=0.0), seen


@triton.jit
def _forward(
    q, rows, entries, chosen, sinks, out, lse, partial,
    position, row_first, entry_first,
    scale, heads, row_stride, entry_stride, slots, ratio, topk, queries,
    D: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr,
    KIND: tl.constexpr, RING: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    h, d = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, D)
    place = tl.load(position + t)
    count = 0
    if KIND != 0:
        count = (place + 1) // ratio
        if KIND == 2:
            count = tl.minimum(count, topk)
    if split * LIMIT < tl.maximum(count, 1):
        own = (t * heads + h)[:, None] * D + d[None, :]
        queries_HD = tl.load(q + own, mask=(h < heads)[:, None], other=0.0)
        sink = tl.load(sinks + h, mask=h < heads, other=0.0).to(tl.float32) * 1.4426950408889634
        largest = sink
        total = tl.where(split == 0, 1.0, 0.0) + tl.zeros([HEADS], tl.float32)
        sums = tl.zeros([HEADS, D], tl.float32)
        first, first_entry = tl.load(row_first + t), tl.load(entry_first + t)
        low = split * LIMIT
        # One loop over tiles of the window, then of entries: two would be two programs' registers.
        ENTRIES: tl.constexpr = tl.cdiv(W, BLOCK) * BLOCK
        begin, end = tl.where(split == 0, 0, ENTRIES), tl.minimum(count, low + LIMIT)
        for i in tl.range(begin, ENTRIES + end - low, BLOCK):
            keys, seen = _keys(
                rows, entries, chosen + t * topk, i, place, first, first_entry, low, end,
                row_stride, entry_stride, slots, D, W, BLOCK, KIND, RING,
            )  # fmt: skip
            scores = tl.dot(queries_HD, tl.trans(keys), input_precision=PRECISION) * scale
            scores = tl.where(seen[None, :], scores, float("-inf"))
            new = tl.maximum(largest, tl.max(scores, 1))
            shrink = tl.exp2(largest - new)
            weights = tl.exp2(scores - new[:, None])
            total = total * shrink + tl.sum(weights, 1)
            sums = tl.dot(weights.to(keys.dtype), keys, sums * shrink[:, None], input_precision=PRECISION)
            largest = new
        if SPLITS == 1:
            tl.store(out + own, sums * (1.0 / total)[:, None], mask=(h < heads)[:, None])
            tl.store(lse + t * heads + h, largest + tl.log2(total), mask=h < heads)
        else:
            part = (split * queries + t) * heads + h
            tl.store(out + part[:, None] * D + d[None, :], sums, mask=(h < heads)[:, None])
            tl.store(partial + part * 2, largest, mask=h < heads)
            tl.store(partial + part * 2 + 1, total, mask=h < heads)


@triton.jit
def _merge(
    parts, partial, out, lse, position, heads, ratio, queries,
    D: tl.constexpr, HEADS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Sums of a query's splits, in their order. With one split this is what `_forward` does by itself."""
    t = tl.program_id(0).to(tl.int64)
    h, d = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, D)
    live = tl.maximum(tl.cdiv((tl.load(position + t) + 1) // ratio, LIMIT), 1)
    shift = tl.full([HEADS], float("-inf"), tl.float32)
    for i in range(0, live):
        shift = tl.maximum(shift, tl.load(partial + ((i * queries + t) * heads + h) * 2, mask=h < heads, other=0.0))
    total = tl.zeros([HEADS], tl.float32)
    sums = tl.zeros([HEADS, D], tl.float32)
    for i in range(0, live):
        part = (i * queries + t) * heads + h
        weight = tl.exp2(tl.load(partial + part * 2, mask=h < heads, other=0.0) - shift)
        total += tl.load(partial + part * 2 + 1, mask=h < heads, other=1.0) * weight
        sums += tl.load(parts + part[:, None] * D + d[None, :], mask=(h < heads)[:, None], other=0.0) * weight[:, None]
    tl.store(out + (t * heads + h)[:, None] * D + d[None, :], sums * (1.0 / total)[:, None], mask=(h < heads)[:, None])
    tl.store(lse + t * heads + h, shift + tl.log2(total), mask=h < heads)


def _forward_tiles(dtype: torch.dtype, heads: int, width: int) -> Tiles:
    if dtype == torch.bfloat16 and width >= 256:
        return Tiles(min(max(next_power(heads), 16), 64), 64, 8, 2)
    return Tiles(16, 32 if width >= 256 else 64, 8 if width >= 256 else 4, 1)


def on_hopper(q: Tensor) -> bool:
    """Whether the kernels for Hopper take queries [T, H, D]."""
    return is_hopper(q.device) and q.dtype == torch.bfloat16 and q.shape[2] == 512 and q.shape[1] % 64 == 0


def kind_of(entries: Tensor | None, seen: Seen, chosen: Tensor | None) -> int:
    return NONE if entries is None or seen.most == 0 else DENSE if chosen is None else CHOSEN


def check(q: Tensor, rows: Tensor, entries: Tensor | None, chosen: Tensor | None) -> None:
    """ValueError, by name, for what the kernels do not take."""
    check_width("head_dim", q.shape[-1])
    if q.is_cuda and q.shape[-1] > 256 and not on_hopper(q):
        raise ValueError(f"head_dim: {q.shape[-1]}, {q.shape[1]} heads, {q.dtype}: the Triton kernels take {HEAD_DIM}")
    if chosen is not None and chosen.shape[1] > SPLIT:
        raise ValueError(f"index_topk: {chosen.shape[1]}; the Triton kernels take up to {SPLIT}")
    check_dtypes(queries=q, rows=rows, **({} if entries is None else {"entries": entries}))


def attend_forward(
    q: Tensor, rows: Tensor, entries: Tensor | None, sinks: Tensor, seen: Seen, chosen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention [T, H, D] and the base-2 logarithm of its denominators fp32 [T, H]; arguments as `attend` has them."""
    check(q, rows, entries, chosen)
    say("attention", "Gluon kernels for Hopper" if on_hopper(q) else "Triton kernels", q)
    queries, heads, width = q.shape
    q, rows = q.contiguous(), rows.contiguous()
    entries, chosen = (None if x is None else x.contiguous() for x in (entries, chosen))
    splits = -(-seen.most // SPLIT) if kind_of(entries, seen, chosen) == DENSE else 1
    out, lse = torch.empty_like(q), q.new_empty(queries, heads, dtype=torch.float32)
    chunk = max(queries, 1) if splits == 1 else max(PART_BYTES // (4 * splits * heads * width), 1)
    for start in range(0, queries, chunk):
        some = slice(start, start + chunk)
        _forward_of(
            q[some],
            rows,
            entries,
            sinks,
            seen.of(some),
            None if chosen is None else chosen[some],
            out[some],
            lse[some],
            splits,
        )
    return out, lse


def _forward_of(
    q: Tensor, rows: Tensor, entries: Tensor | None, sinks: Tensor, seen: Seen, chosen: Tensor | None,
    out: Tensor, lse: Tensor, splits: int,
) -> None:  # fmt: skip
    """Fills out and lse."""
    queries, heads, width = q.shape
    tiles, kind = _forward_tiles(q.dtype, heads, width), kind_of(entries, seen, chosen)
    parts = out if splits == 1 else q.new_empty(splits, queries, heads, width, dtype=torch.float32)
    partial = lse if splits == 1 else q.new_empty(splits, queries, heads, 2, dtype=torch.float32)
    entries = rows if entries is None or kind == NONE else entries  # of which there may be none
    first = seen.row_first if seen.entry_first is None else seen.entry_first
    topk = 0 if chosen is None else chosen.shape[1]
    chosen = first if chosen is None else chosen
    scale, ratio = width**-0.5 * LOG2E, max(seen.ratio, 1)
    if on_hopper(q):
        from .hopper_forward import forward

        forward(
            q, rows, entries, chosen, sinks, out, lse, partial, parts, seen.position, seen.row_first, first,
            scale, seen.slots, ratio, topk, splits, seen.window, kind, SPLIT,
        )  # fmt: skip
    else:
        _forward[(queries, triton.cdiv(heads, tiles.heads), splits)](
            q, rows, entries, chosen, sinks, parts, lse, partial, seen.position, seen.row_first, first,
            scale, heads, rows.stride(0), entries.stride(0), max(seen.slots, 1), ratio, topk, queries,
            D=width, W=seen.window, HEADS=tiles.heads, BLOCK=tiles.keys, LIMIT=SPLIT,
            KIND=kind, RING=seen.slots > 0, SPLITS=min(splits, 2), PRECISION=precision(q.dtype),
            num_warps=tiles.warps, num_stages=tiles.stages, **SAME_BITS,
        )  # fmt: skip
    if splits > 1:
        _merge[(queries, triton.cdiv(heads, 16))](
            parts, partial, out, lse, seen.position, heads, ratio, queries,
            D=width, HEADS=16, LIMIT=SPLIT, num_warps=tiles.warps, **SAME_BITS,
        )  # fmt: skip


class Attend(torch.autograd.Function):
    """`attend_forward`, its result turned back by `rotation`, with their gradients; the logarithms have none."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, rows: Tensor, entries: Tensor | None, sinks: Tensor, seen: Seen, chosen: Tensor | None,
        rotation: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = attend_forward(q, rows, entries, sinks, seen, chosen)
        if rotation is not None:
            rope_in_place(out, rotation, back=True)
        ctx.save_for_backward(q, rows, entries, sinks, out, lse, chosen, rotation)
        ctx.seen = seen
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from .attention_backward import attend_backward

        q, rows, entries, sinks, out, lse, chosen, rotation = ctx.saved_tensors
        if ctx.seen.slots:
            raise ValueError("attention over a cache has no gradient")
        given = (grads[0], q, rows, entries, sinks, out, lse, ctx.seen, chosen)
        return *attend_backward(*given, rotation=rotation), None, None, None
