"""Triton kernels of the backward of `kernels.attention.attend`, whose bits are the same in every run.

One kernel goes by queries (their gradient; the products of chosen entries, pair by pair) and one by rows (window rows,
and entries where all are visible). What several programs add to is summed in a fixed order. With `atomic` the pairs are
added up in memory instead, and so are the window's rows, in whatever order programs end. Legend, tiles: attention.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..places import Seen
from .attention import CHOSEN, DENSE, NONE, _keys, kind_of, on_hopper
from .launch import HOPPER_KEYS, HOPPER_ROWS, LOG2E, Tiles, next_power, precision
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
def _tiles_backward(
    q, rows, entries, grad, lse, delta, grad_q, position, row_first, entry_first,
    scale, queries, heads, ratio,
    D: tl.constexpr, W: tl.constexpr, PAIRS: tl.constexpr, KEYS: tl.constexpr, DENSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of PAIRS neighbouring pairs (query, head), from all keys that any of them sees."""
    low = tl.program_id(0) * PAIRS
    pair = low + tl.arange(0, PAIRS)
    real, t = pair < queries * heads, pair // heads
    queries_PD, grad_PD = q.load([low, 0]), grad.load([low, 0])
    lse_P = tl.load(lse + pair, mask=real, other=float("inf"))  # a pair that is none weighs nothing
    delta_P = tl.load(delta + pair, mask=real, other=0.0)
    oldest, newest = low // heads, tl.minimum((low + PAIRS - 1) // heads, queries - 1)
    first = tl.maximum(tl.load(row_first + t, mask=real, other=0), t - (W - 1))
    result = tl.zeros([PAIRS, D], tl.float32)
    for i in tl.range(tl.maximum(tl.load(row_first + oldest), oldest - (W - 1)), newest + 1, KEYS):
        r = i + tl.arange(0, KEYS)
        seen = (r[None, :] >= first[:, None]) & (r[None, :] <= t[:, None])
        keys = rows.load([i, 0])
        slope = _slope(queries_PD, grad_PD, keys, seen, lse_P, delta_P, scale, PRECISION)
        result = tl.dot(slope, keys, result, input_precision=PRECISION)
    if DENSE:
        first = tl.load(entry_first + t, mask=real, other=0)
        last = first + (tl.load(position + t, mask=real, other=-1) + 1) // ratio
        end = tl.load(entry_first + newest) + (tl.load(position + newest) + 1) // ratio
        for i in tl.range(tl.load(entry_first + oldest), end, KEYS):
            r = i + tl.arange(0, KEYS)
            seen = (r[None, :] >= first[:, None]) & (r[None, :] < last[:, None])
            keys = entries.load([i, 0])
            slope = _slope(queries_PD, grad_PD, keys, seen, lse_P, delta_P, scale, PRECISION)
            result = tl.dot(slope, keys, result, input_precision=PRECISION)
    grad_q.store([low, 0], result.to(grad_q.dtype))


