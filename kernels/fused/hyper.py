"""Triton kernels of hyper-connections, forward: a sublayer's output into the streams, and the next sublayer's input.

A site is what lies between two sublayers. Two kernels pass over a token's n streams: the first expands the output into
them and, while it holds a tile, sums up its products with `fn` and its squares; the second collapses them to the next
sublayer's input, with its norm. In bf16 at n = 4 that is 14 d numbers a token, and 10 d would be the least: the second
pass needs the whole first one's sums. Programs of the second kernel that come first mix: gates and Sinkhorn-Knopp.

A token's sums over its n d channels are made in parts of CHANNELS of each stream, stored, and added in order. The
number of tokens is not told to the compiler, which would lay out sums in another way where it divides by 16.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import SAME_BITS, check_dtypes, next_power, precision
from .launch import STEP as LEAST

CHANNELS = 256  # of each stream, summed up by one program
ROWS, STEP = 32, 32  # tokens and channels of a tile, small enough for two programs on a multiprocessor
MIXED = 32  # tokens whose gates one program finds
TILE = 4096  # channels of one stream that a program collapses
STREAMS = 1, 2, 4  # for which there are kernels


@triton.jit
def columns(table, t, real, COUNT: tl.constexpr):
    """The columns of a table [T, COUNT] at tokens t, as a tuple."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.load(table + t * COUNT + i, mask=real, other=0.0),)
    return found


@triton.jit
def tiles(streams, at_TC, real_TC, D: tl.constexpr, N: tl.constexpr):
    """Tiles of the streams [T, N, D], as a tuple: at_TC are the places in the first, t N D + c."""
    found = ()
    for j in tl.static_range(N):
        found = found + (tl.load(streams + at_TC + j * D, mask=real_TC, other=0.0),)
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
def _two_numbers(w_OC):
    """[2 O, C]: the bf16 nearest to each number, then those nearest to what that leaves: up to 2^-18 is lost."""
    high = w_OC.to(tl.bfloat16)
    rest = (w_OC - high.to(tl.float32)).to(tl.bfloat16)
    return tl.reshape(tl.permute(tl.join(high, rest), (2, 0, 1)), [2 * w_OC.shape[0], w_OC.shape[1]])


