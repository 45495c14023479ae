"""RMSNorm over the last dimension, in fp32, alone or with the RoPE that follows it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import fused
from .project import Into, few
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


class Norm(NamedTuple):
    """One of `norm_each`: `rms_norm` of x [T, ..., D] if there is an `eps`, then RoPE if there is a `rotation`."""

    x: Tensor
    weight: Tensor | None = None
    rotation: Tensor | None = None
    eps: float | None = None
    into: Into | None = None


def norm_each(norms: Sequence[Norm]) -> list[Tensor]:
    """The result of each, or the rows that it was written into. No gradient; few rows are one launch."""
    if norms[0].x.shape[0] and few(norms[0].x):
        from .fused.norm import norm_each as launch

        return launch(norms)
    return [_alone(*each) for each in norms]


def _alone(x: Tensor, weight: Tensor | None, rotation: Tensor | None, eps: float | None, into: Into | None) -> Tensor:
    if eps is None:
        assert rotation is not None
        made = apply_rope(x, rotation)
    else:
        made = rms_norm(x, weight, eps) if rotation is None else norm_rope(x, weight, rotation, eps)
    return made if into is None else into.write(made)
