"""Triton kernels of AdamW over lists of tensors: a gradient's norm, and the step that reads and writes all once.

A parameter takes 2 bytes for the norm and 28 for the step, where its gradient and weight are bf16.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lists import BLOCK, WARPS, by_type, clipping, part, place


@triton.jit
def _squares(table, blocks, sums, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    row, block, there = place(table, blocks, 2, BLOCK, ALIGNED)
    g = tl.load(part(row, 0, block, GRADIENT, BLOCK, ALIGNED), mask=there, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum(g * g, 0))


@triton.jit
def _adamw(
    table, blocks, norm, clip, kept, rate, new1, beta2, new2, root2, eps,
    GRADIENT: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row, block, there = place(table, blocks, 6, BLOCK, ALIGNED)
    factor, finite = clipping(norm, clip)
    there = there & finite
    at_p = part(row, 0, block, tl.float32, BLOCK, ALIGNED)
    at_m = part(row, 2, block, tl.float32, BLOCK, ALIGNED)
    at_v = part(row, 3, block, tl.float32, BLOCK, ALIGNED)
    g = tl.load(part(row, 1, block, GRADIENT, BLOCK, ALIGNED), mask=there, other=0.0).to(tl.float32) * factor
    p, m, v = tl.load(at_p, mask=there), tl.load(at_m, mask=there), tl.load(at_v, mask=there)
    m += new1 * (g - m)
    v = beta2 * v + new2 * g * g
    p = p * kept - rate * tl.div_rn(m, tl.sqrt_rn(v) * root2 + eps)
    tl.store(at_m, m, mask=there)
    tl.store(at_v, v, mask=there)
    tl.store(at_p, p, mask=there)
    if WEIGHT is not None:
        tl.store(part(row, 4, block, WEIGHT, BLOCK, ALIGNED), p, mask=there)


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    lists = by_type([gradients], [0])
    sums = torch.empty(sum(len(each.blocks) for _, each in lists), dtype=torch.float32, device=gradients[0].device)
    start = 0
    for (gradient,), each in lists:
        _squares[each.grid](
            each.table, each.blocks, sums[start:], GRADIENT=gradient, BLOCK=BLOCK, ALIGNED=each.aligned, num_warps=WARPS
        )
        start += len(each.blocks)
    return sums.sum(dtype=torch.float64).sqrt().float()


def adamw_step(
    masters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    norm: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip: float,
) -> None:
    for (gradient, weight), each in by_type([masters, gradients, firsts, seconds, weights], [1, 4]):
        _adamw[each.grid](
            each.table, each.blocks, norm, clip, 1 - lr * weight_decay, lr / (1 - betas[0] ** step),
            1 - betas[0], betas[1], 1 - betas[1], (1 - betas[1] ** step) ** -0.5, eps,
            GRADIENT=gradient, WEIGHT=weight, BLOCK=BLOCK, ALIGNED=each.aligned, num_warps=WARPS,
        )  # fmt: skip
