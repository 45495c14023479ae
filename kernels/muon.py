"""Muon as V4 was pretrained with it (paper 2.4): its update of matrices, on plain tensors.

A matrix here is whatever is orthogonalized by itself: one expert, one half of a fused projection. Tensors
[..., n, m] hold many; views do (`gate_up.unflatten(1, (2, -1))`). What of a model is a matrix, what goes to AdamW, and
where a sharded learner holds whole matrices is the caller's to say; no learner of this package does so yet.
"""

from collections.abc import Iterator, Sequence

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
def muon_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """One step in place, of weights and momenta [..., n, m] in fp32, each dimension before the last two a batch.

    Momentum M = momentum M + G; with O the orthogonalized G + momentum M (Nesterov), the weight becomes
    W (1 - lr weight_decay) - lr GAIN sqrt(max(n, m)) O. Matrices of one shape are orthogonalized together.
    """
    for held, gradient in zip(momenta, gradients, strict=True):
        held.mul_(momentum).add_(gradient)
    for group in _alike(weights):
        n, m = weights[group[0]].shape[-2:]
        ahead = [gradients[i].add(momenta[i], alpha=momentum).reshape(-1, n, m) for i in group]
        flat = newton_schulz(torch.cat(ahead) if len(ahead) > 1 else ahead[0], dtype)
        for i, update in zip(group, flat.split([len(x) for x in ahead]), strict=True):
            weights[i].mul_(1 - lr * weight_decay)
            weights[i].sub_(update.reshape(weights[i].shape), alpha=lr * GAIN * max(n, m) ** 0.5)


def _alike(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Numbers of tensors whose matrices have one shape, up to BATCH numbers together."""
    groups: dict[torch.Size, list[int]] = {}
    for i, tensor in enumerate(tensors):
        group = groups.setdefault(tensor.shape[-2:], [])
        if group and sum(tensors[j].numel() for j in group) + tensor.numel() > BATCH:
            yield groups.pop(tensor.shape[-2:])
            group = groups.setdefault(tensor.shape[-2:], [])
        group.append(i)
    yield from groups.values()
