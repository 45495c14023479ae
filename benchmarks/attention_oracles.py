"""Attention's operations written plainly, for float64 and autograd: what attention_accuracy.py holds the kernels to.

Nothing here is the package's arithmetic; only its `Seen` and `Windows` are read, which say where things lie. Shapes: T
queries, H heads, D channels, R window rows, N entries, S of both, K chosen entries.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from amalgam.kernels.places import Seen, Windows

SOME = 64  # queries whose scores with every key stand in memory at once


def entries_seen(seen: Seen, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which entries each query sees: their places int64 [T, K] among all, and which of the K are there."""
    assert seen.entry_first is not None
    if chosen is None:
        count = (seen.position.long() + 1).unsqueeze(1) // seen.ratio
        number = torch.arange(seen.most, device=count.device).expand(len(count), -1)
        real = number < count
    else:
        number, real = chosen.long(), chosen >= 0
    first = seen.entry_first.long().unsqueeze(1)
    if seen.table is None:
        return first + number, real
    number = number.clamp(min=0)
    return seen.table[first + number // seen.page].long() * seen.page + number % seen.page, real


def marked(places: Tensor, real: Tensor, count: int) -> Tensor:
    """bool [T, count]: True at those places [T, K] that are real."""
    mask = torch.zeros(len(places), count + 1, dtype=torch.bool, device=places.device)
    return mask.scatter_(1, places.where(real, count), True)[:, :count]


def keys_seen(seen: Seen, chosen: Tensor | None, rows: int, entries: int) -> Tensor:
    """bool [T, S]: which of all window rows, and of all entries behind them, each query sees."""
    number = seen.position.long().unsqueeze(1) - torch.arange(seen.window, device=seen.position.device)
    place = seen.row_first.long().unsqueeze(1) + (number % seen.slots if seen.slots else number)
    real = number >= 0
    if entries:
        further, there = entries_seen(seen, chosen)
        place, real = torch.cat([place, rows + further], 1), torch.cat([real, there], 1)
    return marked(place, real, rows + entries)


def probabilities(q: Tensor, keys: Tensor, sinks: Tensor, mask: Tensor) -> Tensor:
    """[T, H, S]: the softmax over a query's keys and its head's sink, without the sink's own."""
    scores = torch.einsum("thd,sd->ths", q, keys) * q.shape[2] ** -0.5
    scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
    sinks = sinks.view(1, -1, 1).expand(len(q), -1, -1)
    return torch.softmax(torch.cat([scores, sinks], 2), 2)[..., :-1]


def attend(
    seen: Seen,
    chosen: Tensor | None,
    rotation: Tensor | None,
    q: Tensor,
    rows: Tensor,
    sinks: Tensor,
    entries: Tensor | None = None,
) -> Tensor:
    keys = rows if entries is None else torch.cat([rows, entries])

    def of_some(q: Tensor, keys: Tensor, sinks: Tensor, mask: Tensor) -> Tensor:
        return torch.einsum("ths,sd->thd", probabilities(q, keys, sinks, mask), keys)

    masks = keys_seen(seen, chosen, len(rows), len(keys) - len(rows)).split(SOME)
    parts = [  # computed again for the backward: the scores of all queries would not fit
        checkpoint(of_some, some, keys, sinks, mask, use_reentrant=False)
        for some, mask in zip(q.split(SOME), masks, strict=True)
    ]
    out = torch.cat(parts)
    return out if rotation is None else rope(out, rotation.conj())


def head_mass(seen: Seen, chosen: Tensor, q: Tensor, rows: Tensor, sinks: Tensor, entries: Tensor) -> Tensor:
    masks = keys_seen(seen, chosen, len(rows), len(entries)).split(SOME)
    keys = torch.cat([rows, entries])
    summed = [probabilities(some, keys, sinks, mask).sum(1) for some, mask in zip(q.split(SOME), masks, strict=True)]
    place, real = entries_seen(seen, chosen)
    return torch.cat(summed)[:, len(rows) :].gather(1, place.where(real, 0)) * real


def index_products(seen: Seen, chosen: Tensor, q: Tensor, keys: Tensor) -> Tensor:
    """[T, K, H]: each head's product with the chosen entries; whatever where none is chosen."""
    place, real = entries_seen(seen, chosen)
    return torch.einsum("thd,tkd->tkh", q, keys[place.where(real, 0)])


def index_scores(seen: Seen, chosen: Tensor, q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """[T, K], 0 where none is chosen."""
    products = index_products(seen, chosen, q, keys)
    return (products.clamp(min=0) * weights.unsqueeze(1)).sum(2) * (chosen >= 0)


def all_index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """[T, N], of whatever documents."""
    some = zip(q.split(SOME), weights.split(SOME), strict=True)
    return torch.cat(
        [torch.einsum("thn,th->tn", torch.einsum("thd,nd->thn", a, keys).clamp(min=0), w) for a, w in some]
    )


def rope(x: Tensor, rotation: Tensor) -> Tensor:
    """x [T, ..., D]: pairs of the last channels, as complex numbers, times rotation complex [T, pairs]."""
    plain, turned = x.split([x.shape[-1] - 2 * rotation.shape[-1], 2 * rotation.shape[-1]], dim=-1)
    a, b = turned[..., 0::2], turned[..., 1::2]
    shape = [len(x), *[1] * (x.dim() - 2), rotation.shape[-1]]
    cos, sin = rotation.real.to(x.dtype).view(shape), rotation.imag.to(x.dtype).view(shape)
    return torch.cat([plain, torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)], dim=-1)


def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight


def compress(windows: Windows, eps: float, values: Tensor, scores: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    """Entries [N, D] of a pack; with twice the channels an entry also has the first half of the window before's."""
    ratio, dim = len(bias), len(weight)
    number, token = windows.number.long(), torch.arange(ratio, device=bias.device)
    own = (windows.first.long() + number * ratio).unsqueeze(1) + token
    v, s = values[own], scores[own] + bias
    if values.shape[1] > dim:
        there = (number > 0).view(-1, 1, 1)
        before = (own - ratio).where(there.squeeze(2), own)
        of_before = (scores[before] + bias)[..., :dim].masked_fill(~there, float("-inf"))
        v = torch.cat([values[before][..., :dim], v[..., dim:]], 1)
        s = torch.cat([of_before, s[..., dim:]], 1)
    return rope(norm((torch.softmax(s, 1) * v).sum(1), weight, eps), windows.rotation)