@triton.jit
def _slope(queries_PD, grad_PD, keys, seen, lse_P, delta_P, scale, PRECISION: tl.constexpr):
    """The gradient of the products of queries and keys."""
    scores = tl.dot(queries_PD, tl.trans(keys), input_precision=PRECISION) * scale
    weights = tl.where(seen, tl.exp2(scores - lse_P[:, None]), 0.0)
    inner = tl.dot(grad_PD, tl.trans(keys), input_precision=PRECISION)
    return (weights * (inner - delta_P[:, None]) * (scale * 0.6931471805599453)).to(keys.dtype)


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
            rows, entries, chosen + t * topk, i, place, first, first_entry, 0, count,
            row_stride, entry_stride, 1, D, W, BLOCK, 2, False,
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
def _rows_backward(
    q, rows, grad, lse, delta, parts, first, position, low, high,
    scale, heads, ratio,
    D: tl.constexpr, W: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of rows (W > 0: window rows, else entries) from a part of the pairs (query, head) that see any
    of them. Neighbouring pairs make a step, whatever the number of heads."""
    tile, part, parts_count = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    r = tile * ROWS + tl.arange(0, ROWS)
    keys_RD = rows.load([tile * ROWS, 0])
    begin, end = tl.load(low + tile) * heads, tl.load(high + tile) * heads
    share = tl.cdiv(tl.cdiv(end - begin, parts_count), PAIRS) * PAIRS
    begin += part * share
    end = tl.minimum(begin + share, end)
    result = tl.zeros([ROWS, D], tl.float32)
    for i in tl.range(begin, end, PAIRS):
        pair = i + tl.arange(0, PAIRS)
        real, t = pair < end, pair // heads
        oldest = tl.load(first + t, mask=real, other=0)
        if W > 0:
            oldest, newest = tl.maximum(oldest, t - (W - 1)), t
        else:
            newest = oldest + (tl.load(position + t, mask=real, other=0) + 1) // ratio - 1
        seen = (r[:, None] >= oldest[None, :]) & (r[:, None] <= newest[None, :])
        queries_PD, grad_PD = q.load([i, 0]), grad.load([i, 0])
        lse_P = tl.load(lse + pair, mask=real, other=float("inf"))  # a pair that is another part's weighs nothing
        delta_P = tl.load(delta + pair, mask=real, other=0.0)
        scores = tl.dot(keys_RD, tl.trans(queries_PD), input_precision=PRECISION) * scale
        weights = tl.where(seen, tl.exp2(scores - lse_P[None, :]), 0.0)
        inner = tl.dot(keys_RD, tl.trans(grad_PD), input_precision=PRECISION)
        slope = weights * (inner - delta_P[None, :]) * (scale * 0.6931471805599453)
        result = tl.dot(weights.to(keys_RD.dtype), grad_PD, result, input_precision=PRECISION)
        result = tl.dot(slope.to(keys_RD.dtype), queries_PD, result, input_precision=PRECISION)
    parts.store([(part * tl.num_programs(0) + tile) * ROWS, 0], result)


@triton.jit
def _beyond(first, position, row, queries, ratio, steps, ENTRIES: tl.constexpr):
    """The first query whose rows begin behind `row`; if ENTRIES, whose entries end behind it. Both rise."""
    low, high = tl.zeros_like(row), tl.zeros_like(row) + queries
    for _ in range(steps):
        middle, some = (low + high) // 2, low < high
        found = tl.load(first + middle, mask=some, other=0)
        if ENTRIES:
            found += (tl.load(position + middle, mask=some, other=0) + 1) // ratio
        low, high = tl.where(some & (found <= row), middle + 1, low), tl.where(some & (found > row), middle, high)
    return low


@triton.jit
def _bounds(
    first, position, low, high, queries, rows, tiles, ratio, steps,
    W: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Of each tile of ROWS rows the queries low ... high - 1, beyond which none sees any of them."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    start = tile * ROWS
    end = _beyond(first, position, tl.minimum(start + ROWS, rows) - 1, queries, ratio, steps, False)
    if W > 0:
        start, end = tl.minimum(start, end), tl.minimum(end, start + ROWS + W - 1)
    else:
        start = _beyond(first, position, start, queries, ratio, steps, True)
    tl.store(low + tile, start, mask=tile < tiles)
    tl.store(high + tile, tl.maximum(start, end), mask=tile < tiles)


@triton.jit
def _sum_parts(parts, out, count, size, SHARES: tl.constexpr, C: tl.constexpr):
    """The first `count` numbers of `parts` [SHARES, size], summed in their order."""
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    sums = tl.load(parts + at, mask=at < count, other=0.0)
    for i in range(1, SHARES):
        sums += tl.load(parts + i * size + at, mask=at < count, other=0.0)
    tl.store(out + at, sums, mask=at < count)


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


class PairTiles(NamedTuple):
    """Of one program: pairs (query, head) of a tile, rows or keys of a tile, warps, stages of the loads' pipeline."""

    pairs: int
    keys: int
    warps: int
    stages: int


def _by_pairs(dtype: torch.dtype, width: int) -> PairTiles:
    """Of `_tiles_backward`."""
    if dtype == torch.bfloat16:
        return PairTiles(64, 64, 4, 2) if width < 256 else PairTiles(64, 32, 4, 2)
    return PairTiles(16, 16 if width >= 256 else 32, 8 if width >= 256 else 4, 1)


def _by_rows(dtype: torch.dtype, width: int) -> PairTiles:
    """Of `_rows_backward`."""
    if dtype == torch.bfloat16:
        return PairTiles(64, 64, 4, 2) if width < 256 else PairTiles(32, 64, 4, 1)
    return PairTiles(16, 16, 8 if width >= 256 else 4, 1)


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
    given = turned, lse, delta, seen
    if on_hopper(q) or kind == CHOSEN:
        of_q, of_entries, of_rows = _of_queries(q, rows, entries, *given, chosen, atomic)
    else:
        of_q, of_entries, of_rows = _of_pairs(q, rows, entries, *given), None, None
    of_rows = _of_rows(q, rows, *given, entries=False) if of_rows is None else of_rows.to(rows.dtype)
    if entries is not None and kind == DENSE:
        of_entries = _of_rows(q, entries, *given, entries=True)
    elif entries is not None:
        of_entries = torch.zeros_like(entries) if of_entries is None else of_entries.to(entries.dtype)
    return of_q, of_rows, of_entries, of_sinks


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


def _of_pairs(
    q: Tensor, rows: Tensor, entries: Tensor | None, grad: Tensor, lse: Tensor, delta: Tensor, seen: Seen
) -> Tensor:
    """The gradient of the queries, which see all entries that are complete, or none."""
    queries, heads, width = q.shape
    dense = kind_of(entries, seen, None) == DENSE
    pairs, size, warps, stages = _by_pairs(q.dtype, width)
    result = torch.empty_like(q)
    described = [TensorDescriptor.from_tensor(x.flatten(0, 1), [pairs, width]) for x in (q, grad, result)]
    keys = [TensorDescriptor.from_tensor(x, [size, width]) for x in (rows, entries if dense else rows)]  # pyright: ignore
    _tiles_backward[(triton.cdiv(queries * heads, pairs),)](
        described[0], *keys, described[1], lse, delta, described[2],
        seen.position, seen.row_first, seen.entry_first if dense else seen.row_first,
        width**-0.5 * LOG2E, queries, heads, max(seen.ratio, 1),
        D=width, W=seen.window, PAIRS=pairs, KEYS=size, DENSE=dense, PRECISION=precision(q.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return result


def _of_queries(
    q: Tensor, rows: Tensor, entries: Tensor | None, grad: Tensor, lse: Tensor, delta: Tensor, seen: Seen,
    chosen: Tensor | None, atomic: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradient of the queries, one a program; of the entries, fp32 [N, D], if they are chosen; with that, if
    `atomic`, of the rows, fp32 [R, D]."""
    queries, heads, width = q.shape
    kind, hopper = kind_of(entries, seen, chosen), on_hopper(q)
    tiles = Tiles(64, HOPPER_KEYS, 0, 0) if hopper else _chosen_tiles(q.dtype, heads, width)
    blocks = triton.cdiv(heads, tiles.heads)
    grad_q = torch.empty_like(q)
    first = seen.row_first if seen.entry_first is None else seen.entry_first
    topk = 1 if chosen is None else chosen.shape[1]
    padded, chunk, pairs = -(-topk // tiles.keys) * tiles.keys, max(queries, 1), lse
    total = of_rows = None
    atomic = atomic and kind == CHOSEN
    if kind == CHOSEN:
        assert entries is not None
        pairs = total = torch.zeros_like(entries, dtype=torch.float32)
        if atomic:
            of_rows = torch.zeros_like(rows, dtype=torch.float32)
        else:
            chunk = min(max(PAIR_BYTES // (blocks * padded * width * q.element_size()), 1), chunk)
            pairs = q.new_empty(chunk * blocks * padded, width)
    keys = rows if entries is None or kind == NONE else entries
    scale, ratio = width**-0.5 * LOG2E, max(seen.ratio, 1)
    for start in range(0, queries, chunk):
        some = slice(start, start + chunk)
        those, numbers = seen.of(some), first[some] if chosen is None else chosen[some]
        given = (q[some], rows, keys, numbers, grad[some], lse[some], delta[some], grad_q[some], pairs)
        given = (*given, pairs if of_rows is None else of_rows)
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
            assert total is not None
            sum_pairs(pairs, total, those, numbers, blocks, padded)
    return grad_q, total, of_rows


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


def _of_rows(q: Tensor, rows: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, seen: Seen, entries: bool) -> Tensor:
    """[R, D]: the gradient of window rows, or of entries that are all visible."""
    queries, heads, width = q.shape
    pairs, size, warps, stages = _by_rows(q.dtype, width)
    if on_hopper(q):
        size = HOPPER_ROWS
    count, tiles = rows.shape[0], triton.cdiv(rows.shape[0], size)
    first = seen.entry_first if entries else seen.row_first
    assert first is not None
    ratio, window = max(seen.ratio, 1), 0 if entries else seen.window
    low, high = first.new_empty(tiles), first.new_empty(tiles)
    _bounds[(triton.cdiv(tiles, 128),)](
        first, seen.position, low, high, queries, count, tiles, ratio, queries.bit_length(),
        W=window, ROWS=size, TILES=128,
    )  # fmt: skip
    # Entries have few tiles, and of unequal work.
    shares = min(max(1024 // tiles, 1), 256) if entries else _shares(tiles, size + window)
    parts = q.new_empty(shares, tiles * size, width, dtype=torch.float32)
    scale = width**-0.5 * LOG2E
    if on_hopper(q):
        from .hopper_rows import rows_backward

        rows_backward(q, rows, grad, lse, delta, parts, first, seen.position, low, high, scale, ratio, window)
    else:
        described = [TensorDescriptor.from_tensor(x.flatten(0, 1), [pairs, width]) for x in (q, grad)]
        keys, results = (TensorDescriptor.from_tensor(x, [size, width]) for x in (rows, parts.flatten(0, 1)))
        _rows_backward[(tiles, shares)](
            described[0], keys, described[1], lse, delta, results, first, seen.position, low, high,
            scale, heads, ratio, D=width, W=window, PAIRS=pairs, ROWS=size, PRECISION=precision(q.dtype),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    out = torch.empty_like(rows)
    _sum_parts[(triton.cdiv(out.numel(), 1024),)](parts, out, out.numel(), parts[0].numel(), SHARES=shares, C=1024)
    return out


def _shares(tiles: int, queries: int) -> int:
    """In how many programs the queries of a tile go, so that a GPU's multiprocessors (132) end together."""
    return min(range(1, 5), key=lambda shares: -(-tiles * shares // 132) * (-(-queries // shares) + 6))
