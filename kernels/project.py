"""Products with a weight, in which a row's result does not depend on how many other rows there are."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import fused
from .swiglu import gated
from .upcast import upcast

FEW = 4
MANY = 512  # rows from which launches do not matter
LANES = 16  # fp32 numbers of the widest vector registers: an elementwise loop may treat a rest in another way


def filled(x: Tensor, rows: int = FEW) -> Tensor:
    """x [T, ...] with zeros for further rows up to `rows`.

    Our choice, for CPUs: with fewer rows oneMKL takes another kernel, whose sums have another order.
    """
    missing = rows - x.shape[0]
    return F.pad(x, [0, 0] * (x.dim() - 1) + [0, missing]) if missing > 0 else x


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., i] times weight [o, i] -> [..., o], in x's dtype."""
    if fused(x):
        from .fused.linear import Linear

        return Linear.apply(x.flatten(0, -2), weight, 1, False).unflatten(0, x.shape[:-1])  # pyright: ignore
    return reference_project(x, weight)


def project_wide(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, i] times weight [o, i] -> [T, o] in fp32: the products of bf16 operands are exact, and none is rounded."""
    if fused(x):
        from .fused.linear import Linear

        return Linear.apply(x, weight, 1, True)  # pyright: ignore[reportReturnType]
    return reference_project(upcast(x), upcast(weight))


def project_groups(x: Tensor, weight: Tensor) -> Tensor:
    """Block-diagonal: x [T, G, i] times a block of weight [G o, i] for each group -> [T, G, o]."""
    if fused(x):
        from .fused.linear import Linear

        groups = x.shape[1]
        return Linear.apply(x.flatten(1), weight, groups, False).unflatten(1, (groups, -1))  # pyright: ignore
    blocks = weight.unflatten(0, (x.shape[1], -1))
    return torch.bmm(filled(x).transpose(0, 1), blocks.transpose(1, 2)).transpose(0, 1)[: x.shape[0]]


class Into(NamedTuple):
    """Where the rows of a result are written: row r to row `at[r]` of `rows`, or to row r where there is no `at`."""

    rows: Tensor  # [R, C], or so many columns of a wider tensor
    at: Tensor | None = None  # int64 [T]

    def write(self, new: Tensor) -> Tensor:
        """Returns `rows`."""
        return self.rows.copy_(new) if self.at is None else self.rows.index_copy_(0, self.at, new)


class Product(NamedTuple):
    """One of `project_each`, with this weight [o, i]; as that of `project_wide`, if `wide`."""

    weight: Tensor
    wide: bool = False
    scale: float | None = None  # what `project` gives, then in fp32, is multiplied by it
    into: Into | None = None
    up: Tensor | None = None  # a second weight [o, i]: `gated` of what `project` gives with both
    limit: float = 0.0  # of that


def few(x: Tensor) -> bool:
    """Whether operations on x [T, ...] are kernels that take less time than their launches, and have no gradient."""
    return x.shape[0] <= MANY and not torch.is_grad_enabled() and fused(x)


def project_each(x: Tensor, products: Sequence[Product]) -> list[Tensor]:
    """x [T, i] times each weight, or the rows that this was written into. No gradient. Few rows are one launch."""
    if products and x.shape[0] and few(x):
        from .fused.linear_each import multiply_each

        return multiply_each(x, products)
    return [_alone(x, *each) for each in products]


def _alone(
    x: Tensor, weight: Tensor, wide: bool, scale: float | None, into: Into | None, up: Tensor | None, limit: float
) -> Tensor:
    if up is not None:
        made = gated(project(x, torch.cat([weight, up])), limit)
    else:
        made = project_wide(x, weight) if wide else project(x, weight)
    made = made if scale is None else upcast(made) * scale
    return made if into is None else into.write(made)


def reference_project(x: Tensor, weight: Tensor) -> Tensor:
    if x.shape[:-1].numel() >= FEW:
        return F.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    return F.linear(filled(rows), weight)[: rows.shape[0]].view(*x.shape[:-1], weight.shape[0])
