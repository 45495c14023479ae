"""Mixture of experts: routing, and the clamped SwiGLU of the chosen experts without padding or capacity."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import fused
from .project import LANES, project
from .swiglu import swiglu
from .upcast import upcast

_W = TypeVar("_W")


def route(
    logits: Tensor, *, topk: int, scaling: float,
    bias: Tensor | None = None, chosen: Tensor | None = None, tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Expert ids int64 [T, k] and their weights fp32 [T, k] by what the gate gives in fp32, logits [T, E] (paper 2.1;
    DeepSeek's code).

    Affinity s = sqrt(softplus(logits)). Ids: the `topk` highest s + bias, ties to the lowest id; or `chosen` [T, k]
    (hash layers, replay), where a row that holds -1 falls back to the learned choice; of `tokens` int64 [T], if they
    are given, the rows in `chosen`, which is then a hash layer's table. Weights never see the bias: s / (sum of the
    chosen s + 1e-20) * scaling; with replayed ids they are recomputed, so the gate gets gradient.
    """
    if fused(logits):
        from .fused.router import Route

        return Route.apply(logits, bias, chosen, tokens, topk, scaling)  # pyright: ignore[reportReturnType]
    if chosen is not None and tokens is not None:
        chosen = chosen[tokens]
    if chosen is None or bool((chosen < 0).any()):
        scores = _affinity(logits.detach())
        order = (scores if bias is None else scores + upcast(bias)).sort(dim=-1, descending=True, stable=True)
        ids = order.indices[:, :topk]
        if chosen is not None:
            ids = torch.where((chosen < 0).any(-1, keepdim=True), ids, chosen)
    else:
        ids = chosen
    picked = _affinity(logits.gather(1, ids))
    return ids, picked / (picked.sum(-1, keepdim=True) + 1e-20) * scaling


def _affinity(logits: Tensor) -> Tensor:
    """sqrt(softplus(logits [T, N])), with a finite gradient where softplus underflows (logits below about -100)."""
    rows = F.pad(logits, (0, 0, 0, -logits.shape[0] % LANES))
    return F.softplus(rows).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()[: logits.shape[0]]


def experts(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float, shared: Tensor | None = None
) -> Tensor:
    """Sum over the k chosen experts of down_e(weight * swiglu(gate_up_e x)); x [T, d], ids, weights [T, k] -> [T, d].

    gate_up [E, 2I, d], down [E, d, I]. The weight multiplies before the down projection and slots are added in order,
    and all between the two products is fp32, as in DeepSeek's code. Tokens are sorted by expert (stably), each expert
    with tokens does two products in x's dtype. Returns fp32; or, with what the `shared` expert gave [T, d] added to it,
    x's dtype.
    """
    if fused(x):
        from .fused.moe import Experts

        keep = torch.is_grad_enabled() and any(a.requires_grad for a in (x, weights, gate_up, down))
        return Experts.apply(x, ids, weights, gate_up, down, shared, limit, keep)  # pyright: ignore[reportReturnType]
    routed = reference_experts(x, ids, weights, gate_up.unbind(0), down.unbind(0), limit, project)
    return routed if shared is None else (routed + upcast(shared)).to(x.dtype)


def reference_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up_weights: Sequence[_W],
    down_weights: Sequence[_W],
    limit: float,
    product: Callable[[Tensor, _W], Tensor],
) -> Tensor:
    """The definition. `product` takes rows of tokens and an expert's weight, of whatever kind."""
    tokens, k = ids.shape
    order = ids.flatten().argsort(stable=True)
    counts = torch.bincount(ids.flatten(), minlength=len(up_weights)).tolist()
    used = [e for e, count in enumerate(counts) if count]
    sizes = [counts[e] for e in used]
    inputs = x.index_select(0, order // k).split(sizes)
    gate_up = torch.cat([product(rows, up_weights[e]) for e, rows in zip(used, inputs, strict=True)])
    hidden = (swiglu(upcast(gate_up), limit) * weights.flatten()[order].unsqueeze(-1)).to(x.dtype).split(sizes)
    outputs = torch.cat([product(rows, down_weights[e]) for e, rows in zip(used, hidden, strict=True)])
    slots = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return upcast(outputs.index_select(0, slots).view(tokens, k, -1)).sum(1)
