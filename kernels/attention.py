"""Attention of V4's three layer kinds: one softmax over window rows, compressed rows and a sink."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .upcast import upcast


def attend(q: Tensor, rows: Tensor, visible: Tensor, sinks: Tensor) -> Tensor:
    """Multi-query attention with K = V over blocks of queries that share a set of rows (paper 2.3; DeepSeek's code).

    q [N, M, H, D]; rows [N, S, D], both keys and values; visible [N, M, S] bool; sinks [H]: exp(sink) joins the
    softmax's denominator and carries no value. Scale D^-0.5. Returns [N, M, H, D] in q's dtype; a query that sees
    nothing gets zeros. Training passes blocks of one window's length, decoding blocks of one query: the same function
    of one token and its visible past.
    """
    return reference_attend(q, rows, visible, sinks)


@torch.no_grad()
def head_mass(q: Tensor, rows: Tensor, visible: Tensor, sinks: Tensor) -> Tensor:
    """The probability that `attend`'s softmax gives each row, summed over heads: fp32 [N, M, S], arguments as there.

    A query's sum over its rows is H minus what the sinks take. No gradient: it is the target of the indexer's loss.
    """
    return reference_head_mass(q, rows, visible, sinks)


def reference_attend(q: Tensor, rows: Tensor, visible: Tensor, sinks: Tensor) -> Tensor:
    """The definition, for any device: fp32 scores and softmax, reduced over all S rows at once."""
    n, m, heads, dim = q.shape
    keys = upcast(rows)
    weights, sink = _weights(q, keys, visible, sinks)
    # A further channel of ones sums the weights in the values' order: one after another, whatever zeros lie between.
    sums = torch.bmm(weights.view(n, m * heads, -1), F.pad(keys, (0, 1), value=1.0)).view(n, m, heads, dim + 1)
    return (sums[..., :dim] / (sums[..., dim:] + sink)).to(q.dtype)


def reference_head_mass(q: Tensor, rows: Tensor, visible: Tensor, sinks: Tensor) -> Tensor:
    weights, sink = _weights(q, upcast(rows), visible, sinks)
    return (weights / (weights.sum(-1, keepdim=True) + sink)).sum(2)


def _weights(q: Tensor, keys: Tensor, visible: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax before its division: the rows' weights [N, M, H, S] and the sinks' [N, M, H, 1], fp32 as `keys`."""
    n, m, heads, dim = q.shape
    queries = (upcast(q) * dim**-0.5).reshape(n, m * heads, dim)
    scores = torch.bmm(queries, keys.transpose(1, 2)).view(n, m, heads, -1)
    scores = scores.masked_fill(~visible.unsqueeze(2), float("-inf"))
    sinks = upcast(sinks).view(1, 1, heads, 1)
    # The sink keeps the maximum finite where no row is visible; the result does not depend on the shift.
    shift = torch.maximum(scores.detach().amax(-1, keepdim=True), sinks.detach())
    return torch.exp(scores - shift), torch.exp(sinks - shift)
