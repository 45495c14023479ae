"""Whole matrices for Muon where ZeRO has cut parameters into shards: who orthogonalizes what, and the exchange.

A rank's shards lie one after another in a flat tensor. Each is a run of elements of one parameter, later ranks have
later ones, and a parameter is a row of matrices. What a rank has whole it orthogonalizes. A matrix that several ranks
have parts of goes to the one of them that has least to do, and its update comes back. Nothing is summed on the way.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed

from ..kernels.muon import BATCH
from ..model.matrices import Matrices

Updates = Callable[[Sequence[Tensor]], None]
"""Puts the update of each matrix in its place: `kernels.muon.to_updates`."""


@dataclass(frozen=True)
class Cut:
    """A matrix: how many of its elements each rank has, and where this rank's begin in its flat tensor."""

    shape: tuple[int, int]
    parts: list[int]
    place: int

    @property
    def holders(self) -> list[int]:
        return [rank for rank, part in enumerate(self.parts) if part]

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def work(self) -> int:
        """Multiplications of a Newton-Schulz step, but for a factor."""
        return self.numel * min(self.shape)


@dataclass
class Round:
    """Matrices that are exchanged together: no more of them than `BATCH` numbers, unless one has more."""

    matrices: list[Cut] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    numel: int = 0

    def add(self, matrix: Cut, owner: int) -> None:
        self.matrices.append(matrix)
        self.owners.append(owner)
        self.numel += matrix.numel

    def of(self, owner: int) -> list[Cut]:
        return [m for m, other in zip(self.matrices, self.owners, strict=True) if other == owner]


class Shards:
    """One flat tensor's matrices, as rank `rank` sees them.

    `matrices`: each parameter's. `owned` int64 [ranks, parameters, 2]: where each rank's run of elements of each
    parameter begins and how long it is; `places`: where this rank's begin in its flat tensor.
    """

    def __init__(self, rank: int, matrices: Sequence[Matrices], owned: Tensor, places: Sequence[int]):
        self._rank, self._ranks = rank, len(owned)
        self._whole: list[Cut] = []
        self._rounds: list[Round] = []
        work = [0] * self._ranks
        several = []
        for matrix in _cuts(rank, matrices, owned.tolist(), places):
            first, *others = matrix.holders
            if others:
                several.append(matrix)
                continue
            work[first] += matrix.work
            if first == rank:
                self._whole.append(matrix)
        for matrix in several:
            owner = min(matrix.holders, key=lambda holder: work[holder])
            work[owner] += matrix.work
            if not self._rounds or self._rounds[-1].numel + matrix.numel > BATCH:
                self._rounds.append(Round())
            self._rounds[-1].add(matrix, owner)

    def apply(self, flat: Tensor, updates: Updates) -> None:
        """`updates` on all matrices in place, in the flat tensors of all ranks (a collective)."""
        updates([flat[m.place :][: m.numel].view(m.shape) for m in self._whole])
        for each in self._rounds:
            self._exchange(each, flat, updates)

    def _exchange(self, each: Round, flat: Tensor, updates: Updates) -> None:
        own, everyone = each.of(self._rank), range(self._ranks)
        parts = [flat[m.place :][: m.parts[self._rank]] for owner in everyone for m in each.of(owner)]
        sizes_out = [sum(m.parts[self._rank] for m in each.of(owner)) for owner in everyone]
        sizes_in = [sum(m.parts[holder] for m in own) for holder in everyone]
        sent, got = torch.cat(parts), flat.new_empty(sum(sizes_in))
        distributed.all_to_all_single(got, sent, sizes_in, sizes_out)
        # What came lies by holder, and of each holder by matrix; a matrix is its holders' parts in their order.
        came = got.split([m.parts[holder] for holder in everyone for m in own])
        of_each = [came[i :: len(own)] for i in range(len(own))]
        whole = [torch.cat(pieces).view(m.shape) for m, pieces in zip(own, of_each, strict=True)]
        updates(whole)
        for pieces, update in zip(of_each, whole, strict=True):
            _copy(update.view(-1), pieces)
        distributed.all_to_all_single(sent, got, sizes_out, sizes_in)
        _copy(sent, parts)


def _cuts(
    rank: int, matrices: Sequence[Matrices], owned: list[list[list[int]]], places: Sequence[int]
) -> Iterator[Cut]:
    for i, (shapes, place) in enumerate(zip(matrices, places, strict=True)):
        begin = 0
        for n, m in shapes:
            end = begin + n * m
            runs = [of_rank[i] for of_rank in owned]
            parts = [max(min(end, first + length) - max(begin, first), 0) for first, length in runs]
            yield Cut((n, m), parts, place + max(begin - runs[rank][0], 0))
            begin = end


def _copy(joined: Tensor, pieces: Sequence[Tensor]) -> None:
    for piece, new in zip(pieces, joined.split([len(piece) for piece in pieces]), strict=True):
        piece.copy_(new)
