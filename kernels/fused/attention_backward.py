"""Triton kernels of the backward of `kernels.attention.attend`, whose bits are the same in every run.

Where entries are chosen, one kernel goes by queries: their gradient, and the products with the entries, pair by pair.
All else goes by tiles (attention_tiles.py), or on a Hopper GPU by queries and by rows (hopper_*.py). What several
programs add to is summed in a fixed order. With `atomic` the pairs are added up in memory instead, and so are the
window's rows, in whatever order programs end. Legend, tiles: attention.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..places import Seen
from .attention import CHOSEN, DENSE, NONE, kind_of, on_hopper
from .attention_tiles import of_pairs, of_rows
from .launch import HOPPER_KEYS, LOG2E, Tiles, next_power, precision
from .norm import PROGRAMS, TILE, angles, turn

PAIR_BYTES = 2**30  # of memory for the products of a chunk of queries with their chosen entries


@triton.jit
def _delta(
    out, grad, sinks, lse, delta, turned, rotation, parts, queries, heads,
    D: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """The sum over channels of out * grad, for each query and head; a gradient of what was turned back is turned.

    `parts` [programs, heads]: the gradient of the sinks from a program's queries, each QUERIES of them in turn.
    """
    i, d = tl.arange(0, QUERIES * HEADS), tl.arange(0, D)
    block = tl.program_id(1) * HEADS
    h = block + i % HEADS
    sink = tl.load(sinks + h, mask=h < heads, other=0.0).to(tl.float32) * 1.4426950408889634
    sums = tl.zeros([HEADS], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(queries, QUERIES), tl.num_programs(0)):
        t = tile * QUERIES + i // HEADS
        real = (t < queries) & (h < heads)
        own = t.to(tl.int64) * heads + h
        at = own[:, None] * D + d[None, :]
        o = tl.load(out + at, mask=real[:, None], other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=real[:, None], other=0.0).to(tl.float32)
        product = tl.sum(o * g, 1)
        tl.store(delta + own, product, mask=real)
        weight = tl.exp2(sink - tl.load(lse + own, mask=real, other=float("inf")))
        sums -= tl.sum(tl.reshape(weight * product, [QUERIES, HEADS]), 0)
        if ROTATED > 0:
            g = turn(g, rotation, tl.where(real, t, -1), D, ROTATED, QUERIES * HEADS, D, False)
            tl.store(turned + at, g, mask=real[:, None])
    h = block + tl.arange(0, HEADS)
    tl.store(parts + tl.program_id(0) * heads + h, sums, mask=h < heads)


@triton.jit
def _keys(
    rows, entries, chosen, i, place, first, first_entry, count, row_stride, entry_stride,
    D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tile i of what a query at `place` sees: keys [BLOCK, D] and which of them are real; window tiles come first."""
    ENTRIES: tl.constexpr = tl.cdiv(W, BLOCK) * BLOCK  # where the tiles of entries begin
    at = i + tl.arange(0, BLOCK)
    number = place - (W - 1) + at
    seen = (number >= 0) & (at < W)
    where = rows + (first + number).to(tl.int64) * row_stride
    entry = (at >= ENTRIES) & (at - ENTRIES < count)
    number = tl.load(chosen + at - ENTRIES, mask=entry, other=0)
    where = tl.where(entry, entries + (first_entry + number).to(tl.int64) * entry_stride, where)
    seen = seen | entry
    return tl.load(where[:, None] + tl.arange(0, D)[None, :], mask=seen[:, None], other=0.0), seen


