"""The lightning indexer: which compressed entries a query of a CSA layer attends to."""

import torch
from torch import Tensor

from .upcast import upcast


@torch.no_grad()
def select(
    q: Tensor, weights: Tensor, keys: Tensor, visible: Tensor, topk: int, dtype: torch.dtype | None = None
) -> Tensor:
    """The `topk` visible entries with the highest index scores, as a bool mask [N, M, S].

    q [N, M, H, D], weights [N, M, H], keys [N, S, D], visible [N, M, S] bool. Score of entry s for a query:
    sum over heads of weight * ReLU(q . k), fp32 (paper 2.3.1; the scale D^-0.5 H^-0.5 is in `weights`), rounded to
    `dtype` if one is given (bf16 in V4's quantization-aware training). Exact ties go to the lowest s, so that the
    choice depends neither on the batch nor on the cache. No gradient: the choice is discrete, and V4's language-model
    loss does not reach the indexer.
    """
    return reference_select(q, weights, keys, visible, topk, dtype)


@torch.no_grad()
def reference_select(
    q: Tensor, weights: Tensor, keys: Tensor, visible: Tensor, topk: int, dtype: torch.dtype | None = None
) -> Tensor:
    n, m, heads, dim = q.shape
    dots = torch.bmm(upcast(q).reshape(n, m * heads, dim), upcast(keys).transpose(1, 2)).relu_()
    scores = (dots.view(n, m, heads, -1) * upcast(weights).unsqueeze(-1)).sum(2)
    scores = scores.to(dtype or scores.dtype).masked_fill(~visible, float("-inf"))
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    return torch.zeros_like(visible).scatter_(-1, best, True) & visible
