"""Compression of a window of tokens into one entry: a softmax over slots, for each channel on its own."""

import torch
from torch import Tensor

from .upcast import upcast


def pool(values: Tensor, scores: Tensor) -> Tensor:
    """values, scores [N, slots, C] -> [N, C]: sum over slots of softmax(scores) * values, fp32 (paper 2.3.1, 2.3.2).

    A slot with score -inf is absent; every entry has at least one slot that is not. Returns values' dtype.
    """
    return reference_pool(values, scores)


def reference_pool(values: Tensor, scores: Tensor) -> Tensor:
    return (torch.softmax(upcast(scores), dim=1) * upcast(values)).sum(1).to(values.dtype)
