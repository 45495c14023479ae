"""Products with a weight, in which a row's result does not depend on how many other rows there are."""

import torch.nn.functional as F
from torch import Tensor

FEW = 4
LANES = 16  # fp32 numbers of the widest vector registers: an elementwise loop may treat a rest in another way


def filled(x: Tensor, rows: int = FEW) -> Tensor:
    """x [T, ...] with zeros for further rows up to `rows`.

    Our choice, for CPUs: with fewer rows oneMKL takes another kernel, whose sums have another order.
    """
    missing = rows - x.shape[0]
    return F.pad(x, [0, 0] * (x.dim() - 1) + [0, missing]) if missing > 0 else x


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., i] times weight [o, i] -> [..., o]."""
    if x.shape[:-1].numel() >= FEW:
        return F.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    return F.linear(filled(rows), weight)[: rows.shape[0]].view(*x.shape[:-1], weight.shape[0])
