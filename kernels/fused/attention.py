"""Triton kernels of `kernels.attention.attend`, forward; attention_backward.py has the backward.

Legend: T queries, H heads, D channels, W the window, K chosen entries of a query, R rows, N entries.

A program is a tile of pairs, a query and a head of it, as many as a warpgroup multiplies at once: those of one query in
decoding, of neighbours in a pack. Keys come in tiles of `BLOCK` that begin at multiples of it among a document's rows
and among its entries, never at a place in the pack, the chunk or the cache. One that a query does not see changes
nothing for it. Scores and sums are fp32, probabilities meet the values in the rows' dtype, the running maximum starts
with the sink. A document's entries beyond 1,024 are other programs, whose sums are merged in order.

On a Hopper GPU, 64 heads of 512 channels in bf16 go to kernels in Gluon (hopper_*.py). There a program is one
query, and the tiles of the window begin at its oldest row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import say
from ..places import Seen
from .launch import LOG2E, SAME_BITS, PairTiles, check_dtypes, check_width, is_hopper, precision
from .norm import rope_in_place

SPLIT = 1024  # entries of a document that one program sums up
PART_BYTES = 2**30  # of memory for the sums of a chunk of queries' splits
HEAD_DIM = "powers of two from 16 to 256, and 512 in bfloat16 with a multiple of 64 heads on a Hopper GPU"
NONE, DENSE, CHOSEN = 0, 1, 2  # a query's entries: none, all that are complete, those with an index


@triton.jit
def entry_row(table, first, number, mask, PAGE: tl.constexpr):
    """The row of a document's entry: of its page, if there are pages, that stands in the table from `first` on."""
    if PAGE == 0:
        row = first + number
    else:
        row = tl.load(table + first + number // PAGE, mask=mask, other=0) * PAGE + number % PAGE
    return row


@triton.jit
def _forward(
    q, rows, entries, chosen, sinks, out, lse, partial,
    position, row_first, entry_first, table,
    scale, heads, row_stride, entry_stride, slots, ratio, topk, queries, some,
    D: tl.constexpr, W: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr,
    KIND: tl.constexpr, RING: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Up to PAIRS heads of `some` queries, which share the keys that one of them sees."""
    split, p, d = tl.program_id(2), tl.arange(0, PAIRS), tl.arange(0, D)
    span, start = tl.minimum(heads, PAIRS), tl.program_id(0) * some
    stop = tl.minimum(start + some, queries)
    t, h = start + p // span, tl.program_id(1) * PAIRS + p % span
    real = (t < stop) & (h < heads)
    place = tl.load(position + t, mask=real, other=-1)
    entries_most = 0
    if KIND != 0:
        entries_most = (tl.max(place) + 1) // ratio
    low = split * LIMIT
    if low < tl.maximum(entries_most, 1):
        pair = t.to(tl.int64) * heads + h
        own = pair[:, None] * D + d[None, :]
        queries_PD = tl.load(q + own, mask=real[:, None], other=0.0)
        largest = tl.load(sinks + h, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
        total = tl.where(split == 0, 1.0, 0.0) + tl.zeros([PAIRS], tl.float32)
        sums = tl.zeros([PAIRS, D], tl.float32)
        first, first_entry = tl.load(row_first + t, mask=real, other=0), tl.load(entry_first + t, mask=real, other=0)
        chosen += start.to(tl.int64) * topk  # of the only query, as `some` is 1 then
        s = start
        while s < stop:  # one document after another, of which there is mostly one
            rows_of, entries_of, place_of = tl.load(row_first + s), tl.load(entry_first + s), tl.load(position + s)
            mine = (first == rows_of) & (first_entry == entries_of) & (place - place_of == t - s)
            following = tl.min(tl.where(real & (t >= s) & (mine == 0), t, stop))
            place_P = tl.where(mine & real & (t >= s), place, -1)
            oldest, newest = place_of - (W - 1), place_of + (following - s) - 1
            begin = tl.maximum(oldest, 0) // BLOCK * BLOCK
            window = tl.where(split == 0, tl.cdiv(newest + 1 - begin, BLOCK) * BLOCK, 0)
            end = low
            if KIND != 0:
                count_P = (place_P + 1) // ratio
                if KIND == 2:
                    count_P = tl.minimum(count_P, topk)
                end = tl.minimum(tl.max(count_P), low + LIMIT)
                last_P = tl.minimum(count_P, end) - 1
            # One loop over tiles of the window, then of entries: two would be two programs' registers.
            for i in tl.range(0, window + tl.maximum(end - low, 0), BLOCK):
                entry = i >= window if KIND != 0 else False
                number = tl.where(entry, low - window, begin) + i + tl.arange(0, BLOCK)
                there = (number >= tl.where(entry, 0, oldest)) & (number < tl.where(entry, end, newest + 1))
                least, most, index = place_P - (W - 1), place_P, number
                if KIND != 0:
                    least, most = tl.where(entry, 0, least), tl.where(entry, last_P, most)
                if RING:
                    index = tl.where(entry, number, number % slots)
                if KIND == 2:
                    index = tl.where(entry, tl.load(chosen + number, mask=there & entry, other=0), index)
                row = entry_row(table, entries_of, index, there & entry, PAGE)
                index = tl.where(entry, row, rows_of + index).to(tl.int64)
                where = tl.where(entry, entries, rows) + index * tl.where(entry, entry_stride, row_stride)
                seen = (number[None, :] >= least[:, None]) & (number[None, :] <= most[:, None])
                keys = tl.load(where[:, None] + d[None, :], mask=there[:, None], other=0.0)
                scores = tl.dot(queries_PD, tl.trans(keys), input_precision=PRECISION) * scale
                scores = tl.where(seen, scores, float("-inf"))
                new = tl.maximum(largest, tl.max(scores, 1))
                shrink = tl.exp2(largest - new)
                weights = tl.exp2(scores - new[:, None])
                total = total * shrink + tl.sum(weights, 1)
                sums = tl.dot(weights.to(keys.dtype), keys, sums * shrink[:, None], input_precision=PRECISION)
                largest = new
            s = following
        if SPLITS == 1:
            tl.store(out + own, sums * (1.0 / total)[:, None], mask=real[:, None])
            tl.store(lse + pair, largest + tl.log2(total), mask=real)
        else:
            part = split.to(tl.int64) * queries * heads + pair
            tl.store(out + part[:, None] * D + d[None, :], sums, mask=real[:, None])
            tl.store(partial + part * 2, largest, mask=real)
            tl.store(partial + part * 2 + 1, total, mask=real)


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


def _forward_tiles(dtype: torch.dtype, width: int) -> PairTiles:
    if dtype == torch.bfloat16:
        return PairTiles(64, 64, 8 if width >= 256 else 4, 2)
    return PairTiles(16, 32 if width >= 256 else 64, 8 if width >= 256 else 4, 1)


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
    kind = kind_of(entries, seen, chosen)
    parts = out if splits == 1 else q.new_empty(splits, queries, heads, width, dtype=torch.float32)
    partial = lse if splits == 1 else q.new_empty(splits, queries, heads, 2, dtype=torch.float32)
    entries = rows if entries is None or kind == NONE else entries  # of which there may be none
    first = seen.row_first if seen.entry_first is None else seen.entry_first
    # A table that is None leaves no trace in what is compiled.
    table, page = (None, 0) if kind == NONE else (seen.table, seen.page)
    topk = 0 if chosen is None else chosen.shape[1]
    chosen = first if chosen is None else chosen
    scale, ratio = width**-0.5 * LOG2E, max(seen.ratio, 1)
    if on_hopper(q):
        from .hopper_forward import forward

        forward(
            q, rows, entries, chosen, sinks, out, lse, partial, parts, seen.position, seen.row_first, first,
            scale, seen.slots, ratio, topk, splits, seen.window, kind, SPLIT, table, page,
        )  # fmt: skip
    else:
        pairs, size, warps, stages = _forward_tiles(q.dtype, width)
        # Neighbours in a pack share keys; those in a ring are mostly one of each request.
        some = 1 if kind == CHOSEN or seen.slots else max(pairs // heads, 1)
        _forward[(triton.cdiv(queries, some), triton.cdiv(heads, pairs), splits)](
            q, rows, entries, chosen, sinks, parts, lse, partial, seen.position, seen.row_first, first, table,
            scale, heads, rows.stride(0), entries.stride(0), max(seen.slots, 1), ratio, topk, queries, some,
            D=width, W=seen.window, PAIRS=pairs, BLOCK=size, LIMIT=SPLIT,
            KIND=kind, RING=seen.slots > 0, PAGE=page, SPLITS=min(splits, 2), PRECISION=precision(q.dtype),
            num_warps=warps, num_stages=stages, **SAME_BITS,
        )  # fmt: skip
    if splits > 1:
        _merge[(queries, triton.cdiv(heads, 16))](
            parts, partial, out, lse, seen.position, heads, ratio, queries,
            D=width, HEADS=16, LIMIT=SPLIT, num_warps=8 if width >= 256 else 4, **SAME_BITS,
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
        if ctx.seen.slots or ctx.seen.page:
            raise ValueError("attention over a cache has no gradient")
        given = (grads[0], q, rows, entries, sinks, out, lse, ctx.seen, chosen)
        return *attend_backward(*given, rotation=rotation), None, None, None
