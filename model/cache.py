"""The decoding cache: per request a state of fixed size, and pages of what grows with its length.

The state, one row of each tensor for a request's slot, are rings of its last window rows and of what the compressors'
unfinished windows need: the row of position p is in slot p mod the ring's size. What grows are compressed entries and
an indexer's keys (of other models keys and values). They lie in pages of `page` tokens, the same for all layers
(the paper's 3.6.1 has blocks of a multiple of 128 tokens), and a table says where: so requests share the pages of a
prompt, a page that one gives back serves another, and to fork a request copies its state alone.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..kernels.dispatch import fused

LayerCache = dict[str, Tensor]
"""By name, each [slots, ring, C]: "rows", "values", "scores", rings of window rows and of what a compressor still
needs, of an indexer "index_values", "index_scores"; and the pools below."""

POOLS = ("entries", "index_keys", "past_keys", "past_values")
"""What lies in pages: each [pages, of a page, ...], in the order of their numbers."""

_ENTRIES = 64  # of a page, at least: a kernel fetches so many at once


def page_tokens(ratios: set[int]) -> int:
    """Tokens of a page: the least multiple of all ratios that holds 64 entries of the finest; 256 for V4 (our choice;
    the paper's 128 tokens would hold 32)."""
    if not ratios:
        return _ENTRIES
    common = math.lcm(*ratios)
    return common * -(-_ENTRIES * min(ratios) // common)


class Cache:
    """The past of requests in `slots`; empty at first, and filled by the model's `extend`.

    `length` int64 [slots]: tokens each request holds; `capacity`: the most tokens a request may come to hold. `slack`:
    how many tokens a request may fall behind the most that it ever held, `held` int64 [slots] (see `rollback`); each
    ring has that many rows more than its layer looks back, so that what the dropped tokens overwrote is nowhere needed.
    `longest`: no request holds more tokens, which the host knows without asking the device.

    `table` int32 [slots, pages of a request]: where its stretches of `page` tokens are. Without `pages` each slot has
    all its pages; with them there are so many in all, and who gives a request its tokens first writes its pages into
    `table`. Page 0 is nobody's: what no request reads may be written to it. All updates are in place, so that a CUDA
    graph finds the tensors again; `select` copies. Numbers that nobody sees have to be finite all the same.
    """

    def __init__(
        self, slots: int, capacity: int, slack: int, page: int, layers: int, device: torch.device, pages: int | None
    ):
        self.capacity, self.slack, self.page, self.longest = capacity, slack, page, 0
        self.length = torch.zeros(slots, dtype=torch.int64, device=device)
        self.held = self.length.clone()
        each = -(-capacity // page)
        self.table = torch.zeros(slots, each, dtype=torch.int32, device=device)
        if pages is None:
            self.table += torch.arange(1, slots * each + 1, dtype=torch.int32, device=device).view(slots, each)
        self.pages = slots * each + 1 if pages is None else pages
        self.layers: list[LayerCache] = [{} for _ in range(layers)]

    @property
    def state_bytes(self) -> int:
        """Of one slot, once something was fed."""
        return sum(tensor[:1].nbytes for tensor in self._states())

    @property
    def page_bytes(self) -> int:
        return sum(tensor[:1].nbytes for tensor in self._pools())

    def select(self, rows: Tensor) -> "Cache":
        """The cache of the requests in slots `rows` (int64; repeated for forks), as a copy that shares nothing."""
        device = self.length.device
        copy = Cache(rows.numel(), self.capacity, self.slack, self.page, len(self.layers), device, None)
        copy.length, copy.held = self.length.index_select(0, rows), self.held.index_select(0, rows)
        copy.longest = _most(copy.length)
        own = torch.cat([rows.new_zeros(1), self.table[rows].flatten().long()])
        for layer, to in zip(self.layers, copy.layers, strict=True):
            to |= {name: t.index_select(0, own if name in POOLS else rows) for name, t in layer.items()}
        return copy

    def copy_state(self, source: int, targets: Tensor) -> None:
        """Makes the requests in slots `targets` (int64) forks of the one in `source`, but for their pages."""
        for tensor in (self.length, self.held, *self._states()):
            tensor[targets] = tensor[source].clone()

    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        """Pages `targets` (int64) become copies of `sources`."""
        for pool in self._pools():
            pool[targets] = pool[sources]

    def take(self, slot: int, pages: Tensor) -> list[Tensor]:
        """What a request holds, as copies: its state, then its `pages` (int64), which `put` gives back."""
        return [t[slot].clone() for t in self._states()] + [pool[pages] for pool in self._pools()]

    def put(self, slot: int, pages: Tensor, kept: list[Tensor], length: int) -> None:
        """The request of `length` tokens that `take` gave goes on in this slot and these pages."""
        states = [t[slot] for t in self._states()]
        for to, tensor in zip(states, kept, strict=False):
            to.copy_(tensor)
        for pool, tensor in zip(self._pools(), kept[len(states) :], strict=True):
            pool[pages] = tensor.to(pool.device)
        self.length[slot] = self.held[slot] = length
        self.longest = max(self.longest, length)

    def advance(self, slots: Tensor | None, tokens: Tensor, longest: int) -> None:
        """`tokens` int64 more are in every layer for the requests in `slots` (None: for all), with which no request
        holds more than `longest`."""
        if fused(self.length):
            from ..kernels.fused.layout import advance

            advance(self.length, self.held, slots, tokens)
        elif slots is None:
            self.length += tokens
            torch.maximum(self.held, self.length, out=self.held)
        else:
            length = self.length[slots] + tokens
            self.length[slots] = length
            self.held[slots] = torch.maximum(self.held[slots], length)
        self.longest = max(self.longest, longest)

    def clear(self, slots: Tensor) -> None:
        """Empties `slots` (int64): what they are fed from now on are their requests' first tokens.

        What they held stays where it is until that overwrites it; nobody sees it, but it has to be finite.
        """
        self.length[slots] = 0
        self.held[slots] = 0
        self.longest = _most(self.length)

    def scrub(self, slots: Tensor, pages: Tensor) -> None:
        """Zeros for what a request left that may not be finite (slots and pages int64), and for page 0."""
        for tensor in self._states():
            tensor[slots] = 0
        for pool in self._pools():
            pool[pages] = 0
            pool[0] = 0

    def rollback(self, length: Tensor) -> None:
        """Drops the last tokens of requests, in place and without a copy, as if they had never been: `length` [slots].

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

    def ring(self, layer: LayerCache, name: str, new: Tensor, size: int) -> Tensor:
        """The layer's tensor [slots, size, ...] of that name, made of zeros for rows like `new` [T, ...] if missing."""
        if name not in layer:
            layer[name] = new.new_zeros(self.length.numel(), size, *new.shape[1:])
        return layer[name]

    def pool(self, layer: LayerCache, name: str, new: Tensor, ratio: int = 1) -> Tensor:
        """The layer's tensor [pages * of a page, ...] of that name, one row for `ratio` tokens, likewise."""
        if name not in layer:
            layer[name] = new.new_zeros(self.pages, self.page // ratio, *new.shape[1:])
        return layer[name].flatten(0, 1)

    def _states(self) -> Iterator[Tensor]:
        return (tensor for layer in self.layers for name, tensor in layer.items() if name not in POOLS)

    def _pools(self) -> Iterator[Tensor]:
        return (tensor for layer in self.layers for name, tensor in layer.items() if name in POOLS)


def probe(model: Any, slack: int, page: int | None = None) -> tuple[int, int]:
    """Bytes of a slot's state, and of a page, of a cache of `model`: found by feeding one token to a small one."""
    cache = model.new_cache(1, 1, slack, page=page)
    model.extend(cache.length.clone(), torch.tensor([0, 1], device=cache.length.device), cache)
    return cache.state_bytes, cache.page_bytes


def _most(length: Tensor) -> int:
    return int(length.max()) if length.numel() else 0
