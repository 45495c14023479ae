"""Triton kernels of the backward of `kernels.attention.attend`, whose bits are the same in every run.

One kernel goes by queries (their gradient; the products of chosen entries, pair by pair) and one by rows (window rows,
and entries where all are visible). What several programs add to is summed in a fixed order. With `atomic` the pairs are
added up in memory instead, and so are the window's rows, in whatever order programs end. Legend, tiles: attention.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..places import Seen
from .attention import CHOSEN, DENSE, NONE, _keys, kind_of, on_hopper
from .launch import HOPPER_KEYS, HOPPER_ROWS, LOG2E, Tiles, next_power, precision
from .norm import angles, turn

PAIR_BYTES = 2**30  # of memory for the products of a chunk of queries with their chosen entries


@triton.jit
def _delta(
    out, grad, delta, turned, rotation, pairs, heads, D: tl.constexpr, PAIRS: tl.constexpr, ROTATED: tl.constexpr
):
    """The sum over channels of out * grad, for `pairs` (query, head); a gradient of what was turned back is turned."""
    i, d = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS), tl.arange(0, D)
    at = i[:, None] * D + d[None, :]
    o = tl.load(out + at, mask=(i < pairs)[:, None], other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=(i < pairs)[:, None], other=0.0).to(tl.float32)
    tl.store(delta + i, tl.sum(o * g, 1), mask=i < pairs)
    if ROTATED > 0:
        g = turn(g, rotation, tl.where(i < pairs, i // heads, -1), D, ROTATED, PAIRS, D, False)
        tl.store(turned + at, g, mask=(i < pairs)[:, None])


@triton.jit
def _queries_backward(
    q, rows, entries, chosen, grad, lse, delta, grad_q, pairs, of_rows,
    position, row_first, entry_first,
    scale, heads, row_stride, entry_stride, ratio, topk,
    D: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    KIND: tl.constexpr, ATOMIC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one query's heads; of its chosen entries to `pairs`, or of all its keys to their own (ATOMIC)."""
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
    count = 0
    if KIND != 0:
        count = (place + 1) // ratio
        if KIND == 2:
            count = tl.minimum(count, topk)
    first_entry = tl.load(entry_first + t)
    ENTRIES: tl.constexpr = tl.cdiv(W, BLOCK) * BLOCK
    for i in tl.range(0, ENTRIES + count, BLOCK):
        keys, seen = _keys(
            rows, entries, chosen + t * topk, i, place, first, first_entry, 0, count,
            row_stride, entry_stride, 1, D, W, BLOCK, KIND, False,
        )  # fmt: skip
        scores = tl.dot(queries_HD, tl.trans(keys), input_precision=PRECISION) * scale
        weights = tl.where(seen[None, :], tl.exp2(scores - lse_H[:, None]), 0.0)
        inner = tl.dot(grad_HD, tl.trans(keys), input_precision=PRECISION)
        slope = (weights * (inner - delta_H[:, None]) * (scale * 0.6931471805599453)).to(keys.dtype)
        result = tl.dot(slope, keys, result, input_precision=PRECISION)
        if KIND == 2:
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
    D: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of rows from a part of the queries that see any of them: W > 0 window rows, else entries."""
    tile, part, parts_count = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    r = tile * ROWS + tl.arange(0, ROWS)
    keys_RD = rows.load([tile * ROWS, 0])
    begin, end = tl.load(low + tile), tl.load(high + tile)
    share = tl.cdiv(end - begin, parts_count)
    result = tl.zeros([ROWS, D], tl.float32)
    for t in range(begin + part * share, tl.minimum(begin + (part + 1) * share, end)):
        start = tl.load(first + t)
        if W > 0:
            seen = (r >= start) & (r <= t) & (r > t - W)
        else:
            seen = (r >= start) & (r < start + (tl.load(position + t) + 1) // ratio)
        for block in range(0, heads, HEADS):
            h = block + tl.arange(0, HEADS)
            own = t * heads + h
            # Descriptors, as plain loads pass through registers, and there are none left.
            queries_HD, grad_HD = q.load([t * heads + block, 0]), grad.load([t * heads + block, 0])
            lse_H = tl.load(lse + own, mask=h < heads, other=float("inf"))  # a head that is none weighs nothing
            delta_H = tl.load(delta + own, mask=h < heads, other=0.0)
            scores = tl.dot(keys_RD, tl.trans(queries_HD), input_precision=PRECISION) * scale
            weights = tl.where(seen[:, None], tl.exp2(scores - lse_H[None, :]), 0.0)
            inner = tl.dot(keys_RD, tl.trans(grad_HD), input_precision=PRECISION)
            slope = weights * (inner - delta_H[None, :]) * (scale * 0.6931471805599453)
            result = tl.dot(weights.to(keys_RD.dtype), grad_HD, result, input_precision=PRECISION)
            result = tl.dot(slope.to(keys_RD.dtype), queries_HD, result, input_precision=PRECISION)
    parts.store([(part * tl.num_programs(0) + tile) * ROWS, 0], result)


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


def _backward_tiles(dtype: torch.dtype, heads: int, width: int) -> Tiles:
    if dtype == torch.bfloat16 and width >= 256:
        return Tiles(min(max(next_power(heads), 16), 64), 32, 8, 1)
    return Tiles(16, 16 if width >= 256 else 32, 8 if width >= 256 else 4, 1)


def _rows_tiles(dtype: torch.dtype, width: int) -> Tiles:
    if dtype == torch.bfloat16 and width >= 256:
        return Tiles(32, 64, 4, 1)
    return Tiles(16, 16, 8 if width >= 256 else 4, 1)


def attend_backward(
    grad: Tensor, q: Tensor, rows: Tensor, entries: Tensor | None, sinks: Tensor, out: Tensor, lse: Tensor,
    seen: Seen, chosen: Tensor | None, atomic: bool = False, rotation: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of q, rows, entries and sinks, for a pack (`slots` 0, row_first rises, row of query t is row t).

    `atomic` makes a difference where entries are chosen: nothing else is scattered.
    With `rotation`, `out` is what it was taken off, and `grad` that one's gradient.
    """
    queries, heads, width = q.shape
    grad, q, rows, entries, chosen = (None if x is None else x.contiguous() for x in (grad, q, rows, entries, chosen))
    assert grad is not None and q is not None and rows is not None
    delta = torch.empty_like(lse)
    table, rotated = angles(rotation, lse)
    turned = grad if rotation is None else torch.empty_like(grad)
    _delta[(triton.cdiv(queries * heads, 16),)](
        out, grad, delta, turned, table, queries * heads, heads, D=width, PAIRS=16, ROTATED=rotated
    )
    sink = -(torch.exp2(sinks.float() * LOG2E - lse) * delta).sum(0).to(sinks.dtype)
    given = (turned, lse, delta, seen)
    grad_q, of_entries, of_rows = _of_queries(q, rows, entries, *given, chosen, atomic)
    of_rows = _of_rows(q, rows, *given, entries=False) if of_rows is None else of_rows
    if entries is not None and kind_of(entries, seen, chosen) == DENSE:
        of_entries = _of_rows(q, entries, *given, entries=True)
    return grad_q, of_rows.to(rows.dtype), None if of_entries is None else of_entries.to(q.dtype), sink


