"""Where V4 computes in fp32 whatever the model's dtype."""

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """x in fp32, or in its own dtype if that is wider: a model in float64 computes everything in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
