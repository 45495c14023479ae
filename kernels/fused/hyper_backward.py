"""Triton kernels of hyper-connections, backward: three, in this order.

1. Of gates: the sums over a token that the gradient of `pre` needs, in tiles; the program that finds itself the last of
   a group of tokens goes back through the gates and Sinkhorn-Knopp, whose passes are done again and then undone.
2. Of tiles: the gradient of the new streams is put together, used for `fn`, and taken back to the old streams, the
   output, its `post` and `comb`, without ever being stored. The new streams are computed again from the old ones. A
   program keeps its channels of the gradients of `fn` and the norm's weight while it goes through tokens. On a Hopper
   GPU in bf16 this is done in Gluon (hopper_hyper.py).
3. What programs stored in parts is added, in order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import hopper_hyper, hyper
from .hyper import Sizes, Update, columns, expanded, pair, tiles
from .launch import is_hopper, next_power, precision
from .sinkhorn import normalized, softmax, undone

ROWS, STEP = 32, 64  # tokens and channels of a tile
PROGRAMS = 132  # of tiles: their registers leave one on each of an H100's multiprocessors
PARTS, BLOCK = 16, 128  # rows and columns that are added at once


@triton.jit
def _through_sinkhorn(logits, g, sums, t, real, tokens, eps, N: tl.constexpr, ITERATIONS: tl.constexpr):
    """The logits' gradients, from those of comb; sums [2 ITERATIONS - 1, N, T] is where the passes' divisors go."""
    first = softmax(logits, eps, N)
    m, divisors = normalized(first, eps, 0, N)
    for i in tl.static_range(N):
        tl.store(sums + i * tokens + t, divisors[i], mask=real)
    for turn in tl.range(1, ITERATIONS):
        m, of_rows = normalized(m, eps, 1, N)
        m, divisors = normalized(m, eps, 0, N)
        for i in tl.static_range(N):
            tl.store(sums + ((2 * turn - 1) * N + i) * tokens + t, of_rows[i], mask=real)
            tl.store(sums + (2 * turn * N + i) * tokens + t, divisors[i], mask=real)
    tl.debug_barrier()
    for back in tl.range(1, ITERATIONS):
        at = sums + 2 * (ITERATIONS - back) * N * tokens
        divisors, of_rows = columns(at, t, real, tokens, N, 1.0), columns(at - N * tokens, t, real, tokens, N, 1.0)
        m, g = undone(m, g, divisors, 0, N)
        m, g = undone(m, g, of_rows, 1, N)
    m, g = undone(m, g, columns(sums, t, real, tokens, N, 1.0), 0, N)
    of_logits = ()
    for j in tl.static_range(N):
        dot = g[j * N] * (first[j * N] - eps)
        for k in tl.static_range(1, N):
            dot = tl.fma(g[j * N + k], first[j * N + k] - eps, dot)
        for k in tl.static_range(N):
            of_logits = of_logits + ((g[j * N + k] - dot) * (first[j * N + k] - eps),)
    return of_logits


@triton.jit
def _mix_backward(
    dots, totals, pre, factor, of_post, of_comb, base, scale, of_logits, of_norm, sums, of_gates, group, tokens,
    norm_eps, eps,
    D: tl.constexpr, N: tl.constexpr, LOGITS: tl.constexpr, SLICES: tl.constexpr, SLOTS: tl.constexpr,
    ITERATIONS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """of_logits [LOGITS + 1, T]: of fn's products, and what the streams are multiplied by for the norm's sake.

    of_norm [2, T]: what x's gradient times the norm's weight, and x, are multiplied by; of_gates [LOGITS + 3] of a
    group, of base and of scale.
    """
    r, s = tl.arange(0, GROUP), tl.arange(0, SLOTS)
    t = group.to(tl.int64) * GROUP + r
    real = t < tokens
    found, gates = columns(totals, t, real, tokens, LOGITS + N * (N + 1) // 2), columns(pre, t, real, tokens, N)
    norm = tl.load(factor + t, mask=real, other=0.0)
    of_pre, mean, squares = (), tl.zeros([GROUP], tl.float32), tl.zeros([GROUP], tl.float32)
    for j in tl.static_range(N):
        parts_SR = tl.load(
            dots + (s * N + j)[:, None] * GROUP + r[None, :], mask=(s < SLICES)[:, None] & real[None, :], other=0.0
        )
        of_pre = of_pre + (tl.sum(parts_SR, 0),)
        mean = tl.fma(gates[j], of_pre[j], mean)
        squares += found[LOGITS + pair(j, j, N)]
    mean *= norm / D
    tl.store(of_norm + t, norm, mask=real)
    tl.store(of_norm + tokens + t, -norm * norm * mean, mask=real)
    rms = tl.rsqrt(squares / (N * D) + norm_eps)
    of_rms, of_scale, gate_scale = tl.zeros([GROUP], tl.float32), tl.zeros([GROUP], tl.float32), tl.load(scale)
    for j in tl.static_range(N):
        inner = tl.zeros([GROUP], tl.float32)  # of x and stream j
        for k in tl.static_range(N):
            inner = tl.fma(gates[k], found[LOGITS + pair(j, k, N)], inner)
        gate = tl.sigmoid(tl.fma(found[j] * rms, gate_scale, tl.load(base + j)))
        g = (of_pre[j] - mean * norm * inner) * norm * gate * (1 - gate)
        tl.store(of_gates + j, tl.sum(g, 0))
        of_scale = tl.fma(g, found[j], of_scale)
        tl.store(of_logits + j * tokens + t, g * gate_scale * rms, mask=real)
    tl.store(of_gates + LOGITS, tl.sum(of_scale * rms, 0))
    of_rms += of_scale * gate_scale
    if LOGITS > N:
        of_scale, gate_scale = tl.zeros([GROUP], tl.float32), tl.load(scale + 1)
        grads = columns(of_post, t, real, tokens, N)
        for k in tl.static_range(N):
            gate = tl.sigmoid(tl.fma(found[N + k] * rms, gate_scale, tl.load(base + N + k)))
            g = grads[k] * 2 * gate * (1 - gate)
            tl.store(of_gates + N + k, tl.sum(g, 0))
            of_scale = tl.fma(g, found[N + k], of_scale)
            tl.store(of_logits + (N + k) * tokens + t, g * gate_scale * rms, mask=real)
        tl.store(of_gates + LOGITS + 1, tl.sum(of_scale * rms, 0))
        of_rms += of_scale * gate_scale
        of_scale, gate_scale, logits = tl.zeros([GROUP], tl.float32), tl.load(scale + 2), ()
        for i in tl.static_range(N * N):
            logits = logits + (tl.fma(found[2 * N + i] * rms, gate_scale, tl.load(base + 2 * N + i)),)
        grads = columns(of_comb, t, real, tokens, N * N)
        grads = _through_sinkhorn(logits, grads, sums, t, real, tokens, eps, N, ITERATIONS)
        for i in tl.static_range(N * N):
            tl.store(of_gates + 2 * N + i, tl.sum(grads[i], 0))
            of_scale = tl.fma(grads[i], found[2 * N + i], of_scale)
            tl.store(of_logits + (2 * N + i) * tokens + t, grads[i] * gate_scale * rms, mask=real)
        tl.store(of_gates + LOGITS + 2, tl.sum(of_scale * rms, 0))
        of_rms += of_scale * gate_scale
    tl.store(of_logits + LOGITS * tokens + t, -of_rms * rms * rms * rms / (N * D), mask=real)


@triton.jit(do_not_specialize=["tokens"])
def _gates_backward(
    streams, weight, of_x, dots, totals, pre, factor, of_post, of_comb, base, scale, of_logits, of_norm, sums, of_gates,
    counts, tokens, norm_eps, eps,
    D: tl.constexpr, N: tl.constexpr, LOGITS: tl.constexpr, SLICES: tl.constexpr, SLOTS: tl.constexpr,
    ITERATIONS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dots [groups, SLICES, N, GROUP]: of x's gradient, times the norm's weight, and each stream."""
    TILES: tl.constexpr = GROUP // ROWS * SLICES
    group, slice = tl.program_id(0) // TILES, tl.program_id(0) % SLICES
    r = tl.program_id(0) // SLICES % (GROUP // ROWS) * ROWS + tl.arange(0, ROWS)
    t, c = group.to(tl.int64) * GROUP + r, slice * CHANNELS + tl.arange(0, CHANNELS)
    real_TC = (t < tokens)[:, None] & (c < D)[None, :]
    rows = tiles(streams, (t * (N * D))[:, None] + c[None, :], real_TC, D, N, "")
    g_TC = tl.load(of_x + t[:, None] * D + c[None, :], mask=real_TC, other=0.0).to(tl.float32)
    g_TC *= tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
    dots += group.to(tl.int64) * (SLICES * N * GROUP)
    for j in tl.static_range(N):
        tl.store(dots + (slice * N + j) * GROUP + r, tl.sum(g_TC * rows[j].to(tl.float32), 1))
    tl.debug_barrier()
    # It counts on when a graph is gone back through again.
    if tl.atomic_add(counts + 1 + tl.cdiv(tokens, GROUP) + group, 1, sem="acq_rel") % TILES == TILES - 1:
        _mix_backward(
            dots, totals, pre, factor, of_post, of_comb, base, scale, of_logits, of_norm, sums,
            of_gates + group * (LOGITS + 3), group, tokens, norm_eps, eps,
            D, N, LOGITS, SLICES, SLOTS, ITERATIONS, GROUP,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _streams_backward(
    old, output, post, comb, fn, weight, pre, of_norm, of_logits, of_new, of_x, of_old, of_output, parts_gates,
    parts_fn, parts_weight, tokens,
    D: tl.constexpr, N: tl.constexpr, LOGITS: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    PENDING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts_gates [slices, N + N N, T]; parts_fn [programs, LOGITS, N D]; parts_weight [programs, D]."""
    c, o = tl.program_id(0) * STEP + tl.arange(0, STEP), tl.arange(0, OUT)
    dtype: tl.constexpr = old.dtype.element_ty
    weight_C = tl.load(weight + c).to(tl.float32)[None, :]
    weights, of_fn, of_weight_TC = (), (), tl.zeros([ROWS, STEP], tl.float32)
    for k in tl.static_range(N):
        w_OC = tl.load(fn + (o * (N * D))[:, None] + c[None, :] + k * D, mask=(o < LOGITS)[:, None], other=0.0)
        weights, of_fn = weights + (tl.trans(w_OC).to(dtype),), of_fn + (tl.zeros([STEP, OUT], tl.float32),)
    parts_gates += tl.program_id(0).to(tl.int64) * (N + N * N) * tokens
    for tile in tl.range(tl.program_id(1), tl.cdiv(tokens, ROWS), tl.num_programs(1)):
        t = tl.full([ROWS], tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        real = t < tokens
        real_TC, at_TC = real[:, None], t[:, None] * D + c[None, :]
        streams_TC = (t * (N * D))[:, None] + c[None, :]
        gates, norm = columns(pre, t, real, tokens, N), columns(of_norm, t, real, tokens, 2)
        g_OT = tl.load(
            of_logits + o[:, None] * tokens + t[None, :], mask=(o < LOGITS)[:, None] & real[None, :], other=0.0
        )
        g_OT = g_OT.to(dtype)
        before = tiles(old, streams_TC, real_TC, D, N, "")
        x = before
        if PENDING:
            later = tiles(of_new, streams_TC, real_TC, D, N, "")
            posts, combs = columns(post, t, real, tokens, N), columns(comb, t, real, tokens, N * N)
            output_TC = tl.load(output + at_TC, mask=real_TC, other=0.0).to(tl.float32)
            x = expanded(before, output_TC, posts, combs, N)
        x_TC = tl.zeros([ROWS, STEP], tl.float32)
        for k in tl.static_range(N):
            x_TC = tl.fma(gates[k][:, None], x[k].to(tl.float32), x_TC)
        g_TC = tl.load(of_x + at_TC, mask=real_TC, other=0.0).to(tl.float32) * norm[0][:, None]
        of_weight_TC = tl.fma(g_TC, x_TC, of_weight_TC)
        g_TC = tl.fma(x_TC, norm[1][:, None], g_TC * weight_C)
        of_square = tl.load(of_logits + LOGITS * tokens + t, mask=real, other=0.0)[:, None]
        whole, sums = (), ()
        for k in tl.static_range(N):
            product = tl.trans(tl.dot(weights[k], g_OT, input_precision=PRECISION))
            product = tl.fma(of_square, x[k].to(tl.float32), tl.fma(gates[k][:, None], g_TC, product))
            if PENDING:
                product += later[k].to(tl.float32)
            whole = whole + (product,)
            sums = sums + (tl.dot(tl.trans(x[k]), tl.trans(g_OT), of_fn[k], input_precision=PRECISION),)
        of_fn, of_gates = sums, parts_gates + t
        for j in tl.static_range(N):
            g_TC = whole[j]
            if PENDING:
                g_TC = combs[j * N][:, None] * whole[0]
                for k in tl.static_range(1, N):
                    g_TC = tl.fma(combs[j * N + k][:, None], whole[k], g_TC)
                for k in tl.static_range(N):
                    dots = tl.sum(before[j].to(tl.float32) * whole[k], 1)
                    tl.store(of_gates + (N + j * N + k) * tokens, dots, mask=real)
            tl.store(of_old + streams_TC + j * D, g_TC, mask=real_TC)
        if PENDING:
            g_TC = posts[0][:, None] * whole[0]
            for k in tl.static_range(1, N):
                g_TC = tl.fma(posts[k][:, None], whole[k], g_TC)
            tl.store(of_output + at_TC, g_TC, mask=real_TC)
            for k in tl.static_range(N):
                tl.store(of_gates + k * tokens, tl.sum(output_TC * whole[k], 1), mask=real)
    part = parts_fn + tl.program_id(1).to(tl.int64) * LOGITS * N * D
    for k in tl.static_range(N):
        tl.store(part + (o * (N * D))[None, :] + c[:, None] + k * D, of_fn[k], mask=(o < LOGITS)[None, :])
    tl.store(parts_weight + tl.program_id(1) * D + c, tl.sum(of_weight_TC, 0))


@triton.jit
def _add(parts, out, i, size, count, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers i BLOCK ... of out [size]: the sums of parts [count, size]."""
    at, p = tl.full([BLOCK], i, tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PARTS)
    sums = tl.zeros([PARTS, BLOCK], tl.float32)
    for start in tl.range(0, count, PARTS, loop_unroll_factor=4):
        row = (start + p)[:, None]
        mask = (row < count) & (at < size)[None, :]
        sums += tl.load(parts + row.to(tl.int64) * size + at[None, :], mask=mask, other=0.0)
    tl.store(out + at, tl.sum(sums, 0), mask=at < size)


@triton.jit(do_not_specialize=["programs", "groups", "tokens"])
def _add_parts(
    parts_weight, parts_fn, parts_update, parts_gates, of_weight, of_fn, of_update, of_gates, programs, groups, tokens,
    D: tl.constexpr, N: tl.constexpr, LOGITS: tl.constexpr, SLICES: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Four sums, in programs of their own: first those of the gates, which have the most parts."""
    GATES: tl.constexpr = (LOGITS + 3 + BLOCK - 1) // BLOCK
    WEIGHT: tl.constexpr = (D + BLOCK - 1) // BLOCK
    FN: tl.constexpr = (LOGITS * N * D + BLOCK - 1) // BLOCK
    i = tl.program_id(0)
    if i < GATES:
        _add(parts_gates, of_gates, i, LOGITS + 3, groups, PARTS, BLOCK)
    elif i < GATES + WEIGHT:
        _add(parts_weight, of_weight, i - GATES, D, programs, PARTS, BLOCK)
    elif i < GATES + WEIGHT + FN:
        _add(parts_fn, of_fn, i - GATES - WEIGHT, LOGITS * N * D, programs, PARTS, BLOCK)
    else:
        _add(parts_update, of_update, i - GATES - WEIGHT - FN, tokens * (N + N * N), SLICES, PARTS, BLOCK)


def _added(sizes: Sizes, weight: Tensor, fn: Tensor, update: Tensor, gates: Tensor) -> list[Tensor]:
    """The sums over the first dimension of each, in an order that follows from its length."""
    outs = [torch.empty_like(x[0]) for x in (weight, fn, update, gates)]
    _add_parts[(sum(triton.cdiv(x.numel(), BLOCK) for x in outs),)](
        weight, fn, update, gates, *outs, fn.shape[0], gates.shape[0], update.shape[2], *sizes, SLICES=update.shape[0],
        PARTS=PARTS, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return outs


def site_backward(
    old: Tensor, update: Update | None, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor, new: Tensor,
    totals: Tensor, pre: Tensor, factor: Tensor, counts: Tensor, of_new: Tensor | None, of_x: Tensor,
    of_post: Tensor | None, of_comb: Tensor | None, iterations: int, norm_eps: float, eps: float,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of old, update's output, post and comb, fn, base, scale and weight."""
    tokens, n, d = old.shape
    inputs, weights = (old, *(update or [None] * 3)), (fn, base, scale, weight)
    if tokens == 0:
        return *(None,) * len(inputs), *(torch.zeros_like(x) for x in weights)
    sizes, of_x = Sizes(d, n, fn.shape[0]), of_x.contiguous()
    groups, slices = triton.cdiv(tokens, hyper.GROUP), sizes.slices
    dots, of_gates = totals.new_empty(groups, slices, n, hyper.GROUP), totals.new_empty(groups, sizes.LOGITS + 3)
    of_logits, of_norm = totals.new_empty(sizes.LOGITS + 1, tokens), totals.new_empty(2, tokens)
    sums = totals.new_empty(max(2 * iterations - 1, 0), n, tokens)
    grads = [pre if x is None else x.contiguous() for x in (of_post, of_comb)]  # which the head has not
    _gates_backward[(groups * (hyper.GROUP // hyper.ROWS) * slices,)](
        new, weight, of_x, dots, totals, pre, factor, *grads, base, scale, of_logits, of_norm, sums, of_gates, counts,
        tokens, norm_eps, eps, *sizes, SLICES=slices, SLOTS=next_power(slices), ITERATIONS=iterations,
        GROUP=hyper.GROUP, ROWS=hyper.ROWS, CHANNELS=hyper.CHANNELS, num_warps=8, maxnreg=hyper.REGISTERS,
    )  # fmt: skip
    of_new = of_x if of_new is None else of_new.contiguous()
    of_inputs = torch.empty_like(old), torch.empty_like(update[0]) if update else of_x
    given = old, update, fn, weight, pre, of_norm, of_logits, of_new, of_x, *of_inputs
    of_weight, of_fn, of_update, of_gates = _added(sizes, *_of_tiles(sizes, *given), of_gates)
    of_base, of_scale = of_gates.split([sizes.LOGITS, 3])
    of_weights = of_fn, of_base, of_scale[: scale.numel()], of_weight
    of_update = (of_inputs[1], of_update[:n], of_update[n:].view(n, n, tokens)) if update else (None,) * 3
    return of_inputs[0], *of_update, *(g.to(x.dtype) for g, x in zip(of_weights, weights, strict=True))


def _of_tiles(
    sizes: Sizes, old: Tensor, update: Update | None, fn: Tensor, weight: Tensor, pre: Tensor, of_norm: Tensor,
    of_logits: Tensor, of_new: Tensor, of_x: Tensor, of_old: Tensor, of_output: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The second launch: fills the last two, and returns the parts of the norm weight's, fn's and the update's."""
    tokens, _, d = old.shape
    step = math.gcd(d, STEP)
    hopper = is_hopper(old.device) and old.dtype == torch.bfloat16 and step == STEP
    slices = d // step
    programs = hopper_hyper.programs(old) if hopper else max(min(PROGRAMS // slices, triton.cdiv(tokens, ROWS)), 1)
    parts_fn, parts_weight = fn.new_empty(programs, *fn.shape), fn.new_empty(programs, d)
    parts_gates = fn.new_empty(slices, sizes.N + sizes.N**2, tokens if update else 0)
    if hopper:
        hopper_hyper.streams_backward(
            old, update, fn, weight, pre, of_norm, of_logits, of_new, of_x, of_old, of_output, parts_gates, parts_fn,
            parts_weight,
        )  # fmt: skip
    else:
        _streams_backward[(slices, programs)](
            old, *(update or (fn, fn, fn)), fn, weight, pre, of_norm, of_logits, of_new, of_x, of_old, of_output,
            parts_gates, parts_fn, parts_weight, tokens, *sizes, OUT=sizes.out, ROWS=ROWS, STEP=step,
            PENDING=update is not None, PRECISION=precision(old.dtype), num_warps=8, num_stages=1,
        )  # fmt: skip
    return parts_weight, parts_fn, parts_gates
