"""RMSNorm over the last dimension, in fp32, alone or with the RoPE that follows it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import fused
from .rope import apply_rope
from .upcast import upcast


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [..., D] / sqrt(mean(x^2) + eps), times weight [D] if given; fp32 inside, returns x's dtype.

    V4 uses it without a weight on each query head and on the flattened residual streams (paper 2.3, DeepSeek's code).
    """
    if fused(x):
        from .fused.norm import NormRope

        return NormRope.apply(x, weight, None, eps, False)  # pyright: ignore[reportReturnType]
    weight = None if weight is None else upcast(weight)
    return F.rms_norm(upcast(x), (x.shape[-1],), weight, eps).to(x.dtype)


def reference_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The definition, spelled out; the tests hold `rms_norm` to it in float64."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def norm_rope(x: Tensor, weight: Tensor | None, rotation: Tensor, eps: float) -> Tensor:
    """`rms_norm` of x [T, ..., D], then RoPE on its last channels by rotation [T, R]: fused, one pass over memory."""
    if fused(x):
        from .fused.norm import NormRope

        return NormRope.apply(x, weight, rotation, eps, False)  # pyright: ignore[reportReturnType]
    return apply_rope(rms_norm(x, weight, eps), rotation)
