"""Where further tokens of requests sit whose past is in a cache: for sampling, a step or a chunk of a prompt at a time.

Shapes: T tokens, B requests, N compressed entries, W the sliding window, Q blocks of M queries, E entries that a block
of queries may see. As in layout.py, all of it is index arithmetic, done once for all layers.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.places import Seen, Windows
from ..kernels.project import Into
from ..kernels.rope import rotations
from .cache import Cache
from .layout import Frequencies, borders, owners


@dataclass
class Chunk:
    """Further tokens of B requests whose past is in a cache, T in all; decoding is one of each, prefill has no past.

    Q blocks of M queries, each of one request: its tokens in a row. A short chunk (no request has more than `slack` + 1
    tokens) has one block for each request, and fits into the rings beside all that its queries need. So they are
    written first and then read from there. A long one is read from copies, each request's last rows before its chunk
    and then the chunk's, and then written.

    Shapes follow from what is kept as numbers here, B and the cache's room, and nothing asks the device for more unless
    a chunk is long: so a short one may be recorded in a CUDA graph.
    """

    cu_seqlens: Tensor  # int64 [B + 1]
    slots: Tensor  # int64 [B]: of the requests in the cache
    past: Tensor  # int64 [B]: tokens that each request holds already
    tokens: int  # T
    longest: int  # the most tokens that a request gets
    most: int  # the most that one holds after the chunk, or any larger number
    window: int
    cache: Cache
    rotation: dict[str, Tensor] = field(default_factory=dict)  # complex64 [T, R] by rope type
    finished: dict[tuple[int, int], "Finished"] = field(default_factory=dict)  # by ratio and ring's size without slack
    _seen_entries: dict[int, Tensor] = field(default_factory=dict)
    _rings: dict[int, Tensor] = field(default_factory=dict)
    in_row: dict[int, tuple[Tensor, Tensor]] = field(
        default_factory=dict
    )  # by ratio: what pools.py finds for all layers

    @cached_property
    def lengths(self) -> Tensor:
        return self.cu_seqlens.diff()

    @cached_property
    def request(self) -> Tensor:
        """int64 [T]."""
        return owners(self.cu_seqlens[1:], self.tokens)

    @cached_property
    def place(self) -> Tensor:
        """int64 [T]: in the chunk of its request."""
        return torch.arange(self.tokens, device=self.past.device) - self.cu_seqlens[self.request]

    @cached_property
    def position(self) -> Tensor:
        """int64 [T]: place in the request."""
        return self.past[self.request] + self.place

    @property
    def slack(self) -> int:
        return self.cache.slack

    @property
    def short(self) -> bool:
        return self.longest <= self.slack + 1

    def paged(self, numbers: Tensor, ratio: int, requests: Tensor | None = None) -> Tensor:
        """Where in a pool the requests' entries of these `numbers` [B, n] are, one for `ratio` tokens: int64 [B, n];
        `requests` int64 [B] (None: all, in order)."""
        size, slots = self.cache.page // ratio, self.slots if requests is None else self.slots[requests]
        pages = self.cache.table[slots].long().gather(1, numbers // size)
        return pages * size + numbers % size

    # --- rings of a request's last tokens

    def into(self, ring: Tensor) -> Into | None:
        """Where in `ring` [slots, size, C] the rows of the chunk's tokens are kept, if it is short: then they may be
        written there at once."""
        return Into(ring.flatten(0, 1), self._in_ring(ring.shape[1])) if self.short else None

    def remember(self, ring: Tensor, new: Tensor, last: int) -> Tensor:
        """Writes rows `new` [T, C] into `ring` [slots, size, C], if the chunk is long; a short one's are there.

        Returns the rows in which `first` finds a token, and the `last` ones before it: [R, C]."""
        size, flat = ring.shape[1], ring.flatten(0, 1)
        if self.short:
            return flat
        to = self._in_ring(size)
        rows = new.new_empty(self.tokens + self.past.numel() * last, *new.shape[1:])
        before = torch.arange(last, device=new.device)
        starts = self.first(size, last)[0] + self.past  # of the chunks
        old = self.slots.unsqueeze(1) * size + (self.past.unsqueeze(1) - last + before) % size
        rows[(starts.unsqueeze(1) - last + before).flatten()] = flat[old.flatten()]
        rows[starts[self.request] + self.place] = new
        left = self.cu_seqlens[1:][self.request] - torch.arange(self.tokens, device=new.device)
        kept = (left <= size).nonzero().squeeze(1)  # earlier ones would share places with these
        flat[to[kept]] = new[kept]
        return rows

    def _in_ring(self, size: int) -> Tensor:
        """int64 [T]: where tokens are kept in rings of that size, once for all layers."""
        if size not in self._rings:
            self._rings[size] = self.slots[self.request] * size + self.position % size
        return self._rings[size]

    def first(self, slots: int, last: int) -> tuple[Tensor, int]:
        """int64 [B] and slots: a request's token at position p is row `first + p % slots` of what `remember` returns,
        or `first + p` where slots are 0."""
        if self.short:
            return self.slots * slots, slots
        requests = torch.arange(self.past.numel(), device=self.past.device)
        return self.cu_seqlens[:-1] + (requests + 1) * last - self.past, 0

    def seen(self, ratio: int = 0) -> Seen:
        return Seen(self, self.window, *self._places[ratio])

    @cached_property
    def _places(self) -> dict[int, tuple]:
        """As a pack's."""
        first, slots = self.first(self.window + self.slack, self.window - 1)
        place = self.position.int(), first[self.request].int(), slots
        found: dict[int, tuple] = {0: place}
        table = self.cache.table
        pages = (self.slots[self.request] * table.shape[1]).int()
        for ratio in {ratio for ratio, _ in self.finished}:
            size = self.cache.page // ratio
            found[ratio] = *place, ratio, pages, self.most // ratio, table.flatten(), size
        return found

    # --- blocks of queries of one request (kernels/places.py says what each method returns)

    @cached_property
    def _blocks(self) -> tuple[Tensor, int, Tensor | None, Tensor]:
        """The request of each block int64 [Q]; M; each token's place among Q M queries, None where that is its own
        number; the positions [Q, M]."""
        device, size = self.past.device, self.longest
        first = owner = torch.arange(self.past.numel(), device=device)
        start = self.past
        if not self.short:
            size = min(size, self.window)
            blocks = -(-self.lengths // size)
            first = F.pad(blocks.cumsum(0), (1, 0))
            owner = torch.repeat_interleave(owner, blocks)
            start = self.past[owner] + (torch.arange(owner.numel(), device=device) - first[owner]) * size
        slot = None
        if owner.numel() * size != self.tokens:
            slot = first[self.request] * size + self.place
        return owner, size, slot, start.unsqueeze(1) + torch.arange(size, device=device)

    def in_blocks(self, x: Tensor) -> Tensor:
        owner, size, slot, _ = self._blocks
        if slot is not None:
            x = x.new_zeros(owner.numel() * size, *x.shape[1:]).index_copy_(0, slot, x)
        return x.unflatten(0, (-1, size))

    def from_blocks(self, x: Tensor) -> Tensor:
        slot = self._blocks[2]
        return x.flatten(0, 1) if slot is None else x.flatten(0, 1)[slot]

    def keys(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        index, visible = self._keys
        return rows[index], visible

    @cached_property
    def _keys(self) -> tuple[Tensor, Tensor]:
        """int64 [Q, M + W - 1] of `remember`'s rows, and bool [Q, M, M + W - 1]."""
        owner, size, _, query = self._blocks
        key = query[:, :1] + torch.arange(1 - self.window, size, device=query.device)
        age = query.unsqueeze(2) - key.unsqueeze(1)
        first, slots = self.first(self.window + self.slack, self.window - 1)
        # A block may end after its request, with queries that are none.
        there = torch.minimum(key, (self.past + self.lengths)[owner].unsqueeze(1) - 1)
        index = first[owner].unsqueeze(1) + (there % slots if slots else there)
        return index.clamp(min=0), (age >= 0) & (age < self.window) & (key >= 0).unsqueeze(1)

    def complete(self, entries: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
        numbers = torch.arange(self.most // ratio, device=entries.device).expand(self.past.numel(), -1)
        rows = self.paged(numbers, ratio)
        return entries[rows if self.short else rows[self._blocks[0]]], self._complete(ratio)

    def complete_of(self, entries: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
        """`complete` of the requests' entries [B, E, D]."""
        return entries if self.short else entries[self._blocks[0]], self._complete(ratio)

    def _complete(self, ratio: int) -> Tensor:
        if ratio not in self._seen_entries:
            count = (self._blocks[3] + 1) // ratio
            numbers = torch.arange(self.most // ratio, device=count.device)
            self._seen_entries[ratio] = numbers < count.unsqueeze(2)
        return self._seen_entries[ratio]

    def column(self, ratio: int) -> Tensor:
        return torch.zeros_like(self._blocks[3])


@dataclass
class Finished:
    """The entries of one kind of compressor whose last token is in the chunk, and behind them, up to a number that
    follows from B and T alone, some that are none: they are written to page 0."""

    windows: Windows
    row: Tensor  # int64 [N]: of an entry in the pool


def chunk(
    cu_seqlens: Tensor,
    slots: Tensor | None,
    cache: Cache,
    *,
    window: int,
    compressors: set[tuple[int, int]],
    frequencies: Frequencies,
) -> Chunk:
    """The layout of a chunk for the requests in `slots` int64 [B] (None: in all, in order); cu_seqlens [B + 1] starts
    with 0, never falls and ends with T > 0 (ValueError otherwise).

    `compressors`: the ratio of each kind, and its rings' size without slack.
    """
    cu = borders(cu_seqlens, least=0)
    slots, past = requests_of(slots, cache)
    if cu.numel() != past.numel() + 1:
        raise ValueError(f"cu_seqlens has {cu.numel() - 1} chunks for a cache of {past.numel()} requests")
    sizes = int(cu[-1]), int(cu.diff().max()), int((past + cu.diff()).max())
    return laid_out(Chunk(cu, slots, past, *sizes, window, cache), compressors, frequencies)


def requests_of(slots: Tensor | None, cache: Cache) -> tuple[Tensor, Tensor]:
    """`Chunk.slots` and `Chunk.past`."""
    if slots is None:
        return torch.arange(cache.length.numel(), device=cache.length.device), cache.length.clone()
    return slots, cache.length[slots]


def laid_out(result: Chunk, compressors: set[tuple[int, int]], frequencies: Frequencies) -> Chunk:
    """With what a chunk has of the model."""
    check_room(result.most, result.cache)
    result.rotation = {kind: rotations(result.position, f) for kind, f in frequencies.items()}
    for ratio, tokens in compressors:
        result.finished[ratio, tokens] = _finished(result, ratio, tokens, frequencies["compress"])
    return result


def check_room(most: int, cache: Cache) -> None:
    """ValueError where a request would hold too many tokens."""
    if most > cache.capacity:
        raise ValueError(f"the cache is full: a request would hold {most} tokens, there is room for {cache.capacity}")


def _finished(chunk: Chunk, ratio: int, tokens: int, frequencies: Tensor) -> Finished:
    before, after = chunk.past // ratio, (chunk.past + chunk.lengths) // ratio
    ends, requests = (after - before).cumsum(0), chunk.past.numel()
    # No more than these can be: each request finishes one in `ratio` of its tokens, rounded up.
    count = min(requests * -(-chunk.longest // ratio), chunk.tokens // ratio + requests)
    request = owners(ends, count)
    real, request = request < requests, request.clamp(max=requests - 1)
    number = (torch.arange(count, device=ends.device) + (after - ends)[request]).where(real, -1)
    first, slots = chunk.first(tokens + chunk.slack, tokens)
    windows = Windows(first[request].int(), number.int(), rotations(number * ratio, frequencies), slots)
    size, own = chunk.cache.page // ratio, number.clamp(min=0)
    pages = chunk.cache.table[chunk.slots[request], own // size].long()
    return Finished(windows, (pages * size + own % size).where(real, 0))