@triton.jit
def _queries_backward(
    q, rows, entries, chosen, grad, lse, delta, grad_q, pairs, of_rows,
    position, row_first, entry_first,
    scale, heads, row_stride, entry_stride, ratio, topk,
    D: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    ATOMIC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one query's heads, whose entries are chosen; of those to `pairs`, or of all its keys to their own
    (ATOMIC)."""
    t = tl.program_id(0).to(tl.int64)
    h, d = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, D)
    own, real = (t * heads + h)[:, None] * D + d[None, :], h < heads
    queries_HD = tl.load(q + own, mask=real[:, None], other=0.0)
    grad_HD = tl.load(grad + own, mask=real[:, None], other=0.0)
    lse_H = tl.load(lse + t * heads + h, mask=real, other=0.0)
    delta_H = tl.load(delta + t * heads + h, mask=real, other=0.0)
    first = tl.load(row_first + t)
    result = tl.zeros([HEADS, D], tl.float32)
    place = tl.load(position + t)
    count = tl.minimum((place + 1) // ratio, topk)
    first_entry = tl.load(entry_first + t)
    ENTRIES: tl.constexpr = tl.cdiv(W, BLOCK) * BLOCK
    for i in tl.range(0, ENTRIES + count, BLOCK):
        keys, seen = _keys(
            rows, entries, chosen + t * topk, i, place, first, first_entry, count, row_stride, entry_stride,
            D, W, BLOCK,
        )  # fmt: skip
        scores = tl.dot(queries_HD, tl.trans(keys), input_precision=PRECISION) * scale
        weights = tl.where(seen[None, :], tl.exp2(scores - lse_H[:, None]), 0.0)
        inner = tl.dot(grad_HD, tl.trans(keys), input_precision=PRECISION)
        slope = (weights * (inner - delta_H[:, None]) * (scale * 0.6931471805599453)).to(keys.dtype)
        result = tl.dot(slope, keys, result, input_precision=PRECISION)
        # [D, keys], not [keys, D]: a product whose rows are the channels, which fits into shared memory; "ieee", as
        # fp32 in three parts does not. Also for tiles of the window, whose rows have another kernel if not ATOMIC:
        # no product in a branch.
        of_keys = tl.dot(tl.trans(queries_HD), slope, input_precision="ieee")
        of_keys = tl.dot(tl.trans(grad_HD), weights.to(keys.dtype), of_keys, input_precision="ieee")
        at = i - ENTRIES + tl.arange(0, BLOCK)
        real_B = (at >= 0) & (at < count)
        if ATOMIC:
            entry = first_entry + tl.load(chosen + t * topk + at, mask=real_B, other=0)
            row = first + place - (W - 1) + i + tl.arange(0, BLOCK)
            to = tl.where(at < 0, of_rows + row.to(tl.int64) * D, pairs + entry.to(tl.int64) * D)
            tl.atomic_add(to[None, :] + d[:, None], of_keys, mask=seen[None, :])
        else:
            block = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
            where = block.to(tl.int64) * (tl.cdiv(topk, BLOCK) * BLOCK) + at
            tl.store(pairs + where[None, :] * D + d[:, None], of_keys, mask=real_B[None, :])
    tl.store(grad_q + own, result, mask=real[:, None])


@triton.jit
def _sum_pairs(pairs, order, borders, total, blocks, topk, padded, D: tl.constexpr, PAIRS: tl.constexpr):
    """Adds an entry's pairs to its gradient, in the order of their queries: `borders[e]` ... in `order`."""
    e, d = tl.program_id(0), tl.arange(0, D)
    begin, end = tl.load(borders + e), tl.load(borders + e + 1)
    if begin == end:
        return
    sums = tl.zeros([PAIRS, D], tl.float32)
    for i in tl.range(begin, end, PAIRS, num_stages=3):
        at = i + tl.arange(0, PAIRS)
        pair = tl.load(order + at, mask=at < end, other=0).to(tl.int64)
        for block in range(0, blocks):
            where = (pair // topk * blocks + block) * padded + pair % topk
            some = tl.load(pairs + where[:, None] * D + d[None, :], mask=(at < end)[:, None], other=0.0)
            sums += some.to(tl.float32)
    to = total + e.to(tl.int64) * D + d
    tl.store(to, tl.load(to) + tl.sum(sums, 0))


def _chosen_tiles(dtype: torch.dtype, heads: int, width: int) -> Tiles:
    if dtype == torch.bfloat16 and width >= 256:
        return Tiles(min(max(next_power(heads), 16), 64), 32, 8, 1)
    return Tiles(16, 16 if width >= 256 else 32, 8 if width >= 256 else 4, 1)


def attend_backward(
    grad: Tensor, q: Tensor, rows: Tensor, entries: Tensor | None, sinks: Tensor, out: Tensor, lse: Tensor,
    seen: Seen, chosen: Tensor | None, atomic: bool = False, rotation: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of q, rows, entries and sinks, for a pack (`slots` 0, row_first rises, row of query t is row t).

    `atomic` makes a difference where entries are chosen: nothing else is scattered.
    With `rotation`, `out` is what it was taken off, and `grad` that one's gradient.
    """
    grad, q, rows, entries, chosen = (None if x is None else x.contiguous() for x in (grad, q, rows, entries, chosen))
    assert grad is not None and q is not None and rows is not None
    kind = kind_of(entries, seen, chosen)
    turned, delta, of_sinks = _of_sinks(grad, sinks, out, lse, rotation)
    given, scattered = (turned, lse, delta, seen), atomic and kind == CHOSEN
    wide = {"dtype": torch.float32}  # what is added up in memory
    grad_rows = torch.zeros_like(rows, **wide) if scattered else of_rows(q, rows, *given, entries=False)
    grad_entries = None
    if entries is not None:
        dense = kind == DENSE
        grad_entries = of_rows(q, entries, *given, entries=True) if dense else torch.zeros_like(entries, **wide)
    # Last, as it takes the place of the gradient where that is a copy: a program reads its own part alone, and first.
    grad_q = torch.empty_like(q) if rotation is None else turned
    if kind == CHOSEN or on_hopper(q):
        _of_queries(q, rows, entries, *given, chosen, scattered, grad_q, grad_rows, grad_entries)
    else:
        of_pairs(q, rows, entries, *given, grad_q)
    return grad_q, grad_rows.to(q.dtype), None if grad_entries is None else grad_entries.to(q.dtype), of_sinks


def _of_sinks(
    grad: Tensor, sinks: Tensor, out: Tensor, lse: Tensor, rotation: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient as attention gave it, before `rotation`; the sums over channels of out * grad, fp32 [T, H]; the
    gradient of the sinks."""
    queries, heads, width = grad.shape
    delta, (table, rotated) = torch.empty_like(lse), angles(rotation, lse)
    turned = grad if rotation is None else torch.empty_like(grad)
    some = min(next_power(heads), 16)
    at_once = max(TILE // (width * some), 1)
    parts = lse.new_empty(max(min(triton.cdiv(queries, at_once), PROGRAMS), 1), heads)
    _delta[(parts.shape[0], triton.cdiv(heads, some))](
        out, grad, sinks, lse, delta, turned, table, parts, queries, heads,
        D=width, QUERIES=at_once, HEADS=some, ROTATED=rotated, num_warps=8,
    )  # fmt: skip
    return turned, delta, parts.sum(0).to(sinks.dtype)


def _of_queries(
    q: Tensor, rows: Tensor, entries: Tensor | None, grad: Tensor, lse: Tensor, delta: Tensor, seen: Seen,
    chosen: Tensor | None, atomic: bool, grad_q: Tensor, grad_rows: Tensor, grad_entries: Tensor | None,
) -> None:  # fmt: skip
    """Fills the gradient of the queries, one a program; adds the entries', fp32 [N, D], if they are chosen, and if
    `atomic` that of the rows, fp32 [R, D]."""
    queries, heads, width = q.shape
    kind, hopper = kind_of(entries, seen, chosen), on_hopper(q)
    tiles = Tiles(64, HOPPER_KEYS, 0, 0) if hopper else _chosen_tiles(q.dtype, heads, width)
    blocks = triton.cdiv(heads, tiles.heads)
    first = seen.row_first if seen.entry_first is None else seen.entry_first
    topk = 1 if chosen is None else chosen.shape[1]
    padded, chunk = -(-topk // tiles.keys) * tiles.keys, max(queries, 1)
    pairs = lse if grad_entries is None else grad_entries
    if kind == CHOSEN and not atomic:
        chunk = min(max(PAIR_BYTES // (blocks * padded * width * q.element_size()), 1), chunk)
        pairs = q.new_empty(chunk * blocks * padded, width)
    keys = rows if entries is None or kind == NONE else entries
    scale, ratio = width**-0.5 * LOG2E, max(seen.ratio, 1)
    for start in range(0, queries, chunk):
        some = slice(start, start + chunk)
        those, numbers = seen.of(some), first[some] if chosen is None else chosen[some]
        given = (q[some], rows, keys, numbers, grad[some], lse[some], delta[some], grad_q[some], pairs, grad_rows)
        places = (those.position, those.row_first, first[some])
        if hopper:
            from .hopper_queries import queries_backward

            queries_backward(*given, *places, scale, ratio, topk, seen.window, kind, atomic)
        else:
            _queries_backward[(those.position.numel(), blocks)](
                *given, *places, scale, heads, rows.stride(0), keys.stride(0), ratio, topk,
                D=width, W=seen.window, HEADS=tiles.heads, BLOCK=tiles.keys, ATOMIC=atomic,
                PRECISION=precision(q.dtype), num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
        if kind == CHOSEN and not atomic:
            assert grad_entries is not None
            sum_pairs(pairs, grad_entries, those, numbers, blocks, padded)


def sum_pairs(pairs: Tensor, total: Tensor, seen: Seen, chosen: Tensor, blocks: int, padded: int) -> None:
    """Adds pairs [.., D] of `chosen` [T, K], `padded` a query and block of heads, to their gradient fp32 [N, D]."""
    assert seen.entry_first is not None
    topk, (entries, width) = chosen.shape[1], total.shape
    count = ((seen.position + 1) // seen.ratio).unsqueeze(1)
    real = torch.arange(topk, device=chosen.device, dtype=torch.int32) < count
    numbers = torch.where(real, chosen + seen.entry_first.unsqueeze(1), entries).flatten()
    numbers, order = torch.sort(numbers, stable=True)
    borders = torch.searchsorted(numbers, torch.arange(entries + 1, device=chosen.device, dtype=numbers.dtype))
    size = max(2048 // width, 4)
    _sum_pairs[(entries,)](pairs, order, borders, total, blocks, topk, padded, D=width, PAIRS=size, num_warps=2)
