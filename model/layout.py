"""Where every token sits: packed documents for training and prefill, and one step of decoding.

Shapes: T packed tokens, B documents or requests, N compressed entries of the pack, W the sliding window,
Q = ceil(T / W) query blocks, E entries that a block of queries may see. Everything here is index arithmetic, done once
for all layers.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.rope import rotations

Frequencies = dict[str, Tensor]  # "main" and "compress": fp32 [rope_dim / 2]


@dataclass
class Entries:
    """Compressed entries of a pack for one ratio: entry w of a document covers its tokens w * ratio ... + ratio - 1."""

    ratio: int
    tokens: Tensor  # int64 [N, ratio]: pack indices of the entry's own tokens
    first: Tensor  # bool [N]: the document's first entry, which has no predecessor
    rotation: Tensor  # complex64 [N, R] at the entry's first token
    start: Tensor  # int64 [B + 1]: number of entries before each document
    block: Tensor  # int64 [Q, E]: the entries each block of queries may see
    visible: Tensor  # bool [Q, W, E]: entry's document is the query's, and its window is complete at the query
    most: int  # the largest number of entries that one query sees


@dataclass
class Packed:
    """T tokens of B documents in a row; every document is on its own, at any place in the pack."""

    cu_seqlens: Tensor  # int64 [B + 1]
    position: Tensor  # int64 [T]: place in its document
    window: int
    visible: Tensor  # bool [Q, W, 2W]: the block's queries against the tokens of the block before it and its own
    rotation: dict[str, Tensor]  # complex64 [T, R] by rope type
    entries: dict[int, Entries]  # by ratio

    @property
    def blocks(self) -> int:
        return self.visible.shape[0]

    def in_blocks(self, x: Tensor) -> Tensor:
        """[T, ...] -> [Q, W, ...], zeros past the end."""
        padding = self.blocks * self.window - x.shape[0]
        return F.pad(x, [0, 0] * (x.dim() - 1) + [0, padding]).unflatten(0, (-1, self.window))

    def window_rows(self, rows: Tensor) -> Tensor:
        """[T, D] -> [Q, 2W, D]: the tokens of the block before (zeros for the first) and of the block itself."""
        own = self.in_blocks(rows)
        return torch.cat([F.pad(own[:-1], [0, 0, 0, 0, 1, 0]), own], dim=1)


def packed(cu_seqlens: Tensor, window: int, ratios: set[int], frequencies: Frequencies) -> Packed:
    """The layout of a pack; cu_seqlens [B + 1] starts with 0, rises strictly and ends with T (ValueError otherwise)."""
    cu = cu_seqlens.long()
    lengths = cu.diff()
    if cu.dim() != 1 or cu.numel() < 2 or int(cu[0]) != 0 or int(lengths.min()) < 1:
        raise ValueError(f"cu_seqlens must be [0, ..., T] and rise strictly, got {cu.tolist()[:8]}")
    device, total = cu.device, int(cu[-1])
    document = torch.repeat_interleave(torch.arange(lengths.numel(), device=device), lengths)
    position = torch.arange(total, device=device) - cu[document]
    blocks = -(-total // window)
    query = torch.arange(blocks * window, device=device).view(blocks, window, 1)
    # A query past the end starts its document behind itself and so sees nothing.
    start = F.pad(cu[document], (0, blocks * window - total), value=blocks * window).view(blocks, window, 1)
    key = torch.arange(-window, window, device=device) + query[:, :1]
    visible = (key >= start) & (key > query - window) & (key <= query)
    rotation = {kind: rotations(position, f) for kind, f in frequencies.items()}
    entries = {r: _entries(r, cu, document, position, blocks, window, frequencies["compress"]) for r in ratios}
    return Packed(cu, position, window, visible, rotation, entries)


def _entries(
    ratio: int, cu: Tensor, document: Tensor, position: Tensor, blocks: int, window: int, frequencies: Tensor
) -> Entries:
    device = cu.device
    counts = cu.diff() // ratio
    start = F.pad(counts.cumsum(0), (1, 0))
    owner = torch.repeat_interleave(torch.arange(counts.numel(), device=device), counts)
    number = torch.arange(owner.numel(), device=device) - start[owner]
    tokens = (cu[owner] + number * ratio).unsqueeze(1) + torch.arange(ratio, device=device)
    padding = (0, blocks * window - position.numel())
    low = F.pad(start[document], padding, value=0).view(blocks, window, 1)
    high = F.pad(start[document] + (position + 1) // ratio, padding, value=0).view(blocks, window, 1)
    block_low, block_high = low[:, :1], high.amax(1, keepdim=True)
    width = max(int((block_high - block_low).max()), 0)
    block = block_low[:, 0] + torch.arange(width, device=device)
    visible = (block.unsqueeze(1) >= low) & (block.unsqueeze(1) < high)
    return Entries(
        ratio=ratio,
        tokens=tokens,
        first=number == 0,
        rotation=rotations(number * ratio, frequencies),
        start=start,
        block=block.clamp_(max=max(owner.numel() - 1, 0)),
        visible=visible,
        most=int(((position + 1) // ratio).max()),
    )


@dataclass
class Finished:
    """Requests whose token completes a window of `ratio` tokens in this step."""

    rows: Tensor  # int64 [F]: indices of the requests
    number: Tensor  # int64 [F]: the number of the entry that is complete now
    rotation: Tensor  # complex64 [F, R]
    visible: Tensor  # bool [B, E]: entries that each request's token sees, E the largest count of the batch


@dataclass
class Step:
    """One token of each of B requests; `position` [B] is the token's place in its request."""

    position: Tensor
    rotation: dict[str, Tensor]
    window: Tensor  # bool [B, W]: slots of the ring (position mod W) that hold a visible token
    finished: dict[int, Finished] = field(default_factory=dict)  # by ratio


def step(position: Tensor, window: int, ratios: set[int], frequencies: Frequencies) -> Step:
    device = position.device
    result = Step(
        position=position,
        rotation={kind: rotations(position, f) for kind, f in frequencies.items()},
        window=torch.arange(window, device=device) <= position.unsqueeze(1),
    )
    for ratio in ratios:
        count = (position + 1) // ratio
        rows = ((position + 1) % ratio == 0).nonzero().squeeze(1)
        number = count[rows] - 1
        result.finished[ratio] = Finished(
            rows=rows,
            number=number,
            rotation=rotations(number * ratio, frequencies["compress"]),
            visible=torch.arange(int(count.max()), device=device) < count.unsqueeze(1),
        )
    return result
