"""The decoding cache: per request a ring of window rows, compressed entries, and the compressors' unfinished windows.

Everything a layer keeps is a tensor whose first dimension is the request, so forking a prompt for its group, dropping
finished requests and moving a cache are one `index_select`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Packed

LayerCache = dict[str, Tensor]  # "rows" [B, W + entries, D]; for a compressor "values", "scores" [B, slots, C]; ...


@dataclass
class Cache:
    """`length` int64 [B]: tokens each request holds; `capacity`: the most tokens a request may come to hold."""

    length: Tensor
    capacity: int
    layers: list[LayerCache]

    def select(self, rows: Tensor) -> "Cache":
        """The cache of requests `rows` (int64; repeated for forks), as a copy."""
        layers = [{name: t.index_select(0, rows) for name, t in layer.items()} for layer in self.layers]
        return Cache(self.length.index_select(0, rows), self.capacity, layers)


def ring(x: Tensor, layout: Packed, slots: int, empty: float) -> Tensor:
    """[T, C] -> [B, slots, C]: each document's last `slots` rows at (position mod slots), else `empty`."""
    last = layout.cu_seqlens.diff().unsqueeze(1) - 1
    position = last - (last - torch.arange(slots, device=x.device)) % slots
    rows = x[layout.cu_seqlens[:-1].unsqueeze(1) + position.clamp(min=0)]
    return rows.masked_fill((position < 0).unsqueeze(-1), empty)


def per_request(entries: Tensor, start: Tensor, room: int) -> Tensor:
    """Packed entries [N, D] -> [B, room, D], each request's own from slot 0 on, zeros behind them."""
    counts = start.diff().unsqueeze(1)
    slot = torch.arange(room, device=entries.device)
    if entries.shape[0] == 0:
        return entries.new_zeros(counts.shape[0], room, entries.shape[1])
    rows = entries[(start[:-1].unsqueeze(1) + slot).clamp(max=entries.shape[0] - 1)]
    return rows.masked_fill((slot >= counts).unsqueeze(-1), 0.0)
