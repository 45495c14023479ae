"""Attention and its parts in loops over tokens, in whatever dtype comes in: what every implementation is held to."""

import itertools

import torch
from torch import Tensor

from amalgam.kernels.places import Seen
from amalgam.kernels.rope import inverse_frequencies
from amalgam.model.layout import Packed, packed


def layout(lengths: list[int], window: int, ratio: int = 0, rope_dim: int = 8) -> Packed:
    """Documents in a pack."""
    frequencies = inverse_frequencies(rope_dim, {"rope_theta": 100.0})
    cu = torch.tensor([0, *itertools.accumulate(lengths)])
    return packed(cu, window, {ratio} - {0}, {"main": frequencies, "compress": frequencies})


def entries_of(place: Packed, ratio: int) -> int:
    return place.entries[ratio].windows.number.numel()


def random_choice(seen: Seen, topk: int) -> Tensor:
    """int32 [T, K]: of each query's complete entries `topk` at random, rising, -1 behind them."""
    chosen = torch.full((seen.position.numel(), topk), -1, dtype=torch.int32)
    for t, position in enumerate(seen.position.tolist()):
        some = torch.randperm((position + 1) // seen.ratio)[:topk].sort().values
        chosen[t, : some.numel()] = some
    return chosen


def numbers_of(seen: Seen, chosen: Tensor | None, t: int) -> list[int]:
    if chosen is not None:
        return [n for n in chosen[t].tolist() if n >= 0]
    return list(range((int(seen.position[t]) + 1) // seen.ratio)) if seen.ratio else []


def keys_of(rows: Tensor, entries: Tensor | None, seen: Seen, chosen: Tensor | None, t: int) -> Tensor:
    """What query t of a pack sees, [S, D]: window rows, then entries."""
    position, first = int(seen.position[t]), int(seen.row_first[t])
    keys = [rows[first + n] for n in range(max(position - seen.window + 1, 0), position + 1)]
    if entries is not None and seen.entry_first is not None:
        keys += [entries[int(seen.entry_first[t]) + n] for n in numbers_of(seen, chosen, t)]
    return torch.stack(keys)


def rope_back(x: Tensor, rotation: Tensor) -> Tensor:
    """x [T, H, D], the last pairs (a, b) of whose channels are turned by minus the angles of rotation [T, pairs]."""
    plain, turned = x.split([x.shape[-1] - 2 * rotation.shape[-1], 2 * rotation.shape[-1]], dim=-1)
    a, b = turned[..., 0::2], turned[..., 1::2]
    cos, sin = rotation.real.unsqueeze(1).to(x.dtype), rotation.imag.unsqueeze(1).to(x.dtype)
    return torch.cat([plain, torch.stack([a * cos + b * sin, b * cos - a * sin], dim=-1).flatten(-2)], dim=-1)


def attend(q: Tensor, rows: Tensor, entries: Tensor | None, sinks: Tensor, seen: Seen, chosen: Tensor | None) -> Tensor:
    result = []
    for t in range(q.shape[0]):
        keys = keys_of(rows, entries, seen, chosen, t)
        scores = torch.cat([q[t] @ keys.t() * q.shape[2] ** -0.5, sinks.unsqueeze(1)], 1)
        result.append(torch.softmax(scores, 1)[:, :-1] @ keys)
    return torch.stack(result)


def head_mass(q: Tensor, rows: Tensor, entries: Tensor, sinks: Tensor, seen: Seen, chosen: Tensor) -> Tensor:
    result = q.new_zeros(chosen.shape)
    for t in range(q.shape[0]):
        keys, count = keys_of(rows, entries, seen, chosen, t), len(numbers_of(seen, chosen, t))
        scores = torch.cat([q[t] @ keys.t() * q.shape[2] ** -0.5, sinks.unsqueeze(1)], 1)
        mass = torch.softmax(scores, 1).sum(0)[:-1]
        result[t, :count] = mass[len(keys) - count :]
    return result


def index_scores(q: Tensor, weights: Tensor, keys: Tensor, seen: Seen, chosen: Tensor) -> Tensor:
    assert seen.entry_first is not None
    rows = []
    for t in range(q.shape[0]):
        numbers = numbers_of(seen, chosen, t)
        scores = [(weights[t] * (q[t] @ keys[int(seen.entry_first[t]) + n]).clamp(min=0)).sum() for n in numbers]
        scores += [q.new_tensor(float("-inf"))] * (chosen.shape[1] - len(numbers))
        rows.append(torch.stack(scores))
    return torch.stack(rows)


def compress(values: Tensor, scores: Tensor, bias: Tensor, weight: Tensor, place: Packed, ratio: int) -> Tensor:
    """The entries of a pack: pooled, normed, rotated."""
    windows, dim, entries = place.entries[ratio].windows, weight.shape[0], []
    for first, number, rotation in zip(windows.first.tolist(), windows.number.tolist(), windows.rotation, strict=True):
        overlap = values.shape[1] > dim
        halves = [(slice(dim), number - 1), (slice(dim, None), number)] if overlap else [(slice(dim), number)]
        v, s = [], []
        for half, window in halves:
            for i in range(ratio if window >= 0 else 0):
                v.append(values[first + window * ratio + i, half])
                s.append((scores[first + window * ratio + i] + bias[i])[half])
        x = (torch.softmax(torch.stack(s), 0) * torch.stack(v)).sum(0)
        x = x / torch.sqrt(x.square().mean() + 1e-6) * weight
        plain, turned = x.split([dim - 2 * len(rotation), 2 * len(rotation)])
        pairs = torch.view_as_complex(turned.unflatten(0, (-1, 2)).contiguous()) * rotation.to(torch.complex128)
        entries.append(torch.cat([plain, torch.view_as_real(pairs).flatten().to(x.dtype)]))
    return torch.stack(entries)
