"""Where every token of packed documents sits, for training; chunks.py has further tokens of requests, for sampling.

Shapes: T tokens, B documents, N compressed entries, W the sliding window, Q blocks of M queries (W tokens
of a pack), E entries that a block of queries may see. Everything here is index arithmetic, done once for all layers.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.places import Seen, Windows
from ..kernels.rope import rotations

Frequencies = dict[str, Tensor]  # "main" and "compress": fp32 [rope_dim / 2]


@dataclass
class Entries:
    """Compressed entries of a pack for one ratio, in the order of the documents: entry n of a document covers its
    tokens n ratio ... + ratio - 1."""

    windows: Windows
    first: Tensor  # int64 [T]: the first entry of the token's document
    count: Tensor  # int64 [T]: how many of its document's entries are complete at the token
    most: int  # the largest of these counts


@dataclass
class Packed:
    """T tokens of B documents in a row; every document is on its own, at any place in the pack."""

    start: Tensor  # int64 [T]: where the token's document begins
    window: int
    rotation: dict[str, Tensor]  # complex64 [T, R] by rope type
    entries: dict[int, Entries] = field(default_factory=dict)  # by ratio
    _complete: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def position(self) -> Tensor:
        """int64 [T]: place in its document."""
        return torch.arange(self.start.numel(), device=self.start.device) - self.start

    def seen(self, ratio: int = 0) -> Seen:
        return Seen(self, self.window, *self._places[ratio])

    @cached_property
    def _places(self) -> dict[int, tuple]:
        """What `Seen` says, by ratio. Not the `Seen` itself: it points here, and a cycle outlives its users."""
        position, start = self.position.int(), self.start.int()
        found = {ratio: (position, start, 0, ratio, e.first.int(), e.most) for ratio, e in self.entries.items()}
        return {0: (position, start)} | found

    # --- blocks of W queries, whatever their documents (kernels/places.py says what each method returns)

    @property
    def count(self) -> int:
        return -(-self.start.numel() // self.window)

    def in_blocks(self, x: Tensor) -> Tensor:
        padding = self.count * self.window - x.shape[0]
        return F.pad(x, [0, 0] * (x.dim() - 1) + [0, padding]).unflatten(0, (-1, self.window))

    def from_blocks(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)[: self.start.numel()]

    @cached_property
    def visible(self) -> Tensor:
        """bool [Q, W, 2W]: the block's queries against the tokens of the block before it and its own."""
        query = torch.arange(self.count * self.window, device=self.start.device).view(self.count, self.window, 1)
        # A query past the end starts its document behind itself and so sees nothing.
        padding = (0, query.numel() - self.start.numel())
        start = F.pad(self.start, padding, value=query.numel()).view(query.shape)
        key = torch.arange(-self.window, self.window, device=self.start.device) + query[:, :1]
        return (key >= start) & (key > query - self.window) & (key <= query)

    def keys(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of the block before (zeros for the first) and of the block itself."""
        own = self.in_blocks(rows)
        return torch.cat([F.pad(own[:-1], [0, 0, 0, 0, 1, 0]), own], dim=1), self.visible

    def complete(self, entries: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
        block, visible, _ = self._of_ratio(ratio)
        return entries[block], visible

    def column(self, ratio: int) -> Tensor:
        return self._of_ratio(ratio)[2]

    def _of_ratio(self, ratio: int) -> tuple[Tensor, Tensor, Tensor]:
        """The entries each block may see, int64 [Q, E]; which each query sees; the column of its document's first."""
        if ratio not in self._complete:
            e = self.entries[ratio]
            low = self.in_blocks(e.first)
            high = self.in_blocks(e.first + e.count)
            block_low = low[:, :1]
            width = max(int((high.amax(1, keepdim=True) - block_low).max()), 0)
            block = block_low + torch.arange(width, device=low.device)
            visible = (block.unsqueeze(1) >= low.unsqueeze(2)) & (block.unsqueeze(1) < high.unsqueeze(2))
            block = block.clamp(max=max(e.windows.number.numel() - 1, 0))
            self._complete[ratio] = block, visible, low - block_low
        return self._complete[ratio]


def packed(cu_seqlens: Tensor, window: int, ratios: set[int], frequencies: Frequencies) -> Packed:
    """The layout of a pack; cu_seqlens [B + 1] starts with 0, rises strictly and ends with T (ValueError otherwise).

    It lies where `frequencies` do. If cu_seqlens is on the host, nothing waits for a device.
    """
    host = borders(cu_seqlens.cpu(), least=1)
    lengths = host.diff()
    sizes = {ratio: (int((lengths // ratio).sum()), int(lengths.max()) // ratio) for ratio in ratios}
    cu = host.to(frequencies["main"].device, non_blocking=True)
    return _packed(cu, int(host[-1]), window, sizes, frequencies)


def packed_by_sizes(
    cu_seqlens: Tensor, tokens: int, longest: int, window: int, ratios: set[int], frequencies: Frequencies
) -> Packed:
    """`packed`, with shapes that follow from the sizes alone: it may be recorded in a CUDA graph.

    cu_seqlens [B + 1] lies where `frequencies` do, may repeat its end, and is not looked at here: it has to end with
    `tokens`, and no document may have more than `longest`. Behind the entries that there are come some that are none.
    """
    sizes = {ratio: (tokens // ratio, longest // ratio) for ratio in ratios}
    return _packed(cu_seqlens.long(), tokens, window, sizes, frequencies)


def _packed(
    cu: Tensor, tokens: int, window: int, sizes: dict[int, tuple[int, int]], frequencies: Frequencies
) -> Packed:
    """`sizes`: by ratio how many entries there are at most, and of one document."""
    lengths, document = cu.diff(), owners(cu[1:], tokens)
    layout = Packed(cu[document], window, {})
    layout.rotation = {kind: rotations(layout.position, f) for kind, f in frequencies.items()}
    for ratio, (entries, most) in sizes.items():
        ends = (lengths // ratio).cumsum(0)
        first = F.pad(ends, (1, 0))
        owner = owners(ends, entries)
        number = torch.arange(entries, device=cu.device) - first[owner]
        number = number.where(owner < lengths.numel(), -1)
        windows = Windows(cu[owner].int(), number.int(), rotations(number * ratio, frequencies["compress"]))
        layout.entries[ratio] = Entries(windows, first[document], (layout.position + 1) // ratio, most)
    return layout


def owners(ends: Tensor, count: int) -> Tensor:
    """int64 [count]: which of B runs, one after another up to `ends` [B], holds each place; B behind the last."""
    return torch.searchsorted(ends, torch.arange(count, device=ends.device), right=True)


def borders(cu_seqlens: Tensor, least: int) -> Tensor:
    cu = cu_seqlens.long()
    if cu.dim() != 1 or cu.numel() < 2 or int(cu[0]) != 0 or int(cu.diff().min()) < least or int(cu[-1]) == 0:
        rule = "rise strictly" if least else "never fall"
        raise ValueError(f"cu_seqlens must be [0, ..., T] and {rule}, T above 0; got {cu.tolist()[:8]}")
    return cu
