"""Weight sync, from the learner to whoever runs the policy: one flat buffer, with a checksum for each tensor.

What travels is the state dict, tied tensors once: every parameter and every persistent buffer (a hash layer's expert
table and a router's correction bias are buffers). A buffer outside it is a function of the config, and the receiver has
computed its own.
"""

import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..model.precision import stored_weights
from ..model.stored import Stored
from ..model.tensors import distinct

_ALIGNMENT = 64  # a tensor's view of the buffer needs its own alignment; a cache line serves every dtype


class Entry(NamedTuple):
    name: str
    dtype: str  # "float32"
    shape: tuple[int, ...]
    offset: int  # of its first byte in the buffer
    crc32: int


@dataclass(frozen=True, eq=False)
class Bundle:
    """A policy's weights. Through Ray's object store `data` travels without a copy, and arrives read-only."""

    version: int
    manifest: tuple[Entry, ...]  # equal manifests: equal weights, by their checksums
    data: np.ndarray  # uint8 [bytes]


class SyncError(RuntimeError):
    """The receiver's model does not hold the sender's weights."""


def pack(model: nn.Module, version: int) -> Bundle:
    """The model's state dict as a Bundle."""
    state = distinct(model)
    data = np.zeros(sum(_padded(tensor.nbytes) for tensor in state.values()), dtype=np.uint8)
    manifest, start = [], 0
    for name, tensor in state.items():
        raw = _bytes(tensor)
        data[start : start + raw.size] = raw
        manifest.append(Entry(name, _dtype(tensor), tuple(tensor.shape), start, zlib.crc32(raw)))
        start += _padded(raw.size)
    return Bundle(version, tuple(manifest), data)


def load(model: nn.Module, bundle: Bundle) -> None:
    """Copies the bundle into the model in place, then checks the model's own tensors by their checksums.

    A weight that the model stores in low precision is checked as it arrives, and rounded in place.
    Raises SyncError, which names the tensor: before anything is copied if a name, shape or dtype differs,
    after it if a checksum does. (crc32 takes 8 ms for 16 MB; blake2b would take four times that.)
    """
    state = _targets(model)
    sent = {entry.name: entry for entry in bundle.manifest}
    if stray := sorted(sent.keys() ^ state.keys()):
        side = "receiver" if stray[0] in sent else "sender"
        raise SyncError(f"{stray[0]}: the {side}'s model has no such tensor ({len(stray)} in all)")
    for name, tensor in state.items():
        here, there = (_dtype(tensor), tuple(tensor.shape)), sent[name][1:3]
        if here != there:
            raise SyncError(f"{name}: {there[0]} {there[1]} was sent, {here[0]} {here[1]} is here")
    for name, tensor in state.items():
        start = sent[name].offset
        size = tensor.shape.numel() * tensor.dtype.itemsize
        raw = torch.from_numpy(bundle.data[start : start + size].copy())  # torch takes no read-only array
        received = raw.view(tensor.dtype).reshape(tensor.shape)
        if isinstance(tensor, Stored):
            found = received
            tensor.take(received)
        else:
            found = tensor.copy_(received)
        if zlib.crc32(_bytes(found)) != sent[name].crc32:
            raise SyncError(f"{name}: checksum differs after loading version {bundle.version}")


def _targets(model: nn.Module) -> dict[str, Tensor | Stored]:
    """What takes each weight that is sent: the model's tensors, and what it stores in place of a master."""
    stored = stored_weights(model)
    codes = {f"{name}.{part}" for name, module in stored.items() for part, _ in module.named_buffers()}
    return {name: tensor for name, tensor in distinct(model).items() if name not in codes} | stored


def _bytes(tensor: Tensor) -> Any:
    """uint8 array [bytes], in a contiguous CPU tensor's own memory. Typed Any: zlib's stubs know no array."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _dtype(tensor: Tensor | Stored) -> str:
    return str(tensor.dtype).removeprefix("torch.")
