"""Triton kernels of hyper-connections, forward: a sublayer's output into the streams, and the next sublayer's input.

A site is what lies between two sublayers; one launch does it, in tiles of ROWS tokens and CHANNELS channels of each of
the n streams. A tile is first expanded: its new streams, their products with `fn` and with one another. The program
that finds itself the last of a group of tokens sums those up and mixes: gates and Sinkhorn-Knopp. Then tiles of the
group are collapsed and normed; what they read of the new streams is still in the L2 cache.

Programs take their tiles from a counter, so that whatever a program waits for was taken by one that runs already.

The collapse's norm is a quadratic form of the streams' products with one another: no sum over its result is needed.
The number of tokens is not told to the compiler, which would lay out sums in another way where it divides by 16.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import SAME_BITS, check_dtypes, next_power, precision
from .launch import STEP as LEAST
from .sinkhorn import normalized, softmax

GROUP = 64  # tokens that are mixed at once
ROWS, CHANNELS = 32, 256  # of a tile; its channels of each stream
STEP = 64  # of them, at a time
REGISTERS = 128  # of a thread: two programs of eight warps on a multiprocessor
LAG = 640  # tiles taken before the first is collapsed: those that run at once and a few, to fit into the L2 cache
STREAMS = 1, 2, 4  # for which there are kernels


@triton.constexpr_function
def pair(j: int, k: int, n: int) -> int:
    """Where the product of streams j and k is among those of 0 and 0, 0 and 1, ..., 1 and 1, ..."""
    j, k = min(j, k), max(j, k)
    return j * n - j * (j + 1) // 2 + k


@triton.jit
def columns(table, t, real, tokens, COUNT: tl.constexpr, OTHER: tl.constexpr = 0.0):
    """The rows of a table [COUNT, T] at tokens t, as a tuple; OTHER where there is no token."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.load(table + i * tokens + t, mask=real, other=OTHER),)
    return found


@triton.jit
def tiles(streams, at_TC, real_TC, D: tl.constexpr, N: tl.constexpr, POLICY: tl.constexpr):
    """Tiles of the streams [T, N, D], as a tuple: at_TC are the places in the first, t N D + c."""
    found = ()
    for j in tl.static_range(N):
        found = found + (tl.load(streams + at_TC + j * D, mask=real_TC, other=0.0, eviction_policy=POLICY),)
    return found


@triton.jit
def expanded(streams, output_TC, posts, combs, N: tl.constexpr):
    """The streams after a sublayer's output, rounded to their dtype: the same bits wherever they are computed again."""
    new = ()
    for k in tl.static_range(N):
        sums = posts[k][:, None] * output_TC
        for j in tl.static_range(N):
            sums = tl.fma(combs[j * N + k][:, None], streams[j].to(tl.float32), sums)
        new = new + (sums.to(streams[0].dtype),)
    return new


@triton.jit
def _side_by_side(x, N: tl.constexpr):
    """A tuple of N tiles [T, C] as one [T, N C]."""
    T: tl.constexpr = x[0].shape[0]
    C: tl.constexpr = x[0].shape[1]
    if N == 1:
        return x[0]
    elif N == 2:
        return tl.reshape(tl.permute(tl.join(x[0], x[1]), (0, 2, 1)), [T, 2 * C])
    else:
        pairs = tl.join(tl.join(x[0], x[1]), tl.join(x[2], x[3]))
        return tl.reshape(tl.permute(pairs, (0, 3, 2, 1)), [T, 4 * C])


