"""What the decoding cache keeps in pages for attention, entries and index keys: in the model's dtype, or as bytes.

Bytes (kernels/cache_formats.py: 584 for an entry of 512 channels, 68 for a key of 128) are kept of what is rounded to
FP8 or FP4 anyway, so that nothing is lost, by models that hold what deployment stores of their weights
(`precision.store_weights`). An entry's rope channels are bf16 there: a model of a wider dtype keeps its entries wide.
Attention and the indexer take numbers, so bytes are read for them, the same in every layer: all entries of each
request, in a row; or, where these are fewer rows, those that each query's indexer has chosen. With Triton a part of the
requests at a time, and of each no more than it holds, whatever it has room for: a step recorded in a CUDA graph has the
shapes of a full cache. The reference has all that a request may see before it in any case.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.cache_formats import (
    cache_entry_bytes,
    index_key_bytes,
    read_cache_entries,
    read_index_keys,
    write_cache_entries,
    write_index_keys,
)
from ..kernels.compress import Storage
from ..kernels.dispatch import fused
from ..kernels.places import Seen
from .chunks import Chunk

TILE = 128  # entries that a kernel fetches at once, at most
SCRATCH = 2**28  # bytes of what is read at once, but that one request's are read together (our choice)


class Format(NamedTuple):
    """How rows of `dim` numbers of that dtype are kept."""

    dim: int
    dtype: torch.dtype
    storage: Storage = "full"  # in bytes of that; "full": as they are
    rope: int = 0  # channels of an entry that are rotated

    def none(self, like: Tensor) -> Tensor:
        """No row of a pool, on the device of `like`."""
        if self.storage == "full":
            return like.new_empty(0, self.dim, dtype=self.dtype)
        size = cache_entry_bytes(self.dim, self.rope) if self.storage == "fp8" else index_key_bytes(self.dim)
        return like.new_empty(0, size, dtype=torch.uint8)


class Pool(NamedTuple):
    rows: Tensor  # [N, D], or uint8 [N, bytes]
    format: Format

    @property
    def in_bytes(self) -> bool:
        return self.format.storage != "full"

    def write(self, where: Tensor, made: Tensor) -> None:
        """Rows `made` [n, D] to rows `where` int64 [n]."""
        if not self.in_bytes:
            self.rows.index_copy_(0, where, made)
        elif self.format.storage == "fp8":
            write_cache_entries(self.rows, where, made, self.format.rope)
        else:
            write_index_keys(self.rows, where, made)

    def whole(self, chunk: Chunk, ratio: int) -> Iterator[tuple[slice, Tensor, Seen]]:
        """For some of the chunk's queries after others: rows [N, D] among which they find all that they see."""
        seen, requests = chunk.seen(ratio), chunk.past.numel()
        if not self.in_bytes:
            yield slice(None), self.rows, seen
            return
        some = max(SCRATCH // (self._size * max(stretch(seen.most), 1)), 1) if fused(self.rows) else requests
        for first in range(0, requests, some):
            last = min(first + some, requests)
            tokens = _tokens(chunk, first, last)
            if tokens.start < tokens.stop:
                where, entry_first = _in_row(chunk, ratio, first, last)
                part = seen.of(tokens)
                part = replace(part, blocks=InRow(chunk), entry_first=entry_first[tokens], table=None, page=0)
                yield tokens, self._read(where), part

    def chosen(
        self, chunk: Chunk, ratio: int, chosen: Tensor | None
    ) -> Iterator[tuple[slice, Tensor, Seen, Tensor | None]]:
        """As `whole`, and of the entries that the queries have `chosen` int32 [T, K] their numbers among the rows."""
        seen = chunk.seen(ratio)
        few = chosen is not None and chosen.numel() < chunk.past.numel() * stretch(seen.most)
        if chosen is None or not (self.in_bytes and few and fused(self.rows)):
            for tokens, rows, part in self.whole(chunk, ratio):
                yield tokens, rows, part, None if chosen is None else chosen[tokens]
            return
        count, topk = chosen.shape
        own = torch.arange(topk, dtype=torch.int32, device=chosen.device)
        some = max(SCRATCH // (self._size * topk), 1)
        for first in range(0, count, some):
            tokens = slice(first, min(first + some, count))
            numbers = chosen[tokens]
            where = chunk.paged(numbers.clamp(min=0).long(), ratio, chunk.request[tokens])
            where = where.where((numbers >= 0) | (own == 0), -1)  # a kernel may fetch the first in place of none
            entry_first = torch.arange(numbers.shape[0], dtype=torch.int32, device=own.device) * topk
            part = replace(seen.of(tokens), entry_first=entry_first, table=None, page=0)
            yield tokens, self._read(where.flatten()), part, own.where(numbers >= 0, -1)

    @property
    def _size(self) -> int:
        """Bytes of a row that was read."""
        return self.format.dim * self.format.dtype.itemsize

    def _read(self, where: Tensor) -> Tensor:
        dim, dtype, storage, rope = self.format
        if storage == "fp8":
            return read_cache_entries(self.rows, where, dim, rope, dtype)
        return read_index_keys(self.rows, where, dim, dtype)


class InRow:
    """A chunk's blocks of queries where the entries that its requests may see are in a row, one request's after
    another's."""

    def __init__(self, chunk: Chunk):
        self._chunk = chunk
        self.in_blocks: Callable[[Tensor], Tensor] = chunk.in_blocks
        self.from_blocks: Callable[[Tensor], Tensor] = chunk.from_blocks
        self.keys: Callable[[Tensor], tuple[Tensor, Tensor]] = chunk.keys
        self.column: Callable[[int], Tensor] = chunk.column

    def complete(self, entries: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
        most = self._chunk.most // ratio
        of_requests = entries.view(self._chunk.past.numel(), stretch(most), entries.shape[1])
        return self._chunk.complete_of(of_requests[:, :most], ratio)


def stretch(most: int) -> int:
    """Rows of a request that may have so many: whole tiles, so that a kernel's never reach into another request's."""
    return -(-most // TILE) * TILE


def _in_row(chunk: Chunk, ratio: int, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Where in a pool the entries of requests `first` ... `last` - 1 are, a `stretch` of each: int64 [N], -1 for those
    that nothing reads; and where among these a token's request has its own first, for all tokens: int32 [T]."""
    if ratio in chunk.in_row:
        return chunk.in_row[ratio]
    most, each = chunk.most // ratio, stretch(chunk.most // ratio)
    requests = torch.arange(first, last, device=chunk.past.device)
    numbers = torch.arange(each, device=requests.device)
    where = chunk.paged(numbers.clamp(max=max(most - 1, 0)).expand(last - first, -1), ratio, requests)
    held = (chunk.past + chunk.lengths)[first:last] // ratio
    where = where.where(numbers < ((held + TILE - 1) // TILE * TILE).unsqueeze(1), -1).flatten()
    found = where, ((chunk.request - first) * each).int()
    if last - first == chunk.past.numel():
        chunk.in_row[ratio] = found
    return found


def _tokens(chunk: Chunk, first: int, last: int) -> slice:
    """Those of requests `first` ... `last` - 1. Of some of a chunk that does not decode, it asks the device."""
    if last - first == chunk.past.numel():
        return slice(0, chunk.tokens)
    if chunk.longest == 1 and chunk.tokens == chunk.past.numel():
        return slice(first, last)
    return slice(int(chunk.cu_seqlens[first]), int(chunk.cu_seqlens[last]))


def joined(parts: list[Tensor]) -> Tensor:
    """Of some queries after others, together."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
