"""The decoding cache: per request a ring of window rows, compressed entries, and the compressors' unfinished windows.

Everything a layer keeps is a tensor whose first dimension is the request, so forking a prompt for its group, dropping
finished requests and moving a cache are one `index_select`. A ring holds the row of position p in slot p mod its size.
"""

import torch
from torch import Tensor

LayerCache = dict[str, Tensor]
"""By name, each [B, slots, C]: "rows", "values", "scores", rings of window rows and of what a compressor still needs;
"entries", in the order of their numbers; of an indexer "index_values", "index_scores" and "index_keys"."""


class Cache:
    """The past of B requests; empty at first, and filled by `DeepseekV4.extend`.

    `length` int64 [B]: tokens each request holds; `capacity`: the most tokens a request may come to hold. `slack`: how
    many tokens a request may fall behind the most that it ever held, `held` int64 [B] (see `rollback`); each ring has
    that many slots more than its layer looks back, so that what the dropped tokens overwrote is nowhere needed.
    `longest`: no request holds more tokens, which the host knows without asking the device. All updates are in place,
    so that a CUDA graph finds the tensors again; `select` copies.
    """

    def __init__(self, length: Tensor, capacity: int, slack: int, layers: list[LayerCache]):
        self.length, self.capacity, self.slack, self.layers = length, capacity, slack, layers
        self.longest = _most(length)
        self.held = length.clone()

    def select(self, rows: Tensor) -> "Cache":
        """The cache of requests `rows` (int64; repeated for forks), as a copy."""
        layers = [{name: t.index_select(0, rows) for name, t in layer.items()} for layer in self.layers]
        copy = Cache(self.length.index_select(0, rows), self.capacity, self.slack, layers)
        copy.held = self.held.index_select(0, rows)
        return copy

    def advance(self, tokens: Tensor, longest: int) -> None:
        """`tokens` int64 [B] more are in every layer, with which no request holds more than `longest`."""
        self.length += tokens
        torch.maximum(self.held, self.length, out=self.held)
        self.longest = longest

    def clear(self, requests: Tensor) -> None:
        """Empties `requests` (int64): what they are fed from now on are their first tokens.

        What they held stays where it is until that overwrites it; nobody sees it, but it has to be finite.
        """
        self.length[requests] = 0
        self.held[requests] = 0
        self.longest = _most(self.length)

    def rollback(self, length: Tensor) -> None:
        """Drops the last tokens of requests, in place and without a copy, as if they had never been: `length` [B].

        Later tokens overwrite what is left of them. Raises ValueError for a request that would grow, or fall more than
        `slack` tokens behind the most that it ever held.
        """
        bad = ((length > self.length) | (length < (self.held - self.slack).clamp(min=0))).nonzero()
        if bad.numel():
            i = int(bad[0])
            now, most = int(self.length[i]), int(self.held[i])
            raise ValueError(
                f"request {i} holds {now} tokens, has held {most}, and cannot go back to {int(length[i])}: "
                f"it can to {max(most - self.slack, 0)} ... {now}"
            )
        self.length.copy_(length)
        self.longest = _most(length)


def _most(length: Tensor) -> int:
    return int(length.max()) if length.numel() else 0


def kept(cache: LayerCache, name: str, new: Tensor, requests: int, slots: int) -> Tensor:
    """The layer's tensor [B, slots, C] of that name, made of zeros for rows like `new` [T, C] where there is none."""
    if name not in cache:
        cache[name] = new.new_zeros(requests, slots, *new.shape[1:])
    return cache[name]