@triton.jit
def _halves(x_TC):
    return tl.split(tl.reshape(x_TC, [x_TC.shape[0], x_TC.shape[1] // 2, 2]))


@triton.jit
def _eighths(x_TC):
    """Eight tiles [T, C / 8], of every eighth channel."""
    a, b = _halves(x_TC)
    quarters = _halves(a) + _halves(b)
    return _halves(quarters[0]) + _halves(quarters[1]) + _halves(quarters[2]) + _halves(quarters[3])


@triton.jit
def dots(sums, left, right):
    """sums [T, C / 8] of the products of two tiles' eighths."""
    for i in tl.static_range(8):
        sums = tl.fma(left[i], right[i], sums)
    return sums


@triton.jit(do_not_specialize=["marks"])
def _prepare(fn, halves, counts, size, marks, BLOCK: tl.constexpr, SPLIT: tl.constexpr):
    """The bf16 nearest to each number of fn, then those nearest to what that leaves: up to 2^-18 is lost; zeros."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(counts + at, 0, mask=at < marks)
    if SPLIT:
        w = tl.load(fn + at, mask=at < size, other=0.0)
        high = w.to(tl.bfloat16)
        tl.store(halves + at, high, mask=at < size)
        tl.store(halves + size + at, (w - high.to(tl.float32)).to(tl.bfloat16), mask=at < size)


@triton.jit
def _expand(
    streams, output, post, comb, fn, new, parts, start, slice, tokens,
    D: tl.constexpr, N: tl.constexpr, LOGITS: tl.constexpr, OUT: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, CHANNELS: tl.constexpr, PENDING: tl.constexpr, PRECISION: tl.constexpr, HALVED: tl.constexpr,
):  # fmt: skip
    """A tile of new streams, if there is an output to add; of parts [LOGITS + pairs, GROUP], its tokens' columns."""
    t = start.to(tl.int64) + tl.arange(0, ROWS)
    real = t < tokens
    # In bf16 the logits' rows come twice, for the two numbers that stand for one of fn, as `_prepare` makes them.
    PARTS: tl.constexpr = 2 if streams.dtype.element_ty == tl.bfloat16 else 1
    p = tl.arange(0, PARTS * OUT)
    of_fn, real_P = p % OUT * (N * D), p % OUT < LOGITS
    if HALVED:
        of_fn += p // OUT * (LOGITS * N * D)
    if PENDING:
        posts, combs = columns(post, t, real, tokens, N), columns(comb, t, real, tokens, N * N)
    logits_PT = tl.zeros([PARTS * OUT, ROWS], tl.float32)
    pairs = ()
    for _ in tl.static_range(N * (N + 1) // 2):
        pairs = pairs + (tl.zeros([ROWS, STEP // 8], tl.float32),)
    first = slice * CHANNELS
    for d in tl.range(first, tl.minimum(first + CHANNELS, D), STEP):
        c = d + tl.arange(0, STEP)
        at_TC = (t * (N * D))[:, None] + c[None, :]
        x = tiles(streams, at_TC, real[:, None], D, N, "evict_first" if PENDING else "")
        if PENDING:
            output_TC = tl.load(
                output + t[:, None] * D + c[None, :], mask=real[:, None], other=0.0, eviction_policy="evict_first"
            )
            x = expanded(x, output_TC.to(tl.float32), posts, combs, N)
        eighths = ()
        for k in tl.static_range(N):
            if PENDING:
                tl.store(new + at_TC + k * D, x[k], mask=real[:, None])
            eighths = eighths + (_eighths(x[k].to(tl.float32)),)
        f = tl.arange(0, N * STEP)
        w_PF = tl.load(fn + of_fn[:, None] + (f // STEP * D + d + f % STEP)[None, :], mask=real_P[:, None], other=0.0)
        if PARTS == 2 and not HALVED:
            high_PF = w_PF.to(tl.bfloat16)
            w_PF = tl.where((p < OUT)[:, None], high_PF, (w_PF - high_PF.to(tl.float32)).to(tl.bfloat16))
        logits_PT = tl.dot(w_PF, tl.trans(_side_by_side(x, N)), logits_PT, input_precision=PRECISION)
        sums = ()
        for j in tl.static_range(N):
            for k in tl.static_range(j, N):
                sums = sums + (dots(pairs[pair(j, k, N)], eighths[j], eighths[k]),)
        pairs = sums
    o, r = tl.arange(0, OUT), tl.arange(0, ROWS)
    logits_OT = tl.sum(tl.reshape(logits_PT, [PARTS, OUT, ROWS]), 0)
    parts += start % GROUP
    tl.store(parts + o[:, None] * GROUP + r[None, :], logits_OT, mask=(o < LOGITS)[:, None])
    for i in tl.static_range(N * (N + 1) // 2):
        tl.store(parts + (LOGITS + i) * GROUP + r, tl.sum(pairs[i], 1))


@triton.jit
def _mix(
    parts, base, scale, totals, pre, factor, post, comb, count, group, tokens, norm_eps, eps,
    D: tl.constexpr, N: tl.constexpr, LOGITS: tl.constexpr, SUMS: tl.constexpr, SLICES: tl.constexpr,
    ITERATIONS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The parts' totals [LOGITS + pairs, T]; a collapse's gates and norm, then a sublayer's post and comb."""
    OUTS: tl.constexpr = LOGITS + N * (N + 1) // 2
    o, r = tl.arange(0, SUMS)[:, None], tl.arange(0, GROUP)
    t = group.to(tl.int64) * GROUP + r
    real = t < tokens
    real_OT = (o < OUTS) & real[None, :]
    sums_OT = tl.zeros([SUMS, GROUP], tl.float32)
    for s in tl.range(0, SLICES, loop_unroll_factor=4):
        sums_OT += tl.load(parts + (s * OUTS + o) * GROUP + r[None, :], mask=real_OT, other=0.0)
    tl.store(totals + o * tokens + t[None, :], sums_OT, mask=real_OT)
    tl.debug_barrier()
    found = columns(totals, t, real, tokens, OUTS)
    squares = tl.zeros([GROUP], tl.float32)
    for j in tl.static_range(N):
        squares += found[LOGITS + pair(j, j, N)]
    rms = tl.rsqrt(squares / (N * D) + norm_eps)
    gates = ()
    for j in tl.static_range(N):
        gates = gates + (tl.sigmoid(tl.fma(found[j] * rms, tl.load(scale), tl.load(base + j))) + eps,)
        tl.store(pre + j * tokens + t, gates[j], mask=real)
    squares = tl.zeros([GROUP], tl.float32)
    for j in tl.static_range(N):
        for k in tl.static_range(j, N):
            product = gates[j] * gates[k] * found[LOGITS + pair(j, k, N)]
            squares += product if j == k else 2 * product
    tl.store(factor + t, tl.rsqrt(tl.maximum(squares, 0.0) / D + norm_eps), mask=real)
    tl.debug_barrier()
    tl.atomic_add(count, 1, sem="release")  # the group may be collapsed
    if LOGITS > N:
        for k in tl.static_range(N):
            gate = tl.sigmoid(tl.fma(found[N + k] * rms, tl.load(scale + 1), tl.load(base + N + k)))
            tl.store(post + k * tokens + t, 2 * gate, mask=real)
        logits, gate_scale = (), tl.load(scale + 2)
        for i in tl.static_range(N * N):
            logits = logits + (tl.fma(found[2 * N + i] * rms, gate_scale, tl.load(base + 2 * N + i)),)
        m, _ = normalized(softmax(logits, eps, N), eps, 0, N)
        for _ in tl.range(1, ITERATIONS):
            rows, _ = normalized(m, eps, 1, N)
            m, _ = normalized(rows, eps, 0, N)
        for i in tl.static_range(N * N):
            tl.store(comb + i * tokens + t, m[i], mask=real)


@triton.jit
def _collapse(
    streams, pre, factor, weight, x, start, slice, tokens,
    D: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    t, c = start.to(tl.int64) + tl.arange(0, ROWS), slice * CHANNELS + tl.arange(0, CHANNELS)
    real = t < tokens
    real_TC = real[:, None] & (c < D)[None, :]
    rows = tiles(streams, (t * (N * D))[:, None] + c[None, :], real_TC, D, N, "evict_first")
    gates, norm = columns(pre, t, real, tokens, N), tl.load(factor + t, mask=real, other=0.0)
    weight_C = tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
    sums_TC = tl.zeros([ROWS, CHANNELS], tl.float32)
    for j in tl.static_range(N):
        sums_TC = tl.fma((gates[j] * norm)[:, None], rows[j].to(tl.float32), sums_TC)
    tl.store(x + t[:, None] * D + c[None, :], sums_TC * weight_C, mask=real_TC)


@triton.jit(do_not_specialize=["tokens", "lag"])
def _site(
    streams, output, post_in, comb_in, fn, base, scale, weight, new, parts, totals, pre, factor, post, comb, x, counts,
    tokens, lag, norm_eps, eps,
    D: tl.constexpr, N: tl.constexpr, LOGITS: tl.constexpr, OUT: tl.constexpr, SUMS: tl.constexpr,
    SLICES: tl.constexpr, ITERATIONS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    CHANNELS: tl.constexpr, PENDING: tl.constexpr, PRECISION: tl.constexpr, HALVED: tl.constexpr,
):  # fmt: skip
    """In turn g each tile of group g is expanded and one of group g - lag is collapsed."""
    OUTS: tl.constexpr = LOGITS + N * (N + 1) // 2
    TILES: tl.constexpr = GROUP // ROWS * SLICES
    taken = tl.atomic_add(counts, 1, sem="relaxed")
    group, slice = taken // (2 * TILES), taken // 2 % SLICES
    start = group * GROUP + taken // (2 * SLICES) % (GROUP // ROWS) * ROWS
    if taken % 2 == 0:
        if group * GROUP < tokens:
            count, parts = counts + 1 + group, parts + group.to(tl.int64) * (SLICES * OUTS * GROUP)
            if start < tokens:
                _expand(
                    streams, output, post_in, comb_in, fn, new, parts + slice * (OUTS * GROUP), start, slice, tokens,
                    D, N, LOGITS, OUT, GROUP, ROWS, STEP, CHANNELS, PENDING, PRECISION, HALVED,
                )  # fmt: skip
            tl.debug_barrier()
            if tl.atomic_add(count, 1, sem="acq_rel") == TILES - 1:
                _mix(
                    parts, base, scale, totals, pre, factor, post, comb, count, group, tokens, norm_eps, eps,
                    D, N, LOGITS, SUMS, SLICES, ITERATIONS, GROUP,
                )  # fmt: skip
    else:
        start -= lag * GROUP
        if (start >= 0) & (start < tokens):
            count = counts + 1 + group - lag
            seen = tl.atomic_add(count, 0, sem="acquire")
            while seen <= TILES:
                seen = tl.atomic_add(count, 0, sem="acquire")
            _collapse(new, pre, factor, weight, x, start, slice, tokens, D, N, ROWS, CHANNELS)


class Sizes(NamedTuple):
    """Of a site's kernels: what follows from n, d and the number of logits alone."""

    D: int
    N: int
    LOGITS: int

    @property
    def out(self) -> int:
        """Rows of a tile of logits; twice as many is the least that warpgroups multiply."""
        return max(next_power(self.LOGITS), 32)

    @property
    def outs(self) -> int:
        """Of a token's sums: the logits, and the streams' products with one another."""
        return self.LOGITS + self.N * (self.N + 1) // 2

    @property
    def slices(self) -> int:
        return math.ceil(self.D / CHANNELS)


class Result(NamedTuple):
    new: Tensor  # the streams [T, n, d]
    x: Tensor  # [T, d]
    totals: Tensor  # [logits + n (n + 1) / 2, T]: fn times the streams; streams' products, of 0 and 0, 0 and 1, ...
    pre: Tensor  # [n, T]
    factor: Tensor  # [T], of the norm of what the streams collapse to
    post: Tensor  # [n, T]
    comb: Tensor  # [n, n, T]
    counts: Tensor  # [1 + 2 groups]: tiles taken; of each group, those that are done, and in the backward


Update = tuple[Tensor, Tensor, Tensor]  # an output [T, d], its post [n, T] and comb [n, n, T]


def site_forward(
    streams: Tensor, update: Update | None, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor,
    iterations: int, norm_eps: float, eps: float, counts: Tensor | None = None,
) -> Result:  # fmt: skip
    """`kernels.hyper.enter` and, for fn of n rows, `leave`; what is no result then means nothing.

    With `counts`, zeros of `count_size(T)`, one launch does it, which splits fn again and again: for few tokens."""
    tokens, n, d = streams.shape
    sizes = check(streams, update, fn)
    new = streams if update is None else torch.empty_like(streams)
    groups, tiles = triton.cdiv(tokens, GROUP), sizes.slices * (GROUP // ROWS)
    totals, pre = fn.new_empty(sizes.outs, tokens), fn.new_empty(n, tokens)
    made = (fn.new_empty(n, tokens), fn.new_empty(n, n, tokens)) if n < sizes.LOGITS else (pre, pre)
    prepared = counts is not None
    counts = fn.new_empty(count_size(tokens), dtype=torch.int32) if counts is None else counts
    result = Result(new, streams.new_empty(tokens, d), totals, pre, fn.new_empty(tokens), *made, counts)
    if tokens:
        split = streams.dtype == torch.bfloat16
        halves = fn.new_empty(2, *fn.shape, dtype=torch.bfloat16) if split and not prepared else fn
        if not prepared:
            _prepare[(triton.cdiv(max(fn.numel(), counts.numel()), 1024),)](
                fn, halves, counts, fn.numel(), counts.numel(), BLOCK=1024, SPLIT=split, num_warps=4
            )
        parts, lag = fn.new_empty(groups, sizes.slices, sizes.outs, GROUP), min(groups, triton.cdiv(LAG, 2 * tiles))
        _site[((groups + lag) * tiles * 2,)](
            streams, *(update or (fn, fn, fn)), halves, base, scale, weight, new, parts, *result[2:7], result.x, counts,
            tokens, lag, norm_eps, eps, *sizes, OUT=sizes.out, SUMS=next_power(sizes.outs), SLICES=sizes.slices,
            ITERATIONS=iterations, GROUP=GROUP, ROWS=ROWS, STEP=math.gcd(d, STEP), CHANNELS=CHANNELS,
            PENDING=update is not None, PRECISION=precision(streams.dtype), HALVED=split and not prepared,
            num_warps=8, num_stages=1, maxnreg=None if prepared else REGISTERS, **SAME_BITS,
        )  # fmt: skip
    return result


def count_size(tokens: int) -> int:
    """Of `Result.counts`."""
    return 1 + 2 * -(-tokens // GROUP)


def check(streams: Tensor, update: Update | None, fn: Tensor) -> Sizes:
    """ValueError, by name, for what the kernels do not take."""
    check_dtypes(streams=streams, output=streams if update is None else update[0])
    _, n, d = streams.shape
    if n not in STREAMS:
        raise ValueError(f"streams: {n}; the Triton kernels take {STREAMS}")
    if d % LEAST:
        raise ValueError(f"channels: {d}; the Triton kernels take multiples of {LEAST}")
    return Sizes(d, n, fn.shape[0])


class Site(torch.autograd.Function):
    """streams with `output` (None: as they are), x, post, comb: new ones, or None where there are none."""

    @staticmethod
    def forward(
        ctx: Any, streams: Tensor, output: Tensor | None, post: Tensor | None, comb: Tensor | None, fn: Tensor,
        base: Tensor, scale: Tensor, weight: Tensor, iterations: int, norm_eps: float, eps: float,
        counts: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        streams, fn = streams.contiguous(), fn.contiguous()
        update = None
        if output is not None and post is not None and comb is not None:
            update = output.contiguous(), post.contiguous(), comb.contiguous()
        result = site_forward(streams, update, fn, base, scale, weight, iterations, norm_eps, eps, counts)
        kept = result.new, result.totals, result.pre, result.factor, result.counts
        ctx.save_for_backward(streams, *(update or [None] * 3), fn, base, scale, weight, *kept)
        ctx.settings = iterations, norm_eps, eps
        new = None if update is None else result.new
        if fn.shape[0] == streams.shape[1]:
            return new, result.x, None, None
        return new, result.x, result.post, result.comb

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from .hyper_backward import site_backward

        streams, output, post, comb, *others = ctx.saved_tensors
        update = None if output is None else (output, post, comb)
        return (*site_backward(streams, update, *others, *grads, *ctx.settings), None, None, None, None)
