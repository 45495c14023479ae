"""Causal attention of models other than V4, over one contiguous past: grouped heads, windows, caps, sinks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .upcast import upcast


def attend_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None = None,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Queries q [B, H, N, D] over keys k [B, G, S, D] and values v [B, G, S, D'], G dividing H -> [B, H, N, D'].

    Key j stands at position j; the queries at `position` int64 [B, N], or, where that is None, N = S and query i at i.
    A query at p sees keys max(0, p - window + 1) to p, at least one. Scores q k `scaling`, then
    softcap tanh(score / softcap) (Gemma 2's report, 2.1); exp(sinks [H]) joins the denominator (gpt-oss).
    """
    plain = position is None and (window is None or window >= k.shape[2])
    if softcap is None and sinks is None:
        mask = None if plain else _visible(position, q, k, window)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=plain, scale=scaling, enable_gqa=True)
    return reference_attend_causal(q, k, v, position, scaling=scaling, window=window, softcap=softcap, sinks=sinks)


def reference_attend_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The definition: fp32 scores and softmax; the result in q's dtype."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = upcast(q) @ upcast(k).transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(position, q, k, window), float("-inf"))
    if sinks is not None:
        column = upcast(sinks).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[2]]
    return (weights @ upcast(v)).to(q.dtype)


def _visible(position: Tensor | None, q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """bool [B, 1, N, S]."""
    keys = torch.arange(k.shape[2], device=q.device)
    at = (keys[: q.shape[2]].unsqueeze(0) if position is None else position).unsqueeze(-1)
    visible = keys <= at
    if window is not None:
        visible &= keys > at - window
    return visible.unsqueeze(1)
