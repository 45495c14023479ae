"""Triton kernels of attention's backward by tiles: of queries that see all entries, or none, and of rows and entries.

A pair is a query and a head of it. Neighbouring pairs share their keys, and make tiles whatever the number of heads:
64 of them are what a warpgroup multiplies at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..places import Seen
from .attention import on_hopper
from .launch import HOPPER_ROWS, LOG2E, PairTiles, precision


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
def _sum_parts(parts, out, count, size, shares, C: tl.constexpr):
    """The first `count` numbers of `parts` [shares, size], summed in their order."""
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    sums = tl.load(parts + at, mask=at < count, other=0.0)
    for _ in range(1, shares):
        parts += size
        sums += tl.load(parts + at, mask=at < count, other=0.0)
    tl.store(out + at, sums, mask=at < count)


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


def of_pairs(
    q: Tensor, rows: Tensor, entries: Tensor | None, grad: Tensor, lse: Tensor, delta: Tensor, seen: Seen, of_q: Tensor
) -> None:
    """Fills the gradient of the queries, which see all entries that are complete, or none."""
    queries, heads, width = q.shape
    dense = entries is not None and seen.most > 0
    pairs, size, warps, stages = _by_pairs(q.dtype, width)
    described = [TensorDescriptor.from_tensor(x.flatten(0, 1), [pairs, width]) for x in (q, grad, of_q)]
    keys = [TensorDescriptor.from_tensor(x, [size, width]) for x in (rows, entries if dense else rows)]  # pyright: ignore
    _tiles_backward[(triton.cdiv(queries * heads, pairs),)](
        described[0], *keys, described[1], lse, delta, described[2],
        seen.position, seen.row_first, seen.entry_first if dense else seen.row_first,
        width**-0.5 * LOG2E, queries, heads, max(seen.ratio, 1),
        D=width, W=seen.window, PAIRS=pairs, KEYS=size, DENSE=dense, PRECISION=precision(q.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def of_rows(q: Tensor, rows: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, seen: Seen, entries: bool) -> Tensor:
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
    if on_hopper(q) and not entries:
        shares = _shares(tiles, size + window)
    else:  # some programs beside each other; entries have few tiles, and of unequal work
        shares = min(max((1024 if entries else 256) // tiles, 1), 256)
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
    _sum_parts[(triton.cdiv(out.numel(), 1024),)](parts, out, out.numel(), parts[0].numel(), shares, C=1024)
    return out


def _shares(tiles: int, queries: int) -> int:
    """In how many programs the queries of a tile go, so that a GPU's multiprocessors (132) end together."""
    return min(range(1, 5), key=lambda shares: -(-tiles * shares // 132) * (-(-queries // shares) + 6))
