"""Where the queries of a batch stand, and where what they may see lies in memory: model/layout.py, model/chunks.py.

A document's tokens, its window rows (one a token) and its compressed entries (entry n is made of tokens n ratio ... of
its window of `ratio`) are numbered from 0. Shapes: T queries, N entries to make, Q blocks of M queries.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Blocks(Protocol):
    """The same queries in blocks that share keys: what the reference computes with, made when it is asked for."""

    def in_blocks(self, x: Tensor) -> Tensor:
        """[T, ...] -> [Q, M, ...], zeros where a block has fewer queries, which then see nothing."""
        ...

    def from_blocks(self, x: Tensor) -> Tensor:
        """[Q, M, ...] -> [T, ...]."""
        ...

    def keys(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [R, D] -> [Q, S, D] in the order of their positions, and which a query sees: bool [Q, M, S]."""
        ...

    def complete(self, entries: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
        """Entries [N, D] -> [Q, E, D], and which are of the query's document and complete: bool [Q, M, E]."""
        ...

    def column(self, ratio: int) -> Tensor:
        """int64 [Q, 1] or [Q, M]: the place of entry 0 of a query's document among the E; it may be below 0."""
        ...


@dataclass(frozen=True)
class Seen:
    """What each of T queries sees: window rows, the entries that are complete at it, and of those, if so, the chosen.

    A document's row n is row `row_first + n` of the tensor of rows, or `row_first + n % slots` where `slots` is not 0.
    Its entry n is row `entry_first + n` of the tensor of entries, complete at position p if n < (p + 1) // ratio. Where
    there is a `table`, entries lie in pages of `page`: it is row `table[entry_first + n // page] * page + n % page`.
    The table may be read beyond a document's pages, so that each of its numbers has to be that of a page.
    """

    blocks: Blocks
    window: int
    position: Tensor  # int32 [T], in the document
    row_first: Tensor  # int32 [T]
    slots: int = 0
    ratio: int = 0  # 0: no entries
    entry_first: Tensor | None = None  # int32 [T]
    most: int = 0  # no query sees more entries
    table: Tensor | None = None  # int32 [requests * pages of one]
    page: int = 0  # entries; 0 without a table

    def of(self, some: slice) -> "Seen":
        """The same for some of the queries, without what the reference reads."""
        first = None if self.entry_first is None else self.entry_first[some]
        return replace(self, position=self.position[some], row_first=self.row_first[some], entry_first=first)


class Windows(NamedTuple):
    """N entries to make: entry number n of a document has its tokens at rows `first + position` of values and scores,
    or at `first + position % slots` where `slots` is not 0. Number -1 is no entry: what is made is zeros, or any
    finite numbers, as it may be read and weighs nothing."""

    first: Tensor  # int32 [N]
    number: Tensor  # int32 [N]
    rotation: Tensor  # complex64 [N, pairs], at the entry's first token
    slots: int = 0

    def tokens(self, ratio: int, back: int = 0) -> Tensor:
        """int64 [N, ratio]: the rows of an entry's own tokens, or of those `back` windows before (of entry 0: any)."""
        position = (self.number.long() - back).clamp(min=0).unsqueeze(1) * ratio
        position = position + torch.arange(ratio, device=position.device)
        return self.first.long().unsqueeze(1) + (position % self.slots if self.slots else position)
