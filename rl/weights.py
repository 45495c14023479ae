"""What a weight update is, whatever carries it: a policy's tensors, their checksums, and where they go.

What travels is the state dict, tied tensors once: parameters and persistent buffers (a hash layer's expert table and a
router's correction bias are buffers). A buffer outside it is a function of the config, and the receiver has computed
its own. Every worker is a whole replica, so that all of it is every worker's. `transport.py` carries it.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..model.precision import stored_weights
from ..model.stored import Stored
from ..model.tensors import distinct

ROW = 512
"""Bytes: a tensor in a bucket begins at a multiple of it, which suits every dtype, and a checksum adds up such rows."""

_WORDS = ROW // 8
_CHUNK = {"cpu": 2**20, "cuda": 2**25}  # bytes that are summed at once: they stay in a cache
_ODD = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64's


class Entry(NamedTuple):
    name: str
    dtype: str  # "float32"
    shape: tuple[int, ...]
    checksum: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


Manifest = tuple[Entry, ...]
"""A model's tensors. Equal manifests: equal weights, by their checksums."""


class Piece(NamedTuple):
    """A run of a tensor's bytes in a bucket."""

    tensor: int  # its index
    start: int  # of the run in the tensor
    size: int
    place: int  # of the run in the bucket


class SyncError(RuntimeError):
    """The receiver's model does not hold the sender's weights."""


def describe(model: nn.Module) -> Manifest:
    state = distinct(model)
    sums = checksums(list(state.values()))
    return tuple(Entry(name, _dtype(t), tuple(t.shape), s) for (name, t), s in zip(state.items(), sums, strict=True))


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """Of each tensor's bytes, 64 bits; the tensors are on one device, and only the sums leave it (our choice).

    The bytes, with zeros behind them, are rows of 64 words of 64 bits. A word's upper half is folded into its lower one
    (a product's upper bits alone would not tell where a sign was). A row is the sum of its words times odd constants,
    and the rows are mixed with their numbers and added up, all modulo 2^64. Each step has an inverse, so that no change
    of a single word, or row's sum, goes unseen; of others about one in 2^32 might. It keeps nobody out.
    """
    if not tensors:
        return []
    device, raw = tensors[0].device, [as_bytes(tensor) for tensor in tensors]
    sizes = [each.numel() for each in raw]
    totals = torch.zeros(len(raw), dtype=torch.int64, device=device)
    chunk = torch.empty(min(_CHUNK[device.type], sum(map(padded, sizes))), dtype=torch.uint8, device=device)
    for pieces in buckets(sizes, chunk.numel()):
        _add_rows(fill(chunk, pieces, raw).view(torch.int64).view(-1, _WORDS), pieces, totals)
    return totals.tolist()


