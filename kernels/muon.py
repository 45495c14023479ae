"""Muon as V4 was pretrained with it (paper 2.4): its update of matrices, on plain tensors.

A matrix here is whatever is orthogonalized by itself: one expert, one half of a fused projection. Tensors
[..., n, m] hold many; views do (`gate_up.unflatten(1, (2, -1))`). What of a model is a matrix is `model/matrices.py`'s
to say, what goes to AdamW and who holds whole matrices the learner's (`rl/optimizer.py`, `rl/shards.py`).
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Eight steps that bring every singular value near 1, and two that bring it to 1: a, b, c of a X + b XXᵀX + c (XXᵀ)²X.
STEPS = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
GAIN = 0.18  # of an update's root mean square, AdamW's: one learning rate serves both
BATCH = 1 << 28  # numbers that are orthogonalized together, unless one tensor has more


def newton_schulz(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Each matrix of x [..., n, m] with its singular values brought to 1, in `dtype`; zeros stay zeros.

    It is scaled by its Frobenius norm first (in x's dtype). A singular value 1e5 times smaller than the largest gets no
    further than 0.17.
    """
    tall = x.shape[-2] > x.shape[-1]
    y = x.reshape(-1, *x.shape[-2:])
    y = y.mT if tall else y
    norm = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True)
    y = (y / norm.clamp_min(torch.finfo(x.dtype).tiny)).to(dtype)
    for a, b, c in STEPS:
        gram = torch.bmm(y, y.mT)
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).reshape(x.shape)


@torch.no_grad()
def to_updates(matrices: Sequence[Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
    """Each matrix of fp32 [..., n, m] becomes its update, in place: GAIN sqrt(max(n, m)) times `newton_schulz` of it.

    Matrices of one shape are orthogonalized together, up to BATCH numbers.
    """
    for group in _alike(matrices):
        n, m = group[0].shape[-2:]
        flat = [x.reshape(-1, n, m) for x in group]
        found = newton_schulz(torch.cat(flat) if len(flat) > 1 else flat[0], dtype)
        for x, update in zip(group, found.split([len(x) for x in flat]), strict=True):
            x.copy_(update.view(x.shape)).mul_(GAIN * max(n, m) ** 0.5)


@torch.no_grad()
def muon_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    updates: Callable[[Sequence[Tensor]], None] = to_updates,
) -> None:
    """One step in place, of fp32 weights and momenta [..., n, m], each dimension before the last two a batch.

    Momentum M = momentum M + G; the weight becomes W (1 - lr weight_decay) - lr U, with U the update of
    G + momentum M (Nesterov), which `updates` puts in its place. The gradients are overwritten by U. All else goes by
    element, so that tensors may hold matrices in any shape, or parts of them, that `updates` knows.
    """
    for gradient, held in zip(gradients, momenta, strict=True):
        held.mul_(momentum).add_(gradient)
        gradient.add_(held, alpha=momentum)
    updates(gradients)
    for weight, update in zip(weights, gradients, strict=True):
        weight.mul_(1 - lr * weight_decay).sub_(update, alpha=lr)


def _alike(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors whose matrices have one shape, up to BATCH numbers together."""
    groups: dict[torch.Size, list[Tensor]] = {}
    sizes: dict[torch.Size, int] = {}
    for tensor in tensors:
        shape = tensor.shape[-2:]
        if sizes.get(shape, 0) + tensor.numel() > BATCH and shape in groups:
            yield groups.pop(shape)
            sizes[shape] = 0
        groups.setdefault(shape, []).append(tensor)
        sizes[shape] = sizes.get(shape, 0) + tensor.numel()
    yield from groups.values()
