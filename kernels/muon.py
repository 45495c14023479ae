"""Muon as V4 was pretrained with it (paper 2.4): its update of matrices, on plain tensors.

A matrix here is whatever is orthogonalized by itself: one expert, one half of a fused projection. Tensors
[..., n, m] hold many; views do (`gate_up.unflatten(1, (2, -1))`). What of a model is a matrix is `model/matrices.py`'s
to say, what goes to AdamW and who holds whole matrices the learner's (`rl/optimizer.py`, `rl/shards.py`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from .adamw import clip_factor
from .dispatch import fused

# Eight steps that bring every singular value near 1, and two that bring it to 1: a, b, c of a X + b XXᵀX + c (XXᵀ)²X.
STEPS = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
GAIN = 0.18  # of an update's root mean square, AdamW's: one learning rate serves both
Run = tuple[int, int, int]  # matrices of one shape that lie one after another: how many, their rows, their columns
BATCH = 1 << 28  # numbers that are orthogonalized together, unless one tensor has more


def newton_schulz(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Each matrix of x [..., n, m] with its singular values brought to 1, in `dtype`; zeros stay zeros.

    It is scaled by its Frobenius norm first. A singular value 1e5 times smaller than the
    largest gets no further than 0.17.
    """
    wide, y = torch.promote_types(x.dtype, torch.float32), x.reshape(-1, *x.shape[-2:])
    norm = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True, dtype=wide)
    y = y.to(dtype) * norm.clamp_min_(torch.finfo(wide).tiny).reciprocal_().to(dtype)
    tall = y.shape[-2] > y.shape[-1]
    for a, b, c in STEPS:
        factor = _factor(y.mT if tall else y, a, b, c)
        y = torch.bmm(y, factor) if tall else torch.bmm(factor, y)
    return y.view(x.shape)


def _factor(y: Tensor, a: float, b: float, c: float) -> Tensor:
    """[B, n, n]: a I + b G + c GG of y [B, n, m] and G = YYᵀ; all are symmetric, and the kernels compute one half."""
    if y.dtype == torch.bfloat16 and fused(y):
        from .fused.symmetric import product, takes

        if takes(y):
            gram = product(y)
            return product(gram, a, b, c)
    gram = torch.bmm(y, y.mT)
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=-2, dim2=-1).add_(a)
    return factor


@torch.no_grad()
def to_updates(matrices: Sequence[Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
    """Each matrix of fp32 [..., n, m] becomes its update, in place: GAIN sqrt(max(n, m)) times `newton_schulz` of it.

    Matrices of one shape are orthogonalized together, up to BATCH numbers.
    """
    for group in ([matrices[i] for i in stack] for stack in stacks(matrices)):
        n, m = group[0].shape[-2:]
        flat = [x.reshape(-1, n, m) for x in group]
        found = newton_schulz(torch.cat(flat) if len(flat) > 1 else flat[0], dtype)
        updates = [part.view(x.shape) for x, part in zip(group, found.split([len(x) for x in flat]), strict=True)]
        torch._foreach_copy_(group, updates)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(group, GAIN * max(n, m) ** 0.5)  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def muon_step(
    masters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    norm: Tensor,
    *,
    runs: Sequence[Sequence[Run]],
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    clip: float,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """One step in place, of fp32 masters and momenta; gradients are bf16 or fp32, and are kept.

    `runs`: of each parameter's matrices (`runs_of`). Newton-Schulz runs in `dtype`.
    `norm`, `clip` and `weights` are those of `adamw.adamw_step`: where the norm is not finite, nothing changes.
    """
    if fused(norm):
        from .fused.muon import muon_step as kernel

        lists = (masters, gradients, momenta, weights)
        return kernel(*lists, norm, runs, lr, momentum, weight_decay, clip, dtype)
    if not norm.isfinite():
        return None
    clipped = [g.to(p.dtype) * clip_factor(norm, clip) for p, g in zip(masters, gradients, strict=True)]

    def updates(tensors: Sequence[Tensor]) -> None:
        to_updates([part for x, each in zip(tensors, runs, strict=True) for part in split(x, each)], dtype)

    step_with(updates, masters, clipped, momenta, lr=lr, momentum=momentum, weight_decay=weight_decay)
    for p, weight in zip(masters, weights, strict=True):
        if weight is not None:
            weight.copy_(p)


@torch.no_grad()
def step_with(
    updates: Callable[[Sequence[Tensor]], None],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
) -> None:
    """One step in place, of fp32 weights and momenta, tensors that hold matrices in any shape, or parts of them.

    Momentum M = momentum M + G; the weight becomes W (1 - lr weight_decay) - lr U, with U the update of
    G + momentum M (Nesterov), which `updates` puts in its place. The gradients are overwritten by U.
    """
    for gradient, held in zip(gradients, momenta, strict=True):
        held.mul_(momentum).add_(gradient)
        gradient.add_(held, alpha=momentum)
    updates(gradients)
    for weight, update in zip(weights, gradients, strict=True):
        weight.mul_(1 - lr * weight_decay).sub_(update, alpha=lr)


def runs_of(matrices: Iterable[tuple[int, int]]) -> list[Run]:
    """The runs of a parameter's matrices, whose rows and columns are given in the order of its memory."""
    return [(len(list(run)), *shape) for shape, run in groupby(matrices)]


def split(x: Tensor, runs: Sequence[Run]) -> list[Tensor]:
    """The runs of a whole parameter, as views."""
    parts = x.view(-1).split([count * n * m for count, n, m in runs])
    return [part.view(run) for part, run in zip(parts, runs, strict=True)]


def stacks(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Numbers of the tensors [..., n, m] that are orthogonalized together: of one shape, up to BATCH numbers."""
    groups: dict[torch.Size, list[int]] = {}
    sizes: dict[torch.Size, int] = {}
    for i, tensor in enumerate(tensors):
        shape = tensor.shape[-2:]
        if sizes.get(shape, 0) + tensor.numel() > BATCH and shape in groups:
            yield groups.pop(shape)
            sizes[shape] = 0
        groups.setdefault(shape, []).append(i)
        sizes[shape] = sizes.get(shape, 0) + tensor.numel()
    yield from groups.values()
