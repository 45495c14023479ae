"""Triton kernels of the router: choice of experts and their weights from the gate's product, and the gradient of that.

The gate's product is `kernels.project.project_wide`; a token's choice and weights then follow from its own row of it,
in a tile whose shape depends on the number of experts alone. Nothing waits for the device.
Legend: T tokens, E experts, k of them for a token, R tokens of a program.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import SAME_BITS, next_power

TILE = 4096  # scores of a program
TINY = tl.constexpr(2.0**-126)  # the smallest normal number
EXPERTS, TOPK = 1024, 32  # of a model, at most


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) to a few units in the last place: log(1 + e) = 2 artanh(e / (2 + e)), a series up to 1/3."""
    e = tl.exp(-tl.abs(x))
    z = e / (2.0 + e)
    q = z * z
    series = q * (1 / 13 + q * (1 / 15 + q * (1 / 17)))
    series = q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + series)))))
    return tl.where(x > 0, x, 0.0) + 2.0 * z * (1.0 + series)


@triton.jit
def _affinity(x):
    """sqrt(softplus(x)), of no less than TINY; NaN stays."""
    s = _softplus(x)
    return tl.sqrt(tl.where(s < TINY, TINY, s))


@triton.jit
def _route(
    logits, bias, chosen, tokens, ids, weights, rows, experts, scaling,
    R: tl.constexpr, E: tl.constexpr, K: tl.constexpr, TOPK: tl.constexpr, BIAS: tl.constexpr, CHOSEN: tl.constexpr,
    TABLE: tl.constexpr,
):  # fmt: skip
    """Limited by its k reductions over the experts in registers; memory is 4 E bytes a token, read once.

    A score and its expert are one int64, whose maximum is the highest score, at ties that of the lowest id.
    """
    r, e, k = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, E), tl.arange(0, K)
    at, slot = r[:, None] * experts + e[None, :], r[:, None] * TOPK + k[None, :]
    real_RE = (r < rows)[:, None] & (e < experts)[None, :]
    real_RK = (r < rows)[:, None] & (k < TOPK)[None, :]
    scores = _affinity(tl.load(logits + at, mask=real_RE, other=0.0))
    if BIAS:
        scores += tl.load(bias + e, mask=e < experts, other=0.0).to(tl.float32)[None, :]
    bits = scores.to(tl.int32, bitcast=True)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)  # rises with the score
    keys = tl.where(e[None, :] < experts, order * 65536 + (65535 - e)[None, :], -9223372036854775808)
    learned = tl.zeros([R, K], tl.int64)
    for i in tl.static_range(TOPK):
        best = tl.max(keys, 1)
        learned = tl.where(k[None, :] == i, (65535 - (best & 65535))[:, None], learned)
        keys = tl.where(keys == best[:, None], -9223372036854775808, keys)
    found = learned
    if CHOSEN:
        own = slot
        if TABLE:
            own = tl.load(tokens + r, mask=r < rows, other=0)[:, None] * TOPK + k[None, :]
        given = tl.load(chosen + own, mask=real_RK, other=0)
        found = tl.where((tl.min(given, 1) < 0)[:, None], learned, given)
    picked = _affinity(tl.load(logits + r[:, None] * experts + found, mask=real_RK, other=0.0))
    total = tl.sum(tl.where(k[None, :] < TOPK, picked, 0.0), 1)
    tl.store(ids + slot, found, mask=real_RK)
    tl.store(weights + slot, picked / (total + 1e-20)[:, None] * scaling, mask=real_RK)


@triton.jit
def _route_backward(
    logits, ids, grad, grad_logits, rows, experts, scaling, R: tl.constexpr, E: tl.constexpr, TOPK: tl.constexpr
):
    """Limited by memory: it writes 4 E bytes a token. An expert that is chosen twice gets the sum, in slot order."""
    r, e = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, E)
    total, slope = tl.full([R], 1e-20, tl.float32), tl.zeros([R], tl.float32)
    for i in tl.static_range(TOPK):
        expert = tl.load(ids + r * TOPK + i, mask=r < rows, other=0)
        s = _affinity(tl.load(logits + r * experts + expert, mask=r < rows, other=0.0))
        total += s
        slope += s * tl.load(grad + r * TOPK + i, mask=r < rows, other=0.0)
    result = tl.zeros([R, E], tl.float32)
    for i in tl.static_range(TOPK):
        expert = tl.load(ids + r * TOPK + i, mask=r < rows, other=0)
        x = tl.load(logits + r * experts + expert, mask=r < rows, other=0.0)
        of_s = (tl.load(grad + r * TOPK + i, mask=r < rows, other=0.0) - slope / total) / total * scaling
        small = tl.exp(-tl.abs(x))
        of_x = of_s * (tl.where(x > 0, 1.0, small) / (1.0 + small)) / (2.0 * _affinity(x))
        of_x = tl.where(_softplus(x) < TINY, 0.0, of_x)
        result += tl.where(e[None, :] == expert[:, None], of_x[:, None], 0.0)
    at = r[:, None] * experts + e[None, :]
    tl.store(grad_logits + at, result, mask=(r < rows)[:, None] & (e < experts)[None, :])


class Route(torch.autograd.Function):
    """Ids int64, weights fp32 [T, k] of logits fp32 [T, E], as in `kernels.moe.route`; `chosen` ids are below E, and
    `tokens` rows of them."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        bias: Tensor | None,
        chosen: Tensor | None,
        tokens: Tensor | None,
        topk: int,
        scaling: float,
    ) -> tuple[Tensor, Tensor]:
        rows, experts = logits.shape
        if experts > EXPERTS or not 0 < topk <= min(TOPK, experts):
            raise ValueError(f"{topk} of {experts} experts; the Triton kernels take 1 to {TOPK} of up to {EXPERTS}")
        logits = logits.contiguous()
        ids = logits.new_empty(rows, topk, dtype=torch.int64)
        weights = logits.new_empty(rows, topk)
        width, given = next_power(experts), ids if chosen is None else chosen.to(torch.int64).contiguous()
        if rows:
            _route[(triton.cdiv(rows, TILE // width),)](
                logits, logits if bias is None else bias, given, given if tokens is None else tokens.contiguous(),
                ids, weights, rows, experts, scaling,
                R=TILE // width, E=width, K=next_power(topk), TOPK=topk,
                BIAS=bias is not None, CHOSEN=chosen is not None, TABLE=tokens is not None, num_warps=4, **SAME_BITS,
            )  # fmt: skip
        ctx.save_for_backward(logits, ids)
        ctx.scaling = scaling
        ctx.mark_non_differentiable(ids)
        return ids, weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        logits, ids = ctx.saved_tensors
        (rows, experts), topk = logits.shape, ids.shape[1]
        grad, width = torch.empty_like(logits), next_power(experts)
        if rows:
            _route_backward[(triton.cdiv(rows, TILE // width),)](
                logits, ids, grads[1].contiguous(), grad, rows, experts, ctx.scaling,
                R=TILE // width, E=width, TOPK=topk, num_warps=8,
            )  # fmt: skip
        return grad, None, None, None, None, None
