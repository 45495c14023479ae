"""RMSNorm over the last dimension, in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .upcast import upcast


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [..., D] / sqrt(mean(x^2) + eps), times weight [D] if given; fp32 inside, returns x's dtype.

    V4 uses it without a weight on each query head and on the flattened residual streams (paper 2.3, DeepSeek's code).
    """
    weight = None if weight is None else upcast(weight)
    return F.rms_norm(upcast(x), (x.shape[-1],), weight, eps).to(x.dtype)


def reference_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The definition, spelled out; the tests hold `rms_norm` to it in float64."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight
