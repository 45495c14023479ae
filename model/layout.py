"""Where every token sits: packed documents for training, and chunks of further tokens for sampling from a cache.

Shapes: T packed tokens, B documents or requests, N compressed entries of the pack, W the sliding window, Q blocks of
queries (of W tokens of a pack), E entries that a block of queries may see. Everything here is index arithmetic, done
once for all layers.
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
    block: Tensor  # int64 [Q, E]: the entries each block of queries may see
    visible: Tensor  # bool [Q, W, E]: entry's document is the query's, and its window is complete at the query
    most: int  # the largest number of entries that one query sees


@dataclass
class Packed:
    """T tokens of B documents in a row; every document is on its own, at any place in the pack."""

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
    cu = _borders(cu_seqlens, least=1)
    lengths = cu.diff()
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
    return Packed(position, window, visible, rotation, entries)


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
        block=block.clamp_(max=max(owner.numel() - 1, 0)),
        visible=visible,
        most=int(((position + 1) // ratio).max()),
    )


Index = tuple[Tensor, ...]
"""What stands between the brackets of a tensor."""


@dataclass
class Finished:
    """F entries of one kind of compressor whose last token is in the chunk, and what each query may see."""

    request: Tensor  # int64 [F]
    number: Tensor  # int64 [F]: the entry's number in its request
    rotation: Tensor  # complex64 [F, R] at the entry's first token
    own: Index  # [F, ratio]: the entry's tokens, among the rows that `remember` returns
    previous: Index  # [F, ratio]: the tokens before those; none for entry 0
    visible: Tensor  # bool [Q, M, E]: entries that each query sees, E the largest count of the batch


@dataclass
class Chunk:
    """Further tokens of B requests whose past is in a cache, T in all; decoding is one of each, prefill has no past.

    Q blocks of M queries, each of one request: its tokens in a row. A short chunk (no request has more than `slack` + 1
    tokens) has one block for each request, and fits into the rings beside all that its queries need. So they are
    written first and then read from there. A long one is read from the rings and the chunk, and then written.
    """

    cu_seqlens: Tensor  # int64 [B + 1]
    past: Tensor  # int64 [B]: tokens that each request holds already
    request: Tensor  # int64 [T]
    position: Tensor  # int64 [T]: place in the request
    short: bool
    room: int  # tokens that a request may come to hold
    slack: int
    rotation: dict[str, Tensor]  # complex64 [T, R] by rope type
    owner: Tensor  # int64 [Q]: the request of each block
    size: int  # M
    slot: Tensor | None  # int64 [T]: each token's place among Q * M queries; None where it is its own number
    rows: Index  # window rows [Q, M + W - 1] in the order of their positions, among those that `remember` returns
    visible: Tensor  # bool [Q, M, M + W - 1]
    finished: dict[tuple[int, int], Finished] = field(default_factory=dict)  # by ratio and ring's size without slack

    def find(self, request: Tensor, position: Tensor, slots: int) -> Index:
        """Where `remember` has those tokens of a request, for rings of `slots`: the chunk's own, or its last ones."""
        if self.short:
            return request, position % slots
        past, start = self.past[request], self.cu_seqlens[request]
        own = self.past.numel() * slots + start + position - past
        return (torch.where(position < past, request * slots + position % slots, own),)

    def remember(self, ring: Tensor, new: Tensor) -> Tensor:
        """Writes rows `new` [T, C] into `ring` [B, slots, C]; returns what `find` points into."""
        slots = ring.shape[1]
        if self.short:
            ring[self.request, self.position % slots] = new
            return ring
        source = torch.cat([ring.flatten(0, 1), new])
        left = self.cu_seqlens[1:][self.request] - torch.arange(new.shape[0], device=new.device)
        last = (left <= slots).nonzero().squeeze(1)  # earlier ones would share slots with these
        ring[self.request[last], self.position[last] % slots] = new[last]
        return source

    def in_blocks(self, x: Tensor) -> Tensor:
        """[T, ...] -> [Q, M, ...], zeros where a block has fewer queries."""
        if self.slot is not None:
            x = x.new_zeros(self.owner.numel() * self.size, *x.shape[1:]).index_copy_(0, self.slot, x)
        return x.unflatten(0, (-1, self.size))

    def from_blocks(self, x: Tensor) -> Tensor:
        """[Q, M, ...] -> [T, ...]."""
        x = x.flatten(0, 1)
        return x if self.slot is None else x[self.slot]

    def of_blocks(self, entries: Tensor, count: int) -> Tensor:
        """The first `count` entries of each block's request: [B, N, C] -> [Q, count, C]."""
        return entries[:, :count] if self.short else entries[:, :count][self.owner]


def chunk(
    cu_seqlens: Tensor,
    past: Tensor,
    *,
    window: int,
    slack: int,
    room: int,
    compressors: set[tuple[int, int]],
    frequencies: Frequencies,
) -> Chunk:
    """The layout of a chunk; cu_seqlens [B + 1] starts with 0, never falls and ends with T > 0 (ValueError otherwise).

    `compressors`: the ratio of each kind, and its rings' size without `slack`.
    """
    cu = _borders(cu_seqlens, least=0)
    if cu.numel() != past.numel() + 1:
        raise ValueError(f"cu_seqlens has {cu.numel() - 1} chunks for a cache of {past.numel()} requests")
    device, lengths, total = cu.device, cu.diff(), int(cu[-1])
    requests, longest, most = lengths.numel(), int(lengths.max()), int((past + lengths).max())
    if most > room:
        raise ValueError(f"the cache is full: a request would hold {most} tokens, there is room for {room}")
    request = torch.repeat_interleave(torch.arange(requests, device=device), lengths)
    place = torch.arange(total, device=device) - cu[request]
    position = past[request] + place
    short = longest <= slack + 1
    size = longest if short else min(longest, window)
    blocks = torch.ones_like(lengths) if short else -(-lengths // size)
    first = F.pad(blocks.cumsum(0), (1, 0))
    owner = torch.repeat_interleave(torch.arange(requests, device=device), blocks)
    start = past[owner] + (torch.arange(owner.numel(), device=device) - first[owner]) * size
    query = start.unsqueeze(1) + torch.arange(size, device=device)
    key = start.unsqueeze(1) + torch.arange(1 - window, size, device=device)
    age = query.unsqueeze(2) - key.unsqueeze(1)
    result = Chunk(
        cu_seqlens=cu,
        past=past,
        request=request,
        position=position,
        short=short,
        room=room,
        slack=slack,
        rotation={kind: rotations(position, f) for kind, f in frequencies.items()},
        owner=owner,
        size=size,
        slot=None if owner.numel() * size == total else first[request] * size + place,
        rows=(),
        visible=(age >= 0) & (age < window) & (key >= 0).unsqueeze(1),
    )
    end = (past + lengths)[owner].unsqueeze(1)  # a block may end after it, with queries that are none
    result.rows = result.find(owner.unsqueeze(1), torch.minimum(key, end - 1), window + slack)
    for ratio, tokens in compressors:
        result.finished[ratio, tokens] = _finished(result, query, ratio, tokens + slack, frequencies["compress"])
    return result


def _finished(chunk: Chunk, query: Tensor, ratio: int, slots: int, frequencies: Tensor) -> Finished:
    device, lengths = query.device, chunk.cu_seqlens.diff()
    before, after = chunk.past // ratio, (chunk.past + lengths) // ratio
    counts = after - before
    request = torch.repeat_interleave(torch.arange(counts.numel(), device=device), counts)
    number = torch.arange(request.numel(), device=device) + (after - counts.cumsum(0))[request]
    tokens = (number * ratio).unsqueeze(1) + torch.arange(ratio, device=device)
    count = (query + 1) // ratio
    return Finished(
        request=request,
        number=number,
        rotation=rotations(number * ratio, frequencies),
        own=chunk.find(request.unsqueeze(1), tokens, slots),
        previous=chunk.find(request.unsqueeze(1), tokens - ratio, slots),
        visible=torch.arange(int(after.max()), device=device) < count.unsqueeze(2),
    )


def _borders(cu_seqlens: Tensor, least: int) -> Tensor:
    cu = cu_seqlens.long()
    if cu.dim() != 1 or cu.numel() < 2 or int(cu[0]) != 0 or int(cu.diff().min()) < least or int(cu[-1]) == 0:
        rule = "rise strictly" if least else "never fall"
        raise ValueError(f"cu_seqlens must be [0, ..., T] and {rule}, T above 0; got {cu.tolist()[:8]}")
    return cu
