"""The lightning indexer: which compressed entries a query of a CSA layer attends to, and the loss that trains it."""

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


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """The scores fp32 [N, M, S] that `select` compares, not rounded and with their gradient; arguments as there."""
    return reference_index_scores(q, weights, keys)


def index_kl(scores: Tensor, chosen: Tensor, mass: Tensor) -> Tensor:
    """KL(p || softmax of the index scores) over each query's chosen entries: fp32 [N, M], the indexer's own loss.

    scores fp32 [N, M, S]; chosen [N, M, S] bool; mass [N, M, S], attention's probabilities summed over heads
    (`head_mass`). The gradient goes to `scores` alone. p is `mass` over the chosen entries, divided by its sum: the
    loss of DeepSeek-V3.2's sparse training stage (its report, 2.1.1); V4 is silent. V4's softmax also has window rows
    and a sink; our choice is not to normalize each head without them, so that a head which looks into the window, or
    has its mass in the sink, weighs little in p. 0, with no gradient, where fewer than two entries are chosen or the
    chosen ones' mass underflows.
    """
    return reference_index_kl(scores, chosen, mass)


@torch.no_grad()
def reference_select(
    q: Tensor, weights: Tensor, keys: Tensor, visible: Tensor, topk: int, dtype: torch.dtype | None = None
) -> Tensor:
    return highest(reference_index_scores(q, weights, keys), visible, topk, dtype)


def highest(scores: Tensor, visible: Tensor, topk: int, dtype: torch.dtype | None = None) -> Tensor:
    """`select` where the scores [N, M, S] are at hand."""
    scores = scores.detach().to(dtype or scores.dtype).masked_fill(~visible, float("-inf"))
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    return torch.zeros_like(visible).scatter_(-1, best, True) & visible


def reference_index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    n, m, heads, dim = q.shape
    dots = torch.bmm(upcast(q).reshape(n, m * heads, dim), upcast(keys).transpose(1, 2)).relu_()
    return (dots.view(n, m, heads, -1) * upcast(weights).unsqueeze(-1)).sum(2)


def reference_index_kl(scores: Tensor, chosen: Tensor, mass: Tensor) -> Tensor:
    mass = upcast(mass.detach()).masked_fill(~chosen, 0.0)
    total = mass.sum(-1, keepdim=True)
    target = mass / total.where(total > 0, 1.0)
    # A query without a target keeps all its scores, which are finite: a softmax over none would be NaN.
    logs = torch.log_softmax(scores.masked_fill(~chosen & (total > 0), float("-inf")), -1).masked_fill(~chosen, 0.0)
    return (torch.xlogy(target, target) - target * logs).sum(-1)
