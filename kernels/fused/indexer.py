"""Triton kernels of the lightning indexer: scores, the exact choice of the best, and the gradients of its own loss.

A query's scores come from products of one shape, [keys, channels] times [channels, heads], whatever other queries share
the program, and are summed over heads in one reduction. They stand in memory for a bounded chunk of queries only.
The choice is exact: the k-th largest score is found bit by bit, ties at it go to the lowest numbers, and the chosen
numbers come out rising, so that attention's sums depend on the set alone.
Legend: T queries, H heads, D channels, K chosen entries of a query.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..places import Seen
from .attention import entry_row
from .attention_backward import PAIR_BYTES, sum_pairs
from .launch import LOG2E, check_dtypes, check_width, is_hopper, next_power, precision

KEYS = 128  # of a tile
HEADS = 128  # of a query, at most
WIDE = 8192  # heads times channels in fp32, at most: shared memory holds no more
SCORE_BYTES = 2**28  # of memory for a chunk of queries' scores
WIDEST = 2**15  # scores that one program chooses from at once


@triton.jit
def _of_tile(keys_ND, queries_HD, weights_H, PRECISION: tl.constexpr):
    """Products [keys, heads] before the ReLU, and their weighted sum [keys]."""
    products = tl.dot(keys_ND, tl.trans(queries_HD), input_precision=PRECISION)
    return products, tl.sum(tl.maximum(products, 0.0) * weights_H[None, :], 1)


@triton.jit
def _scores(
    q, weights, keys, out, position, entry_first, table, start, queries, heads, key_stride, total, width, ratio,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, SHARED: tl.constexpr, BF16: tl.constexpr, PAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [width] of `SHARED` queries in a row, by number; -inf where an entry is not complete. `total`: rows of
    keys, or numbers in the table of their pages."""
    first, low = tl.program_id(0) * SHARED, tl.program_id(1) * N
    h, d, n = tl.arange(0, H), tl.arange(0, D), low + tl.arange(0, N)
    before = -1
    keys_ND = tl.zeros([N, D], q.dtype.element_ty)
    for i in tl.static_range(SHARED):
        if first + i < queries:
            t = (start + first + i).to(tl.int64)
            count, entry = (tl.load(position + t) + 1) // ratio, tl.load(entry_first + t)
            result = tl.full([N], float("-inf"), tl.float32)
            if low < count:
                if entry != before:
                    place = entry + (n // PAGE if PAGE else n)
                    row = entry_row(table, entry, n, place < total, PAGE)
                    at = row.to(tl.int64)[:, None] * key_stride + d[None, :]
                    # Whatever stands there: which of it the query sees, `result` says.
                    keys_ND = tl.load(keys + at, mask=(place < total)[:, None], other=0.0)
                    before = entry
                own = (t * heads + h)[:, None] * D + d[None, :]
                queries_HD = tl.load(q + own, mask=(h < heads)[:, None], other=0.0)
                weights_H = tl.load(weights + t * heads + h, mask=h < heads, other=0.0)
                _, sums = _of_tile(keys_ND, queries_HD, weights_H, PRECISION)
                if BF16:
                    sums = sums.to(tl.bfloat16).to(tl.float32)
                result = tl.where(n < count, sums + 0.0, result)
            tl.store(out + (first + i).to(tl.int64) * width + n, result, mask=n < width)


@triton.jit
def _places(flags_RC):
    """Of numbers 0 and 1 in [rows, columns], read row by row, how many ones there are up to each."""
    of_row = tl.sum(flags_RC, 1)
    return (tl.cumsum(of_row, 0) - of_row)[:, None] + tl.cumsum(flags_RC, 1)


@triton.jit
def _choose_row(scores, numbers, out, first, count, width, topk, E: tl.constexpr, MAPPED: tl.constexpr):
    """To `out` the `topk` highest of the up to E scores, more than `topk`, from `first` on and before `count`, as
    numbers that rise."""
    # In rows of 16, whose sums need no other threads than four neighbours.
    e = first + tl.arange(0, E // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    # Whole vectors are read, as far as the row goes; what is behind `count` is nobody's.
    there = (e < (count + 15) // 16 * 16) & (e < width)
    bits = tl.load(scores + e, mask=there, other=0.0).to(tl.int32, bitcast=True)
    # As unsigned numbers in the order of the scores; 0 is none of them.
    order = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
    order = tl.where(e < count, order, 0)
    border, one = tl.full([], 0, tl.uint32), tl.full([], 2147483648, tl.uint32)
    bit, found = 0, count - first
    while (bit < 32) & (found > topk):  # until the border has all its bits, or parts the best from the rest
        higher = border | (one >> bit)
        reached = tl.sum((order >= higher).to(tl.int32))
        if reached >= topk:
            border, found = higher, reached
        bit += 1
    chosen = (e < count) & (order >= border)
    if found > topk:  # some at the border have no room
        level = (e < count) & (order == border)
        room = topk - tl.sum(tl.sum((order > border).to(tl.int32), 1), 0)
        chosen = chosen & ((order > border) | (_places(level.to(tl.int32)) <= room))
    # A row's answers: how many, and which. Their scan has the layout of what stores, unlike sums of rows: whole tensors
    # of places would go through shared memory.
    rows = tl.sum(chosen.to(tl.uint32) * (65536 + (1 << tl.arange(0, 16)))[None, :].to(tl.uint32), 1)
    rows = tl.associative_scan(rows, 0, _up_to)
    place, row = (rows >> 16).to(tl.int32), first + tl.arange(0, E // 16) * 16
    for i in tl.static_range(15, -1, -1):
        taken = ((rows >> i) & 1).to(tl.int32)
        place -= taken
        number = row + i
        if MAPPED:
            number = tl.load(numbers + number, mask=taken > 0, other=0)
        tl.store(out + place, number, mask=taken > 0)


@triton.jit
def _up_to(before, row):
    """The answers of a row, after those that are before it: all of them are counted in the upper 16 bits."""
    return (before >> 16 << 16) + row


@triton.jit
def _choose(
    scores, numbers, out, position, ratio, width, topk, E: tl.constexpr, K: tl.constexpr, MAPPED: tl.constexpr
):  # fmt: skip
    """Of each part of `E` of the scores that a row has at its position the `topk` highest, and -1 behind them; rows are
    `width` apart."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = part * E
    count = tl.minimum((tl.load(position + row) + 1) // ratio, first + E)
    scores += row * width
    numbers += row * width
    out += (row * tl.num_programs(1) + part) * topk
    if count - first <= topk:  # all of them, whatever they score
        n = tl.arange(0, K)
        there, number = n < count - first, first + n
        if MAPPED:
            number = tl.load(numbers + number, mask=there, other=0)
        tl.store(out + n, tl.where(there, number, -1), mask=n < topk)
        return
    # Rows of one document are half of the longest on average: the fewer the scores, the fewer are compared.
    if E >= 2048:
        if count <= first + E // 4:
            _choose_row(scores, numbers, out, first, count, width, topk, E // 4, MAPPED)
        elif count <= first + E // 2:
            _choose_row(scores, numbers, out, first, count, width, topk, E // 2, MAPPED)
        else:
            _choose_row(scores, numbers, out, first, count, width, topk, E, MAPPED)
    else:
        _choose_row(scores, numbers, out, first, count, width, topk, E, MAPPED)


@triton.jit
def _gathered(
    q, weights, keys, chosen, out, position, entry_first, heads, key_stride, ratio, topk,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [K] of a query's chosen entries, with the bits of `_scores`; -inf behind them."""
    t, low = tl.program_id(0).to(tl.int64), tl.program_id(1) * N
    h, d, n = tl.arange(0, H), tl.arange(0, D), low + tl.arange(0, N)
    real = n < (tl.load(position + t) + 1) // ratio
    number = tl.load(chosen + t * topk + n, mask=real & (n < topk), other=0)
    at = (tl.load(entry_first + t) + number).to(tl.int64)
    keys_ND = tl.load(keys + at[:, None] * key_stride + d[None, :], mask=real[:, None], other=0.0)
    own = (t * heads + h)[:, None] * D + d[None, :]
    queries_HD = tl.load(q + own, mask=(h < heads)[:, None], other=0.0)
    weights_H = tl.load(weights + t * heads + h, mask=h < heads, other=0.0)
    _, sums = _of_tile(keys_ND, queries_HD, weights_H, PRECISION)
    tl.store(out + t * topk + n, tl.where(real, sums + 0.0, float("-inf")), mask=n < topk)


@triton.jit
def _gathered_backward(
    q, weights, keys, chosen, grad, grad_q, grad_weights, pairs, position, entry_first, heads, key_stride, ratio, topk,
    start,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a query and its weights; of its chosen keys to `pairs`, [K up to a multiple of N, D] a query."""
    t = start + tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, H), tl.arange(0, D)
    count, first = tl.minimum((tl.load(position + t) + 1) // ratio, topk), tl.load(entry_first + t)
    own = (t * heads + h)[:, None] * D + d[None, :]
    queries_HD = tl.load(q + own, mask=(h < heads)[:, None], other=0.0)
    weights_H = tl.load(weights + t * heads + h, mask=h < heads, other=0.0)
    of_q, of_weights = tl.zeros([H, D], tl.float32), tl.zeros([H], tl.float32)
    for low in range(0, count, N):
        n = low + tl.arange(0, N)
        real = n < count
        at = (first + tl.load(chosen + t * topk + n, mask=real, other=0)).to(tl.int64)
        keys_ND = tl.load(keys + at[:, None] * key_stride + d[None, :], mask=real[:, None], other=0.0)
        grad_N = tl.load(grad + t * topk + n, mask=real, other=0.0)
        products, _ = _of_tile(keys_ND, queries_HD, weights_H, PRECISION)
        of_weights += tl.sum(tl.maximum(products, 0.0) * grad_N[:, None], 0)
        slope = tl.where(products > 0.0, grad_N[:, None] * weights_H[None, :], 0.0).to(keys_ND.dtype)
        of_q = tl.dot(tl.trans(slope), keys_ND, of_q, input_precision=PRECISION)
        of_keys = tl.dot(slope, queries_HD, input_precision=PRECISION)
        to = tl.program_id(0).to(tl.int64) * (tl.cdiv(topk, N) * N) + n
        tl.store(pairs + to[:, None] * D + d[None, :], of_keys, mask=real[:, None])
    tl.store(grad_q + own, of_q, mask=(h < heads)[:, None])
    tl.store(grad_weights + t * heads + h, of_weights, mask=h < heads)


@triton.jit
def _mass(
    q, entries, chosen, lse, out, position, entry_first, scale, heads, entry_stride, ratio, topk,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention's probabilities of a query's chosen entries, summed over heads: [K]."""
    t, low = tl.program_id(0).to(tl.int64), tl.program_id(1) * N
    d, n = tl.arange(0, D), low + tl.arange(0, N)
    real = (n < (tl.load(position + t) + 1) // ratio) & (n < topk)
    number = tl.load(chosen + t * topk + n, mask=real, other=0)
    at = (tl.load(entry_first + t) + number).to(tl.int64)
    keys_ND = tl.load(entries + at[:, None] * entry_stride + d[None, :], mask=real[:, None], other=0.0)
    sums = tl.zeros([N], tl.float32)
    for block in range(0, heads, H):
        h = block + tl.arange(0, H)
        own = (t * heads + h)[:, None] * D + d[None, :]
        queries_HD = tl.load(q + own, mask=(h < heads)[:, None], other=0.0)
        lse_H = tl.load(lse + t * heads + h, mask=h < heads, other=float("inf"))
        products = tl.dot(keys_ND, tl.trans(queries_HD), input_precision=PRECISION) * scale
        sums += tl.sum(tl.exp2(products - lse_H[None, :]), 1)
    tl.store(out + t * topk + n, tl.where(real, sums, 0.0), mask=n < topk)


def check(q: Tensor, keys: Tensor) -> tuple[int, str]:
    """The heads of a tile, and how products are made; ValueError, by name, for what the kernels do not take."""
    check_width("index_head_dim", q.shape[2], most=128)
    if q.shape[1] > HEADS:
        raise ValueError(f"index_n_heads: {q.shape[1]}; the Triton kernels take up to {HEADS}")
    if q.dtype == torch.float32 and q.shape[1] * q.shape[2] > WIDE:
        raise ValueError(f"index_n_heads * index_head_dim: {q.shape[1:].numel()}; in float32 they take up to {WIDE}")
    return max(next_power(q.shape[1]), 16), precision(check_dtypes(queries=q, keys=keys))


def _check_pack(seen: Seen) -> None:
    if seen.page:
        raise ValueError("what trains the indexer is of packs: entries in pages have none")


def on_hopper(q: Tensor) -> bool:
    """Whether the scores' kernel for Hopper takes queries [T, H, D]."""
    return is_hopper(q.device) and q.dtype == torch.bfloat16 and q.shape[1:] == (64, 128)


@torch.no_grad()
def select(q: Tensor, weights: Tensor, keys: Tensor, seen: Seen, topk: int, dtype: torch.dtype | None = None) -> Tensor:
    """int32 [T, K]: each query's K entries with the highest scores, rising; -1 behind those there are.

    q [T, H, D] and keys [N, D], bf16 or fp32; weights fp32 [T, H]; `dtype` bf16 rounds the scores.
    """
    heads, how = check(q, keys)
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: {dtype}; the Triton kernels round scores to bfloat16 or not at all")
    assert seen.entry_first is not None
    queries, width = q.shape[0], triton.cdiv(max(seen.most, 1), 16) * 16  # rows of whole vectors
    chosen = q.new_empty(queries, topk, dtype=torch.int32)
    chunk = max(SCORE_BYTES // (4 * width), 1)
    shared = 4 if seen.slots == 0 else 1
    for start in range(0, queries, chunk):
        some = min(chunk, queries - start)
        part = slice(start, start + some)
        scores = q.new_empty(some, width, dtype=torch.float32)
        if on_hopper(q):
            from .hopper_indexer import scores as fill

            given = q[part].contiguous(), weights[part].contiguous(), keys.contiguous(), scores
            # What is chosen whatever it scores needs no scores, unless the best of parts are compared.
            fill(*given, seen.of(part), topk if width <= WIDEST else 0, dtype == torch.bfloat16)
        else:
            _scores[(triton.cdiv(some, shared), triton.cdiv(width, KEYS))](
                q.contiguous(), weights.contiguous(), keys, scores, seen.position, seen.entry_first, seen.table, start,
                some, q.shape[1], keys.stride(0), len(keys if seen.table is None else seen.table), width, seen.ratio,
                H=heads, D=q.shape[2], N=KEYS, SHARED=shared, BF16=dtype == torch.bfloat16, PAGE=seen.page,
                PRECISION=how, num_warps=8,
            )  # fmt: skip
        _best(scores, seen.position[part], seen.ratio, topk, chosen[part])
    return chosen


def _choosing(size: int, topk: int) -> dict[str, int]:
    """How a program goes about up to `size` scores: 32 in a thread's registers, and programs enough beside it."""
    warps = max(min(size // 1024, 32), 1)
    return {"E": size, "K": next_power(topk), "num_warps": warps, "maxnreg": 64 if warps > 8 else 96}


def _best(scores: Tensor, position: Tensor, ratio: int, topk: int, chosen: Tensor) -> None:
    """Into `chosen` [R, K] the numbers of each row's highest scores [R, E], as far as they are complete at its
    position [R], and -1 behind."""
    rows, width = scores.shape
    size = min(max(next_power(width), 128), WIDEST)
    parts = triton.cdiv(width, size)
    how = _choosing(size, topk)
    if parts == 1:
        _choose[(rows, 1)](scores, scores, chosen, position, ratio, width, topk, **how, MAPPED=False)
        return
    # Each part's best first, and of those the best: rising in numbers, so that ties still go to the lowest.
    some = scores.new_empty(rows, parts * topk, dtype=torch.int32)
    _choose[(rows, parts)](scores, scores, some, position, ratio, width, topk, **how, MAPPED=False)
    candidates = scores.gather(1, some.clamp(min=0).long()).masked_fill(some < 0, float("-inf"))
    last = torch.full_like(position, parts * topk - 1)
    size = next_power(parts * topk)
    if size > WIDEST:
        raise ValueError(f"{width} entries of a query: the Triton kernels choose among up to {WIDEST // topk * WIDEST}")
    _choose[(rows, 1)](candidates, some, chosen, last, 1, parts * topk, topk, **_choosing(size, topk), MAPPED=True)


class IndexScores(torch.autograd.Function):
    """Scores fp32 [T, K] of the entries that `chosen` int32 [T, K] names, -inf behind them; gradients in order."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, weights: Tensor, keys: Tensor, chosen: Tensor, seen: Seen) -> Tensor:
        heads, how = check(q, keys)
        _check_pack(seen)
        q, weights, chosen = q.contiguous(), weights.contiguous(), chosen.contiguous()
        ctx.save_for_backward(q, weights, keys, chosen)
        ctx.seen = seen
        queries, topk = chosen.shape
        out = q.new_empty(queries, topk, dtype=torch.float32)
        _gathered[(queries, triton.cdiv(topk, KEYS))](
            q, weights, keys, chosen, out, seen.position, seen.entry_first, q.shape[1], keys.stride(0),
            seen.ratio, topk, H=heads, D=q.shape[2], N=KEYS, PRECISION=how, num_warps=8,
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, weights, keys, chosen = ctx.saved_tensors
        seen: Seen = ctx.seen
        heads, how = check(q, keys)
        queries, topk = chosen.shape
        # Whole tiles take more registers, and in fp32 more shared memory, than there are.
        size = KEYS // (2 if q.dtype == torch.bfloat16 else 4)
        padded = triton.cdiv(topk, size) * size
        of_q, of_weights = torch.empty_like(q), torch.empty_like(weights)
        total = torch.zeros_like(keys, dtype=torch.float32)
        chunk = max(PAIR_BYTES // (padded * q.shape[2] * q.element_size()), 1)
        pairs = q.new_empty(min(chunk, queries) * padded, q.shape[2])
        for start in range(0, queries, chunk):
            some = min(chunk, queries - start)
            _gathered_backward[(some,)](
                q, weights, keys, chosen, grads[0].contiguous(), of_q, of_weights, pairs, seen.position,
                seen.entry_first, q.shape[1], keys.stride(0), seen.ratio, topk, start,
                H=heads, D=q.shape[2], N=size, PRECISION=how, num_warps=8,
            )  # fmt: skip
            part = slice(start, start + some)
            sum_pairs(pairs, total, seen.of(part), chosen[part], 1, padded)
        return of_q, of_weights, total.to(keys.dtype), None, None


@torch.no_grad()
def mass(q: Tensor, entries: Tensor, lse: Tensor, seen: Seen, chosen: Tensor) -> Tensor:
    """fp32 [T, K]: attention's probabilities of the chosen entries, summed over heads; `lse` is what `attend` gave."""
    _check_pack(seen)
    queries, topk = chosen.shape
    width = q.shape[2]
    how = precision(check_dtypes(queries=q, entries=entries))
    size = 64 if q.dtype == torch.bfloat16 or width < 256 else 32
    out = q.new_empty(queries, topk, dtype=torch.float32)
    _mass[(queries, triton.cdiv(topk, size))](
        q.contiguous(), entries, chosen.contiguous(), lse, out, seen.position, seen.entry_first, width**-0.5 * LOG2E,
        q.shape[1], entries.stride(0), seen.ratio, topk,
        H=64 if q.dtype == torch.bfloat16 and q.shape[1] >= 64 else 16, D=width, N=size, PRECISION=how,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return out