def _of_queries(
    q: Tensor, rows: Tensor, entries: Tensor | None, grad: Tensor, lse: Tensor, delta: Tensor, seen: Seen,
    chosen: Tensor | None, atomic: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradient of the queries; of the entries, fp32 [N, D], as far as they are chosen; with that, if `atomic`, of
    the rows, fp32 [R, D]."""
    queries, heads, width = q.shape
    kind, hopper = kind_of(entries, seen, chosen), on_hopper(q)
    tiles = Tiles(64, HOPPER_KEYS, 0, 0) if hopper else _backward_tiles(q.dtype, heads, width)
    blocks = triton.cdiv(heads, tiles.heads)
    grad_q = torch.empty_like(q)
    total = None if entries is None else torch.zeros_like(entries, dtype=torch.float32)
    first = seen.row_first if seen.entry_first is None else seen.entry_first
    topk = 1 if chosen is None else chosen.shape[1]
    padded, chunk, pairs, of_rows = -(-topk // tiles.keys) * tiles.keys, max(queries, 1), lse, None
    atomic = atomic and kind == CHOSEN
    if kind == CHOSEN:
        assert total is not None
        pairs = total
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
                D=width, W=seen.window, HEADS=tiles.heads, BLOCK=tiles.keys, KIND=kind, ATOMIC=atomic,
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
    """fp32 [R, D]: the gradient of window rows, or of entries that are all visible."""
    queries, heads, width = q.shape
    count, device = rows.shape[0], q.device
    size = HOPPER_ROWS if on_hopper(q) else _rows_tiles(q.dtype, width).keys
    starts = torch.arange(0, count, size, device=device, dtype=torch.int32)
    if entries:
        assert seen.entry_first is not None
        first = seen.entry_first
        ends = first + (seen.position + 1) // seen.ratio
        low = torch.searchsorted(ends, starts, right=True, out_int32=True)
        high = torch.searchsorted(first, (starts + size - 1).clamp(max=count - 1), right=True, out_int32=True)
        shares = min(max(1024 // starts.numel(), 1), 256)  # few tiles, and of unequal work
    else:
        first = seen.row_first
        low, high = starts, (starts + size + seen.window - 1).clamp(max=queries)
        shares = _shares(starts.numel(), size + seen.window)
    parts = q.new_empty(shares, starts.numel() * size, width, dtype=torch.float32)
    scale, ratio, window = width**-0.5 * LOG2E, max(seen.ratio, 1), 0 if entries else seen.window
    if on_hopper(q):
        from .hopper_rows import rows_backward

        rows_backward(q, rows, grad, lse, delta, parts, first, seen.position, low, high, scale, ratio, window)
    else:
        tiles = _rows_tiles(q.dtype, width)
        blocks = [tiles.heads, width]
        _rows_backward[(starts.numel(), shares)](
            TensorDescriptor.from_tensor(q.flatten(0, 1), blocks), TensorDescriptor.from_tensor(rows, [size, width]),
            TensorDescriptor.from_tensor(grad.flatten(0, 1), blocks), lse, delta,
            TensorDescriptor.from_tensor(parts.flatten(0, 1), [size, width]), first, seen.position, low, high,
            scale, heads, ratio, D=width, W=window, HEADS=tiles.heads, ROWS=size, PRECISION=precision(q.dtype),
            num_warps=tiles.warps, num_stages=1,
        )  # fmt: skip
    return (parts[0] if shares == 1 else parts.sum(0))[:count]


def _shares(tiles: int, queries: int) -> int:
    """In how many programs the queries of a tile go, so that a GPU's multiprocessors (132) end together."""
    return min(range(1, 5), key=lambda shares: -(-tiles * shares // 132) * (-(-queries // shares) + 6))
