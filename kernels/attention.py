"""Attention of V4's three layer kinds: one softmax over window rows, compressed entries and a sink."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import fused
from .places import Seen
from .rope import apply_rope
from .upcast import upcast


def attend(
    q: Tensor,
    rows: Tensor,
    entries: Tensor | None,
    sinks: Tensor,
    seen: Seen,
    chosen: Tensor | None = None,
    rotation: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Multi-query attention with K = V (paper 2.3; DeepSeek's code). Scale D^-0.5.

    q [T, H, D]; rows [R, D] and entries [N, D], each both key and value; sinks [H]: exp(sink) joins the softmax's
    denominator and carries no value. `seen` says which rows and entries a query sees, `chosen` int32 [T, K] which of
    its n complete entries, if not all: min(n, K) of them, by number, rising, and behind them -1. What a query does not
    see has to be finite all the same: it may be multiplied by 0.
    `rotation` complex64 [T, pairs], if given, is taken off the last channels of what a query reads: values carry their
    keys' RoPE. Returns [T, H, D] in q's dtype, and what `head_mass` needs, if anything: the denominators' logarithms.
    """
    if fused(q):
        from .fused.attention import Attend

        return Attend.apply(q, rows, entries, sinks, seen, chosen, rotation)  # pyright: ignore[reportReturnType]
    out = reference_attend(q, rows, entries, sinks, seen, chosen)
    return out if rotation is None else apply_rope(out, rotation, inverse=True), None


@torch.no_grad()
def head_mass(
    q: Tensor, rows: Tensor, entries: Tensor, sinks: Tensor, seen: Seen, chosen: Tensor, lse: Tensor | None
) -> Tensor:
    """The probability that `attend`'s softmax gives each chosen entry, summed over heads: fp32 [T, K].

    Arguments as there, `lse` what it returned. A query's sum over all that it sees is H minus what the sinks take. No
    gradient: it is the target of the indexer's loss.
    """
    if fused(q):
        from .fused.indexer import mass

        assert lse is not None
        return mass(q, entries, lse, seen, chosen)
    return reference_head_mass(q, rows, entries, sinks, seen, chosen)


def reference_attend(
    q: Tensor, rows: Tensor, entries: Tensor | None, sinks: Tensor, seen: Seen, chosen: Tensor | None
) -> Tensor:
    """The definition, for any device: fp32 scores and softmax, reduced over all keys of a block at once."""
    keys, visible = keys_of_blocks(rows, entries, seen, chosen)
    queries, keys = seen.blocks.in_blocks(q), upcast(keys)
    n, m, heads, dim = queries.shape
    weights, sink = _weights(queries, keys, visible, sinks)
    # A further channel of ones sums the weights in the values' order: one after another, whatever zeros lie between.
    sums = torch.bmm(weights.view(n, m * heads, -1), F.pad(keys, (0, 1), value=1.0)).view(n, m, heads, dim + 1)
    return seen.blocks.from_blocks((sums[..., :dim] / (sums[..., dim:] + sink)).to(q.dtype))


def reference_head_mass(q: Tensor, rows: Tensor, entries: Tensor, sinks: Tensor, seen: Seen, chosen: Tensor) -> Tensor:
    keys, visible = keys_of_blocks(rows, entries, seen, chosen)
    weights, sink = _weights(seen.blocks.in_blocks(q), upcast(keys), visible, sinks)
    mass = (weights / (weights.sum(-1, keepdim=True) + sink)).sum(2)
    columns = columns_of(chosen, seen)
    window = keys.shape[1] - seen.blocks.complete(entries, seen.ratio)[1].shape[2]
    mass = mass[..., window:].gather(2, columns.clamp(min=0)).masked_fill(columns < 0, 0.0)
    return seen.blocks.from_blocks(mass)


def keys_of_blocks(rows: Tensor, entries: Tensor | None, seen: Seen, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
    """The keys [Q, S, D] of each block of queries, window rows first, and which each sees: bool [Q, M, S]."""
    keys, visible = seen.blocks.keys(rows)
    if entries is None:
        return keys, visible
    more, complete = seen.blocks.complete(entries, seen.ratio)
    if chosen is not None:
        columns, width = columns_of(chosen, seen), complete.shape[2]
        mask = complete.new_zeros(*complete.shape[:2], width + 1)
        complete = complete & mask.scatter_(2, columns.where(columns >= 0, width), True)[..., :width]
    return torch.cat([keys, more], dim=1), torch.cat([visible, complete], dim=2)


def columns_of(chosen: Tensor, seen: Seen) -> Tensor:
    """Of numbers [T, K] the places among a block's entries, int64 [Q, M, K]; -1 for none."""
    numbers = seen.blocks.in_blocks(chosen.long() + 1) - 1  # a query that is none has chosen nothing
    return (numbers + seen.blocks.column(seen.ratio).unsqueeze(-1)).where(numbers >= 0, -1)


def _weights(q: Tensor, keys: Tensor, visible: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax before its division: the rows' weights [Q, M, H, S] and the sinks' [Q, M, H, 1], fp32 as `keys`."""
    n, m, heads, dim = q.shape
    queries = (upcast(q) * dim**-0.5).reshape(n, m * heads, dim)
    scores = torch.bmm(queries, keys.transpose(1, 2)).view(n, m, heads, -1)
    scores = scores.masked_fill(~visible.unsqueeze(2), float("-inf"))
    sinks = upcast(sinks).view(1, 1, heads, 1)
    # The sink keeps the maximum finite where no row is visible; the result does not depend on the shift.
    shift = torch.maximum(scores.detach().amax(-1, keepdim=True), sinks.detach())
    return torch.exp(scores - shift), torch.exp(sinks - shift)
