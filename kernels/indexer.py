"""The lightning indexer: which compressed entries a query of a CSA layer attends to, and the loss that trains it."""

import torch
from torch import Tensor

from .attention import columns_of
from .dispatch import fused
from .places import Seen
from .upcast import upcast


@torch.no_grad()
def select(q: Tensor, weights: Tensor, keys: Tensor, seen: Seen, topk: int, dtype: torch.dtype | None = None) -> Tensor:
    """The `topk` complete entries with the highest index scores: their numbers int32 [T, K], rising, -1 behind them.

    q [T, H, D], weights [T, H], keys [N, D]. Score of entry s for a query: sum over heads of weight * ReLU(q . k), fp32
    (paper 2.3.1; the scale D^-0.5 H^-0.5 is in `weights`), rounded to `dtype` if one is given (bf16 in V4's
    quantization-aware training). Exact ties go to the lowest s, so that the choice depends neither on the batch nor on
    the cache. No gradient: the choice is discrete, and V4's language-model loss does not reach the indexer.
    """
    if fused(q):
        from .fused.indexer import select

        return select(q, weights, keys, seen, topk, dtype)
    return reference_select(q, weights, keys, seen, topk, dtype)


def index_scores(q: Tensor, weights: Tensor, keys: Tensor, seen: Seen, chosen: Tensor) -> Tensor:
    """The scores of the entries `chosen` [T, K], as `select` compares them but never rounded, with their gradient.

    fp32 [T, K], -inf where nothing is chosen; arguments as there.
    """
    if fused(q):
        from .fused.indexer import IndexScores

        return IndexScores.apply(q, weights, keys, chosen, seen)  # pyright: ignore[reportReturnType]
    return reference_index_scores(q, weights, keys, seen, chosen)


def index_kl(scores: Tensor, mass: Tensor) -> Tensor:
    """KL(p || softmax of the index scores) over each query's chosen entries: fp32 [T], the indexer's own loss.

    scores fp32 [T, K], -inf where nothing is chosen; mass [T, K], attention's probabilities summed over heads
    (`head_mass`). The gradient goes to `scores` alone. p is `mass` over the chosen entries, divided by its sum: the
    loss of DeepSeek-V3.2's sparse training stage (its report, 2.1.1); V4 is silent. V4's softmax also has window rows
    and a sink; our choice is not to normalize each head without them, so that a head which looks into the window, or
    has its mass in the sink, weighs little in p. 0, with no gradient, where fewer than two entries are chosen or the
    chosen ones' mass underflows.
    """
    chosen = scores.detach() > float("-inf")
    mass = upcast(mass.detach()).masked_fill(~chosen, 0.0)
    total = mass.sum(-1, keepdim=True)
    target = mass / total.where(total > 0, 1.0)
    # A query without a target gets scores that are finite: a softmax over none would be NaN.
    scores = scores.where(chosen | (total > 0), 0.0)
    logs = torch.log_softmax(scores, -1).masked_fill(~chosen, 0.0)
    return (torch.xlogy(target, target) - target * logs).sum(-1)


@torch.no_grad()
def reference_select(
    q: Tensor, weights: Tensor, keys: Tensor, seen: Seen, topk: int, dtype: torch.dtype | None = None
) -> Tensor:
    scores, complete = _scores(q, weights, keys, seen)
    scores = scores.to(dtype or scores.dtype).masked_fill(~complete, float("-inf"))
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    none = complete.shape[2]
    best = best.where(complete.gather(2, best), none).sort(dim=-1).values
    numbers = (best - seen.blocks.column(seen.ratio).unsqueeze(-1)).where(best < none, -1)
    return seen.blocks.from_blocks(numbers.int())


def reference_index_scores(q: Tensor, weights: Tensor, keys: Tensor, seen: Seen, chosen: Tensor) -> Tensor:
    scores, _ = _scores(q, weights, keys, seen)
    columns = columns_of(chosen, seen)
    picked = scores.gather(2, columns.clamp(min=0)).masked_fill(columns < 0, float("-inf"))
    return seen.blocks.from_blocks(picked)


def _scores(q: Tensor, weights: Tensor, keys: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
    """Scores fp32 [Q, M, E] of all entries of the blocks, and which are complete at each query."""
    q, weights = seen.blocks.in_blocks(q), seen.blocks.in_blocks(weights)
    of_blocks, complete = seen.blocks.complete(keys, seen.ratio)
    n, m, heads, dim = q.shape
    dots = torch.bmm(upcast(q).reshape(n, m * heads, dim), upcast(of_blocks).transpose(1, 2)).relu_()
    return (dots.view(n, m, heads, -1) * upcast(weights).unsqueeze(-1)).sum(2), complete