@triton.jit(do_not_specialize=["tokens"])
def _expand(
    streams, output, post, comb, fn, new, parts, tokens,
    D: tl.constexpr, N: tl.constexpr, LOGITS: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    CHANNELS: tl.constexpr, PENDING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """New streams, if there is an output to add, and parts [slices, LOGITS + 1, T] of their logits and squares."""
    first, t = tl.program_id(0) * CHANNELS, tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # In bf16 the logits' rows come twice, for the two numbers that stand for one of fn.
    PARTS: tl.constexpr = 2 if streams.dtype.element_ty == tl.bfloat16 else 1
    real, o = t < tokens, tl.arange(0, OUT)
    if PENDING:
        posts, combs = columns(post, t, real, N), columns(comb, t, real, N * N)
    logits, squares_TC = (), tl.zeros([ROWS, STEP], tl.float32)
    for _ in tl.static_range(N):
        logits = logits + (tl.zeros([PARTS * OUT, ROWS], tl.float32),)
    for start in tl.range(first, tl.minimum(first + CHANNELS, D), STEP):
        c = start + tl.arange(0, STEP)
        at_TC = (t * (N * D))[:, None] + c[None, :]
        x = tiles(streams, at_TC, real[:, None], D, N)
        if PENDING:
            output_TC = tl.load(output + t[:, None] * D + c[None, :], mask=real[:, None], other=0.0).to(tl.float32)
            x = expanded(x, output_TC, posts, combs, N)
        sums = ()
        for k in tl.static_range(N):
            if PENDING:
                tl.store(new + at_TC + k * D, x[k], mask=real[:, None])
            wide = x[k].to(tl.float32)
            squares_TC = tl.fma(wide, wide, squares_TC)
            w_OC = tl.load(fn + (o * (N * D))[:, None] + c[None, :] + k * D, mask=(o < LOGITS)[:, None], other=0.0)
            w_PC = w_OC if PARTS == 1 else _two_numbers(w_OC)
            sums = sums + (tl.dot(w_PC, tl.trans(x[k]), logits[k], input_precision=PRECISION),)
        logits = sums
    row = parts + tl.program_id(0) * (LOGITS + 1) * tokens
    logits_PT = logits[0]
    for k in tl.static_range(1, N):
        logits_PT += logits[k]
    logits_OT = tl.sum(tl.reshape(logits_PT, [PARTS, OUT, ROWS]), 0)
    tl.store(row + o[:, None] * tokens + t[None, :], logits_OT, mask=(o < LOGITS)[:, None] & real[None, :])
    tl.store(row + LOGITS * tokens + t, tl.sum(squares_TC, 1), mask=real)


@triton.jit
def _total(parts, o, t, real, tokens, OUTS: tl.constexpr, SLICES: tl.constexpr):
    sums = tl.load(parts + o * tokens + t, mask=real, other=0.0)
    for s in tl.static_range(1, SLICES):
        sums += tl.load(parts + (s * OUTS + o) * tokens + t, mask=real, other=0.0)
    return sums


@triton.jit
def sinkhorn(logits_TJK, eps, ITERATIONS: tl.constexpr):
    """The softmax over k (plus eps) and each of the 2 ITERATIONS - 1 passes after it, as a tuple: over j, k, j, ..."""
    exps = tl.exp(logits_TJK - tl.max(logits_TJK, 2, keep_dims=True))
    steps = (exps / tl.sum(exps, 2, keep_dims=True) + eps,)
    for i in tl.static_range(2 * ITERATIONS - 1):
        steps = steps + (steps[i] / (tl.sum(steps[i], 1 + i % 2, keep_dims=True) + eps),)
    return steps


@triton.jit
def _mix(
    parts, base, scale, totals, post, comb, tokens, norm_eps, eps,
    D: tl.constexpr, N: tl.constexpr, LOGITS: tl.constexpr, OUT: tl.constexpr, SLICES: tl.constexpr,
    ITERATIONS: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """The parts' sums, totals [LOGITS + 1, T], for the backward, and a sublayer's post and comb."""
    OUTS: tl.constexpr = LOGITS + 1
    t = tl.program_id(0).to(tl.int64) * MIXED + tl.arange(0, MIXED)
    o, real = tl.arange(0, OUT)[None, :], t < tokens
    kept = real[:, None] & (o < OUTS)
    sums_TO = _total(parts, o, t[:, None], kept, tokens, OUTS, SLICES)
    tl.store(totals + o * tokens + t[:, None], sums_TO, mask=kept)
    if LOGITS > N:
        rms = tl.rsqrt(_total(parts, LOGITS, t, real, tokens, OUTS, SLICES) / (N * D) + norm_eps)
        n = tl.arange(0, N)
        logits_TN = _total(parts, N + n[None, :], t[:, None], real[:, None], tokens, OUTS, SLICES) * rms[:, None]
        gate_TN = tl.sigmoid(tl.fma(logits_TN, tl.load(scale + 1), tl.load(base + N + n)[None, :]))
        tl.store(post + t[:, None] * N + n[None, :], 2 * gate_TN, mask=real[:, None])
        jk, t = n[:, None] * N + n[None, :], t[:, None, None]
        logits_TJK = _total(parts, 2 * N + jk[None, :, :], t, t < tokens, tokens, OUTS, SLICES) * rms[:, None, None]
        logits_TJK = tl.fma(logits_TJK, tl.load(scale + 2), tl.load(base + 2 * N + jk)[None, :, :])
        steps = sinkhorn(logits_TJK, eps, ITERATIONS)
        tl.store(comb + t * (N * N) + jk[None, :, :], steps[2 * ITERATIONS - 1], mask=t < tokens)


@triton.jit(do_not_specialize=["tokens", "mixers"])
def _mix_and_collapse(
    streams, parts, base, scale, weight, totals, pre, post, comb, x, tokens, mixers, norm_eps, eps,
    D: tl.constexpr, N: tl.constexpr, LOGITS: tl.constexpr, OUT: tl.constexpr, SLICES: tl.constexpr,
    ITERATIONS: tl.constexpr, MIXED: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) < mixers:
        _mix(
            parts, base, scale, totals, post, comb, tokens, norm_eps, eps, D, N, LOGITS, OUT, SLICES, ITERATIONS, MIXED
        )
    else:
        t = (tl.program_id(0) - mixers).to(tl.int64) * R + tl.arange(0, R)
        d, real = tl.arange(0, WIDTH), t < tokens
        real_TD = real[:, None] & (d < D)[None, :]
        rows = tiles(streams, (t * (N * D))[:, None] + d[None, :], real_TD, D, N)
        rms = tl.rsqrt(_total(parts, LOGITS, t, real, tokens, LOGITS + 1, SLICES) / (N * D) + norm_eps)
        sums_TD = tl.zeros([R, WIDTH], tl.float32)
        for j in tl.static_range(N):
            logit = _total(parts, j, t, real, tokens, LOGITS + 1, SLICES) * rms
            gate = tl.sigmoid(tl.fma(logit, tl.load(scale), tl.load(base + j))) + eps
            tl.store(pre + t * N + j, gate, mask=real)
            sums_TD = tl.fma(gate[:, None], rows[j].to(tl.float32), sums_TD)
        x_TD = sums_TD.to(x.dtype.element_ty).to(tl.float32)  # what the definition collapses to
        x_TD *= tl.rsqrt(tl.sum(x_TD * x_TD, 1) / D + norm_eps)[:, None]
        x_TD *= tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        tl.store(x + t[:, None] * D + d[None, :], x_TD, mask=real_TD)


class Sizes(NamedTuple):
    """Of a site's kernels: what follows from n, d and the number of logits alone."""

    D: int
    N: int
    LOGITS: int

    @property
    def out(self) -> int:
        """Rows of a tile of logits and one more number; twice as many is the least that warpgroups multiply."""
        return max(next_power(self.LOGITS + 1), 32)

    @property
    def slices(self) -> int:
        return math.ceil(self.D / CHANNELS)

    @property
    def rows(self) -> dict[str, int]:
        """Of the programs that hold whole tokens."""
        width = next_power(self.D)
        return {"R": max(TILE // width, 1), "WIDTH": width}


class Result(NamedTuple):
    new: Tensor  # the streams [T, n, d]
    x: Tensor  # [T, d]
    pre: Tensor  # [T, n]
    post: Tensor  # [T, n]
    comb: Tensor  # [T, n, n]
    totals: Tensor  # [logits + 1, T]: fn times the streams, and the sum of their squares


Update = tuple[Tensor, Tensor, Tensor]  # an output [T, d], its post [T, n] and comb [T, n, n]


def site_forward(
    streams: Tensor, update: Update | None, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor,
    iterations: int, norm_eps: float, eps: float,
) -> Result:  # fmt: skip
    """`kernels.hyper.enter` and, for fn of n rows, `leave`; what is no result then is left as it was."""
    tokens, n, d = streams.shape
    sizes = check(streams, update, fn)
    new = streams if update is None else torch.empty_like(streams)
    parts = streams.new_empty(sizes.slices, sizes.LOGITS + 1, tokens, dtype=torch.float32)
    gates = parts.new_empty(tokens, n), parts.new_empty(tokens, n), parts.new_empty(tokens, n, n)
    result = Result(new, streams.new_empty(tokens, d), *gates, torch.empty_like(parts[0]))
    if tokens:
        _expand[(sizes.slices, triton.cdiv(tokens, ROWS))](
            streams, *(update or (fn, fn, fn)), fn, new, parts, tokens, *sizes, OUT=sizes.out,
            ROWS=ROWS, STEP=math.gcd(d, STEP), CHANNELS=CHANNELS, PENDING=update is not None,
            PRECISION=precision(streams.dtype), num_warps=8, num_stages=3, **SAME_BITS,
        )  # fmt: skip
        mixers = triton.cdiv(tokens, MIXED)
        _mix_and_collapse[(mixers + triton.cdiv(tokens, sizes.rows["R"]),)](
            new, parts, base, scale, weight, result.totals, *gates, result.x, tokens, mixers, norm_eps, eps,
            *sizes, OUT=sizes.out, SLICES=sizes.slices, ITERATIONS=iterations,
            MIXED=MIXED, **sizes.rows, num_warps=8, **SAME_BITS,
        )  # fmt: skip
    return result


def check(streams: Tensor, update: Update | None, fn: Tensor) -> Sizes:
    """ValueError, by name, for what the kernels do not take."""
    check_dtypes(streams=streams, output=streams if update is None else update[0])
    _, n, d = streams.shape
    if n not in STREAMS:
        raise ValueError(f"streams: {n}; the Triton kernels take {STREAMS}")
    if d % LEAST:
        raise ValueError(f"channels: {d}; the Triton kernels take multiples of {LEAST}")
    return Sizes(d, n, fn.shape[0])


def by_token(x: Tensor) -> Tensor:
    """[..., T] as [T, ...], with a token's numbers next to one another in memory."""
    return x.movedim(-1, 0).contiguous()


class Site(torch.autograd.Function):
    """streams with `output` (None: as they are), x, post, comb: new ones, or None where there are none."""

    @staticmethod
    def forward(
        ctx: Any, streams: Tensor, output: Tensor | None, post: Tensor | None, comb: Tensor | None, fn: Tensor,
        base: Tensor, scale: Tensor, weight: Tensor, iterations: int, norm_eps: float, eps: float,
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        streams, fn = streams.contiguous(), fn.contiguous()
        update = None
        if output is not None and post is not None and comb is not None:
            update = output.contiguous(), by_token(post), by_token(comb)
        result = site_forward(streams, update, fn, base, scale, weight, iterations, norm_eps, eps)
        kept = result.new, result.pre, result.totals
        ctx.save_for_backward(streams, *(update or [None] * 3), fn, base, scale, weight, *kept)
        ctx.settings = iterations, norm_eps, eps
        new = None if update is None else result.new
        if fn.shape[0] == streams.shape[1]:
            return new, result.x, None, None
        return new, result.x, result.post.t(), result.comb.movedim(0, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from .hyper_backward import site_backward

        streams, output, post, comb, *others = ctx.saved_tensors
        update = None if output is None else (output, post, comb)
        return (*site_backward(streams, update, *others, *grads, *ctx.settings), None, None, None)
