"""AdamW on fp32 masters, in one pass over memory: clipped gradients in, moments, masters and bf16 weights out.

The reference is torch.optim.AdamW's step, operation by operation, on gradients that were clipped as by
`torch.nn.utils.clip_grad_norm_`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import fused

MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch names them


@torch.no_grad()
def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """fp32 []: the L2 norm of all gradients (bf16 or fp32) together; nothing waits for the device.

    On a GPU it is summed up in blocks whose order is fixed, so that each run has the same bits.
    """
    if fused(gradients[0]):
        from .fused.adamw import gradient_norm as kernel

        return kernel(gradients)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]))


def clip_factor(norm: Tensor, most: float) -> Tensor:
    """What gradients of this norm are multiplied with, so that it is at most `most`."""
    return (most / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def adamw_step(
    masters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    norm: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip: float,
) -> None:
    """Step number `step` (from 1), in place, of fp32 masters and moments; gradients are bf16 or fp32, and are kept.

    `norm` fp32 [] is the whole gradient's, which is scaled down to a norm of `clip`. Where it is not finite, nothing
    changes. A weight (bf16; None where the master is the weight) becomes its master's value. Nothing waits for a GPU.
    """
    if fused(norm):
        from .fused.adamw import adamw_step as kernel

        lists = (masters, gradients, firsts, seconds, weights)
        return kernel(*lists, norm, step, lr, betas, eps, weight_decay, clip)
    if not norm.isfinite():
        return None
    factor, (beta1, beta2) = clip_factor(norm, clip), betas
    rest1, rest2 = 1 - beta1**step, 1 - beta2**step  # what is missing of moments that began at 0
    for p, g, first, second, weight in zip(masters, gradients, firsts, seconds, weights, strict=True):
        g = g.to(p.dtype) * factor
        p.mul_(1 - lr * weight_decay)
        first.lerp_(g, 1 - beta1)
        second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.addcdiv_(first, (second.sqrt() / rest2**0.5).add_(eps), value=-lr / rest1)
        if weight is not None:
            weight.copy_(p)
