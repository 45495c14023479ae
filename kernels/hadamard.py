"""The Hadamard rotation of the indexer's queries and keys, which spreads outliers before they are rounded to FP4."""

import torch
from torch import Tensor

from .upcast import upcast


def hadamard(x: Tensor) -> Tensor:
    """x [..., n] -> x H / sqrt(n), H in Sylvester's order, n a power of two (ValueError otherwise); orthogonal.

    H = [[H', H'], [H', -H']], so it is its own transpose, and applying the function twice gives x back. fp32 inside, in
    log2(n) rounds of sums and differences whose order depends on n alone; returns x's dtype.
    """
    n = x.shape[-1]
    if n & (n - 1) or n == 0:
        raise ValueError(f"the Hadamard rotation needs a power of two, got {n} channels")
    y = upcast(x)
    half = 1
    while half < n:
        pairs = y.unflatten(-1, (-1, 2, half))
        low, high = pairs.unbind(-2)
        y = torch.stack([low + high, low - high], dim=-2).flatten(-3)
        half *= 2
    return (y * n**-0.5).to(x.dtype)