def _add_rows(rows: Tensor, pieces: Sequence[Piece], totals: Tensor) -> None:
    table = [(p.tensor, (p.start - p.place) // ROW, padded(p.size) // ROW) for p in pieces]
    index, shift, count = torch.tensor(table, device=rows.device).unbind(1)
    # The output's size is given, or a GPU would be asked for it.
    index, shift = (each.repeat_interleave(count, output_size=len(rows)) for each in (index, shift))
    number = shift + torch.arange(len(rows), device=rows.device)
    mixed = _fold(rows).mul_(_factors(rows.device)).sum(1) + number * _signed(_ODD[0])
    for odd in _ODD:
        mixed = _fold(mixed.mul_(_signed(odd)))
    totals.index_add_(0, index, mixed)


def _fold(words: Tensor) -> Tensor:
    """Each word with its upper half xored into its lower one."""
    return (words >> 32).bitwise_and_(0xFFFFFFFF).bitwise_xor_(words)


@cache
def _factors(device: torch.device) -> Tensor:
    return torch.tensor([_signed(pow(_ODD[2], i + 1, 2**64)) for i in range(_WORDS)], device=device)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def buckets(sizes: Iterable[int], capacity: int) -> list[list[Piece]]:
    """Where tensors of these sizes lie, one after another, in buckets of `capacity` bytes, a multiple of ROW."""
    found: list[list[Piece]] = []
    place = capacity
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            if place == capacity:
                found.append([])
                place = 0
            part = min(size - start, capacity - place)
            found[-1].append(Piece(index, start, part, place))
            start, place = start + part, place + padded(part)
    return found


def filled(pieces: Sequence[Piece]) -> int:
    """The bytes of a bucket that these take."""
    return pieces[-1].place + padded(pieces[-1].size)


def fill(bucket: Tensor, pieces: Sequence[Piece], raw: Sequence[Tensor]) -> Tensor:
    """The part of `bucket` that the pieces of the tensors, as bytes, take, with zeros between them."""
    part = bucket[: filled(pieces)].zero_()
    for p in pieces:
        part[p.place : p.place + p.size].copy_(raw[p.tensor][p.start : p.start + p.size])
    return part


class Intake:
    """Bytes on their way into a model, in place; a weight that it stores in low precision is rounded when it is whole.

    `moved`: the entries of the manifest that come. The others are the sender's and the receiver's from the start, and
    checked too, but for those stored in low precision, of which no master is left. SyncError names the tensor.
    """

    def __init__(self, model: nn.Module, manifest: Manifest, moved: Sequence[int], version: int):
        self._manifest, self._version = manifest, version
        state = _targets(model)
        if stray := sorted({entry.name for entry in manifest} ^ state.keys()):
            side = "sender" if stray[0] in state else "receiver"
            raise SyncError(f"{stray[0]}: the {side}'s model has no such tensor ({len(stray)} in all)")
        self._targets = [state[entry.name] for entry in manifest]
        for entry, target in zip(manifest, self._targets, strict=True):
            here, there = (_dtype(target), tuple(target.shape)), entry[1:3]
            if here != there:
                raise SyncError(f"{entry.name}: {there[0]} {there[1]} was sent, {here[0]} {here[1]} is here")
        self._left = {index: manifest[index].nbytes for index in moved}
        self._landing: dict[int, Tensor] = {}

    def take(self, index: int, start: int, data: Tensor) -> None:
        """`data` uint8 [n], on any device: the bytes of entry `index` from `start` on."""
        target = self._targets[index]
        if isinstance(target, Tensor) and target.is_contiguous():
            place = as_bytes(target)
        else:
            if index not in self._landing:
                device = target.device if isinstance(target, Tensor) else next(target.buffers()).device
                self._landing[index] = torch.empty(self._manifest[index].nbytes, dtype=torch.uint8, device=device)
            place = self._landing[index]
        place[start : start + len(data)].copy_(data)
        self._left[index] -= len(data)
        if not self._left[index] and index in self._landing:
            self._put(index)

    def _put(self, index: int) -> None:
        entry, target = self._manifest[index], self._targets[index]
        received = self._landing.pop(index).view(getattr(torch, entry.dtype)).reshape(entry.shape)
        if isinstance(target, Tensor):
            target.copy_(received)
        elif checksums([received]) != [entry.checksum]:  # before codes are made of it
            raise SyncError(self._differs(index))
        else:
            target.take(received)

    def finish(self) -> None:
        """Checks that all came, and the model's own tensors by their checksums."""
        for index, left in self._left.items():
            if left:
                entry = self._manifest[index]
                raise SyncError(f"{entry.name}: {left} of {entry.nbytes} bytes of version {self._version} did not come")
        plain = [(index, target) for index, target in enumerate(self._targets) if isinstance(target, Tensor)]
        found = checksums([target for _, target in plain])
        for (index, _), checksum in zip(plain, found, strict=True):
            if checksum != self._manifest[index].checksum:
                raise SyncError(self._differs(index))

    def _differs(self, index: int) -> str:
        unsent = "" if index in self._left else "; it was not sent: the sender has what it loaded"
        return f"{self._manifest[index].name}: checksum differs after loading version {self._version}{unsent}"


def _targets(model: nn.Module) -> dict[str, Tensor | Stored]:
    """What takes each weight that is sent: the model's tensors, and what it stores in place of a master."""
    stored = stored_weights(model)
    codes = {f"{name}.{part}" for name, module in stored.items() for part, _ in module.named_buffers()}
    return {name: tensor for name, tensor in distinct(model).items() if name not in codes} | stored


def as_bytes(tensor: Tensor) -> Tensor:
    """uint8 [bytes], in a contiguous tensor's own memory."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def padded(size: int) -> int:
    return -(-size // ROW) * ROW


def _dtype(tensor: Tensor | Stored) -> str:
    return str(tensor.dtype).removeprefix("torch.")
