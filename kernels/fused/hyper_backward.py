"""Triton kernels of hyper-connections, backward: three, in this order.

1. Of whole tokens: the norm and the collapse, as far as they give the gradient of `pre`. Reads the streams and x's.
2. Of gates: back through Sinkhorn-Knopp, whose passes are computed again and kept in registers; `base` and `scale`.
3. Of tiles: the gradient of the new streams is put together, used for `fn`, and taken back to the old streams, the
   output, its `post` and `comb`, without ever being stored. The new streams are computed again from the old ones.

In bf16 at n = 4 that reads and writes 20 d numbers a token, of which the first kernel has 5 d, and what the third
stores for sums over channels: 20 numbers in fp32 for each 64. A program of the third keeps its channels of `fn`'s
gradient while it goes through tokens; a few such parts are then added in order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .hyper import MIXED, Sizes, Update, by_token, columns, expanded, sinkhorn, tiles
from .launch import precision

ROWS, STEP = 32, 64  # tokens and channels of a tile
STAGES = 2  # more would spill
PROGRAMS = 132  # of tiles: their registers leave one on each of an H100's multiprocessors
ROW_PROGRAMS = 132  # of whole tokens; each keeps a sum for the norm weight's gradient
ROW_STAGES = 3  # two tokens are loaded while one is summed up


@triton.jit
def _collapse_backward(
    streams, pre, weight, of_x, of_pre, of_norm, parts, tokens, norm_eps,
    D: tl.constexpr, N: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, ROW_STAGES: tl.constexpr,
):  # fmt: skip
    """of_pre [T, N]; of_norm [T, 2], the norm's factor and the mean that its gradient loses; the weight's parts."""
    d = tl.arange(0, WIDTH)
    weight_D = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    of_weight = tl.zeros([WIDTH], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(tokens, R), tl.num_programs(0), num_stages=ROW_STAGES):
        t = tl.full([R], tile, tl.int64) * R + tl.arange(0, R)
        real = t < tokens
        real_TD = real[:, None] & (d < D)[None, :]
        rows = tiles(streams, (t * (N * D))[:, None] + d[None, :], real_TD, D, N)
        gates = columns(pre, t, real, N)
        g_TD = tl.load(of_x + t[:, None] * D + d[None, :], mask=real_TD, other=0.0).to(tl.float32)
        sums_TD = tl.zeros([R, WIDTH], tl.float32)
        for j in tl.static_range(N):
            sums_TD = tl.fma(gates[j][:, None], rows[j].to(tl.float32), sums_TD)
        x_TD = sums_TD.to(of_x.dtype.element_ty).to(tl.float32)
        factor = tl.rsqrt(tl.sum(x_TD * x_TD, 1) / D + norm_eps)
        x_TD *= factor[:, None]
        of_weight += tl.sum(g_TD * x_TD, 0)
        g_TD *= weight_D[None, :]
        mean = tl.sum(g_TD * x_TD, 1) / D
        g_TD = (g_TD - x_TD * mean[:, None]) * factor[:, None]
        tl.store(of_norm + 2 * t, factor, mask=real)
        tl.store(of_norm + 2 * t + 1, mean, mask=real)
        for j in tl.static_range(N):
            tl.store(of_pre + t * N + j, tl.sum(g_TD * rows[j].to(tl.float32), 1), mask=real)
    tl.store(parts + tl.program_id(0).to(tl.int64) * D + d, of_weight, mask=d < D)


@triton.jit
def _mix_backward(
    totals, of_pre, of_post, of_comb, base, scale, of_logits, parts, tokens, norm_eps, eps,
    D: tl.constexpr, N: tl.constexpr, LOGITS: tl.constexpr, ITERATIONS: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """of_logits [LOGITS + 1, T]: of fn's products, and what the streams are multiplied by for the norm's sake.

    parts [programs, LOGITS + 3]: of base and of scale.
    """
    t, n = tl.program_id(0).to(tl.int64) * MIXED + tl.arange(0, MIXED), tl.arange(0, N)
    real, parts = t < tokens, parts + tl.program_id(0) * (LOGITS + 3)
    rms = tl.rsqrt(tl.load(totals + LOGITS * tokens + t, mask=real, other=0.0) / (N * D) + norm_eps)
    of_rms = tl.zeros([MIXED], tl.float32)
    at_TN, real_TN = n[None, :] * tokens + t[:, None], real[:, None]
    for part in tl.static_range(2 if LOGITS > N else 1):
        of_gate, first = (of_post, N * tokens) if part else (of_pre, 0)
        logits = tl.load(totals + first + at_TN, mask=real_TN, other=0.0)
        gate_scale = tl.load(scale + part)
        gate = tl.sigmoid(tl.fma(logits * rms[:, None], gate_scale, tl.load(base + part * N + n)[None, :]))
        g = tl.load(of_gate + t[:, None] * N + n[None, :], mask=real_TN, other=0.0) * gate * (1 - gate) * (part + 1)
        tl.store(parts + part * N + n, tl.sum(g, 0))
        tl.store(parts + LOGITS + part, tl.sum(tl.sum(g * logits, 1) * rms, 0))
        g *= gate_scale
        tl.store(of_logits + first + at_TN, g * rms[:, None], mask=real_TN)
        of_rms += tl.sum(g * logits, 1)
    if LOGITS > N:
        jk, first = n[:, None] * N + n[None, :], 2 * N * tokens
        at, real_TJK = jk[None, :, :] * tokens + t[:, None, None], real[:, None, None]
        logits = tl.load(totals + first + at, mask=real_TJK, other=0.0)
        gate_scale = tl.load(scale + 2)
        steps = sinkhorn(
            tl.fma(logits * rms[:, None, None], gate_scale, tl.load(base + 2 * N + jk)[None, :, :]), eps, ITERATIONS
        )
        g = tl.load(of_comb + t[:, None, None] * (N * N) + jk[None, :, :], mask=real_TJK, other=0.0)
        LAST: tl.constexpr = 2 * ITERATIONS - 2
        for i in tl.static_range(LAST + 1):
            g -= tl.sum(g * steps[LAST - i + 1], 1 + (LAST - i) % 2, keep_dims=True)
            g /= tl.sum(steps[LAST - i], 1 + (LAST - i) % 2, keep_dims=True) + eps
        g = (g - tl.sum(g * (steps[0] - eps), 2, keep_dims=True)) * (steps[0] - eps)
        tl.store(parts + 2 * N + jk, tl.sum(g, 0))
        tl.store(parts + LOGITS + 2, tl.sum(tl.sum(tl.sum(g * logits, 2), 1) * rms, 0))
        g *= gate_scale
        tl.store(of_logits + first + at, g * rms[:, None, None], mask=real_TJK)
        of_rms += tl.sum(tl.sum(g * logits, 2), 1)
    tl.store(of_logits + LOGITS * tokens + t, -of_rms * rms * rms * rms / (N * D), mask=real)


@triton.jit
def _streams_backward(
    old, output, post, comb, fn, weight, pre, of_norm, of_logits, of_new, of_x, of_old, of_output, parts_gates,
    parts_fn, tokens,
    D: tl.constexpr, N: tl.constexpr, LOGITS: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    PENDING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    c, o = tl.program_id(0) * STEP + tl.arange(0, STEP), tl.arange(0, OUT)
    dtype: tl.constexpr = old.dtype.element_ty
    weight_C = tl.load(weight + c).to(tl.float32)[None, :]
    weights, of_fn = (), ()
    for k in tl.static_range(N):
        w_OC = tl.load(fn + (o * (N * D))[:, None] + c[None, :] + k * D, mask=(o < LOGITS)[:, None], other=0.0)
        weights, of_fn = weights + (tl.trans(w_OC).to(dtype),), of_fn + (tl.zeros([STEP, OUT], tl.float32),)
    parts_gates += tl.program_id(0).to(tl.int64) * (N + N * N) * ROWS * tl.cdiv(tokens, ROWS) + tl.arange(0, ROWS)
    for tile in tl.range(tl.program_id(1), tl.cdiv(tokens, ROWS), tl.num_programs(1)):
        t = tl.full([ROWS], tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        real = t < tokens
        real_TC, at_TC = real[:, None], t[:, None] * D + c[None, :]
        streams_TC = (t * (N * D))[:, None] + c[None, :]
        of_x_TC = tl.load(of_x + at_TC, mask=real_TC, other=0.0)
        if PENDING:
            later = tiles(of_new, streams_TC, real_TC, D, N)
        before, gates = tiles(old, streams_TC, real_TC, D, N), columns(pre, t, real, N)
        g_OT = tl.load(
            of_logits + o[:, None] * tokens + t[None, :], mask=(o < LOGITS)[:, None] & real[None, :], other=0.0
        )
        g_OT = g_OT.to(dtype)
        x = before
        if PENDING:
            posts, combs = columns(post, t, real, N), columns(comb, t, real, N * N)
            output_TC = tl.load(output + at_TC, mask=real_TC, other=0.0).to(tl.float32)
            x = expanded(before, output_TC, posts, combs, N)
        sums_TC = tl.zeros([ROWS, STEP], tl.float32)
        for k in tl.static_range(N):
            sums_TC = tl.fma(gates[k][:, None], x[k].to(tl.float32), sums_TC)
        norm = columns(of_norm, t, real, 2)
        x_TC = sums_TC.to(dtype).to(tl.float32) * norm[0][:, None]
        g_TC = of_x_TC.to(tl.float32) * weight_C
        g_TC = (g_TC - x_TC * norm[1][:, None]) * norm[0][:, None]
        of_square = tl.load(of_logits + LOGITS * tokens + t, mask=real, other=0.0)[:, None]
        whole, sums = (), ()
        for k in tl.static_range(N):
            product = tl.trans(tl.dot(weights[k], g_OT, input_precision=PRECISION))
            product = tl.fma(of_square, x[k].to(tl.float32), tl.fma(gates[k][:, None], g_TC, product))
            if PENDING:
                product += later[k].to(tl.float32)
            whole = whole + (product,)
            sums = sums + (tl.dot(tl.trans(x[k]), tl.trans(g_OT), of_fn[k], input_precision=PRECISION),)
        of_fn, of_gates = sums, parts_gates + tile * ((N + N * N) * ROWS)
        for j in tl.static_range(N):
            g_TC = whole[j]
            if PENDING:
                g_TC = combs[j * N][:, None] * whole[0]
                for k in tl.static_range(1, N):
                    g_TC = tl.fma(combs[j * N + k][:, None], whole[k], g_TC)
                for k in tl.static_range(N):
                    dots = tl.sum(before[j].to(tl.float32) * whole[k], 1)
                    tl.store(of_gates + (N + j * N + k) * ROWS, dots)
            tl.store(of_old + streams_TC + j * D, g_TC, mask=real_TC)
        if PENDING:
            g_TC = posts[0][:, None] * whole[0]
            for k in tl.static_range(1, N):
                g_TC = tl.fma(posts[k][:, None], whole[k], g_TC)
            tl.store(of_output + at_TC, g_TC, mask=real_TC)
            for k in tl.static_range(N):
                tl.store(of_gates + k * ROWS, tl.sum(output_TC * whole[k], 1))
    part = parts_fn + tl.program_id(1).to(tl.int64) * LOGITS * N * D
    for k in tl.static_range(N):
        tl.store(part + (o * (N * D))[None, :] + c[:, None] + k * D, of_fn[k], mask=(o < LOGITS)[None, :])


def site_backward(
    old: Tensor, update: Update | None, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor, new: Tensor,
    pre: Tensor, totals: Tensor, of_new: Tensor | None, of_x: Tensor, of_post: Tensor | None, of_comb: Tensor | None,
    iterations: int, norm_eps: float, eps: float,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of old, update's output, post and comb, fn, base, scale and weight."""
    tokens, n, d = old.shape
    inputs, weights = (old, *(update or [None] * 3)), (fn, base, scale, weight)
    if tokens == 0:
        return *(None,) * len(inputs), *(torch.zeros_like(x) for x in weights)
    sizes, of_x = Sizes(d, n, fn.shape[0]), of_x.contiguous()
    of_pre, of_norm, parts_weight = _of_whole_tokens(sizes, new, pre, weight, of_x, norm_eps)
    of_logits, parts = torch.empty_like(totals), totals.new_empty(triton.cdiv(tokens, MIXED), sizes.LOGITS + 3)
    of_gates = [of_pre if x is None else by_token(x) for x in (of_post, of_comb)]  # which the head has not
    _mix_backward[(parts.shape[0],)](
        totals, of_pre, *of_gates, base, scale, of_logits, parts, tokens, norm_eps, eps, *sizes,
        ITERATIONS=iterations, MIXED=MIXED, num_warps=8,
    )  # fmt: skip
    step = math.gcd(d, STEP)
    slices = d // step
    blocks = triton.cdiv(tokens, ROWS)
    groups = max(min(PROGRAMS // slices, blocks), 1)
    of_inputs, parts_fn = [x if x is None else torch.empty_like(x) for x in inputs], totals.new_empty(groups, *fn.shape)
    parts_gates = totals.new_empty(slices, blocks if update else 0, n + n * n, ROWS)
    _streams_backward[(slices, groups)](
        old, *(update or (fn, fn, fn)), fn, weight, pre, of_norm, of_logits,
        of_x if of_new is None else of_new.contiguous(), of_x, of_inputs[0], of_inputs[1] if update else of_x,
        parts_gates, parts_fn, tokens, *sizes, OUT=sizes.out, ROWS=ROWS, STEP=step, PENDING=update is not None,
        PRECISION=precision(old.dtype), num_warps=8, num_stages=STAGES,
    )  # fmt: skip
    if update:
        gates = parts_gates.sum(0).transpose(0, 1).flatten(1)[:, :tokens]
        of_inputs[2:] = gates[:n], gates[n:].unflatten(0, (n, n))
    of_base, of_scale = parts.sum(0).split([sizes.LOGITS, 3])
    of_weights = parts_fn.sum(0), of_base, of_scale[: scale.numel()], parts_weight.sum(0)
    return *of_inputs, *(g.to(x.dtype) for g, x in zip(of_weights, weights, strict=True))


def _of_whole_tokens(
    sizes: Sizes, new: Tensor, pre: Tensor, weight: Tensor, of_x: Tensor, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """of_pre, of_norm and the norm weight's parts, as `_collapse_backward` gives them."""
    tokens = new.shape[0]
    programs = min(triton.cdiv(tokens, sizes.rows["R"]), ROW_PROGRAMS)
    of_pre, of_norm, parts = torch.empty_like(pre), pre.new_empty(tokens, 2), pre.new_empty(programs, sizes.D)
    _collapse_backward[(programs,)](
        new, pre, weight, of_x, of_pre, of_norm, parts, tokens, norm_eps,
        D=sizes.D, N=sizes.N, **sizes.rows, ROW_STAGES=ROW_STAGES, num_warps=16,
    )  # fmt: skip
    return of_pre, of_norm, parts
