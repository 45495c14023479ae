"""How a learner's weights get to whoever runs the policy: `Sender` and `Receiver`, and three ways between them.

- store: through Ray's object store, which is shared memory that all processes of a node read where it lies. On a CPU
  Ray copies the model's own memory into it. Whoever comes later takes the same.
- broadcast: between GPUs, by `broadcast.py`.
- ipc: within a GPU, which NCCL does not serve: receivers there map a copy that lies beside the learner's model.

The handle has the manifest of all tensors, and says which of them travel: those that the sender has ever changed since
it and its receivers loaded the same checkpoint. So what is frozen stays at home, and a worker that starts late needs no
more than the others.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from .broadcast import BUCKET, Group, Meeting
from .offload import Offload
from .weights import Intake, Manifest, SyncError, as_bytes, buckets, describe, fill, padded

SECONDS = 120.0
"""Deadline of each wait of a broadcast: a bucket takes milliseconds, NCCL's start seconds."""

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

Way = Literal["store", "broadcast", "ipc"]


class Place(NamedTuple):
    """A process: its name, which no other has, its GPU's uuid ("": it computes on a CPU), its machine's address."""

    name: str
    gpu: str = ""
    host: str = "127.0.0.1"


@dataclass(frozen=True, eq=False)
class Handle:
    """What a receiver needs for a version."""

    version: int
    manifest: Manifest  # of all tensors
    moved: tuple[int, ...]  # the entries that travel


@dataclass(frozen=True, eq=False)
class InStore(Handle):
    """`data` uint8 [bytes] of each moved tensor. On a CPU it is the sender's own memory until Ray has written it; it
    comes out of the store without a copy, read-only."""

    data: tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class Broadcast(Handle):
    """`Sender.send` and every member's `Receiver.receive` run at the same time."""

    meeting: Meeting
    capacity: int  # of a bucket, in bytes


@dataclass(frozen=True, eq=False)
class Lent(Handle):
    """By receiver, the shared memory as `torch.UntypedStorage._share_cuda_` describes it, and how many bytes it is."""

    loans: dict[str, tuple[tuple[Any, ...], int]]


def here(role: str, device: str) -> Place:
    """This process, which computes on the current GPU if `device` is "cuda"."""
    import ray

    gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid) if device == "cuda" else ""
    host = ray.util.get_node_ip_address()
    return Place(f"{role} (pid {os.getpid()} on {host})", gpu, host)


def choose(ranks: Sequence[Place], receivers: Sequence[Place]) -> Way:
    """The way from a learner's ranks. Where only some receivers share a GPU, with a rank or with each other, it is the
    store: a member of NCCL's group needs a GPU to itself."""
    ours, theirs = {place.gpu for place in ranks}, [place.gpu for place in receivers]
    if not theirs or "" in {*ours, *theirs}:
        return "store"
    if ours.issuperset(theirs):
        return "ipc"
    return "broadcast" if ours.isdisjoint(theirs) and len(set(theirs)) == len(theirs) else "store"


class Sender:
    """`model`: as its receivers have loaded it too; None: they have something else, and everything travels."""

    def __init__(self, model: nn.Module | None, place: Place):
        self._loaded = {entry.name: entry.checksum for entry in describe(model)} if model else {}
        self._changed: set[str] = set()  # since; a tensor may go back to what it was, and its receivers with it
        self._place = place
        self._store: Any = None
        self._generation, self._members, self._group = 0, (place.name,), None
        self._lent: Tensor | None = None

    def publish(
        self, model: nn.Module, version: int, way: Way = "store", to: Sequence[Place] = (), capacity: int = BUCKET
    ) -> Handle:
        """The handle of the model's weights as they are. They must stay so until the receivers `to` have them."""
        manifest = describe(model)
        self._changed |= {entry.name for entry in manifest if self._loaded.get(entry.name) != entry.checksum}
        handle = Handle(version, manifest, tuple(i for i, each in enumerate(manifest) if each.name in self._changed))
        common = (version, manifest, handle.moved)
        if way == "broadcast":
            return Broadcast(*common, self._meet([place.name for place in to]), capacity)
        if way == "ipc":
            return Lent(*common, self._lend(_raw(model, handle), to))
        # Tensor.numpy would forbid that the memory is ever offloaded
        return InStore(*common, tuple(np.from_dlpack(each.cpu()) for each in _raw(model, handle)))

    def take_back(self) -> None:
        """What was lent: all receivers have it."""
        self._lent = None

    def send(self, model: nn.Module, handle: Broadcast, seconds: float = SECONDS) -> None:
        """The sender's part of a broadcast; it ends when all have checked it. After a failure a new group meets."""
        try:
            self._group = self._group or Group(handle.meeting, 0, _device(model), seconds)
            self._group.send(_raw(model, handle), handle.capacity)
        except BaseException:
            self._group, self._members = None, (self._place.name,)
            raise

    def _meet(self, receivers: Sequence[str]) -> Meeting:
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        if self._store is None:
            self._store = TCPStore(self._place.host, 0, is_master=True, wait_for_workers=False)
        members = (self._place.name, *receivers)
        if members != self._members:
            if self._group:
                self._group.close()
            self._generation, self._members, self._group = self._generation + 1, members, None
        return Meeting(self._place.host, self._store.port, self._generation, members)

    def _lend(self, raw: Sequence[Tensor], to: Sequence[Place]) -> dict[str, Any]:
        for name in _ALLOCATOR:
            if "expandable_segments:True" in os.environ.get(name, ""):
                raise UserError(f"{name}: expandable_segments:True has memory that cannot be lent to another process")
        size = sum(padded(len(each)) for each in raw)
        if not size:
            return {place.name: ((), 0) for place in to}
        # A new storage each time: torch keeps count of a storage's borrowers for as long as it lives.
        (pieces,) = buckets(map(len, raw), size)
        self._lent = fill(torch.empty(size, dtype=torch.uint8, device=raw[0].device), pieces, raw)
        torch.cuda.synchronize()
        return {place.name: (self._lent.untyped_storage()._share_cuda_(), size) for place in to}


class Receiver:
    """`seconds`: the deadline of each wait of a broadcast."""

    def __init__(self, place: Place, seconds: float = SECONDS):
        self._place, self._seconds = place, seconds
        self._group: Group | None = None

    def receive(self, model: nn.Module, handle: Handle) -> None:
        """The handle's weights into the model, in place, then a look at their checksums.

        Raises SyncError, which names the tensor: before anything is copied if a name, shape or dtype differs, after it
        if a checksum does.
        """
        if isinstance(handle, Broadcast):
            group = self._join(handle, _device(model))
            return group.receive(handle.manifest, handle.moved, handle.capacity, lambda: _intake(model, handle))
        intake = _intake(model, handle)
        arrivals = self._borrowed(handle) if isinstance(handle, Lent) else _read(handle)
        for index, data in zip(handle.moved, arrivals, strict=True):
            intake.take(index, 0, data)
        intake.finish()  # it waits for the GPU, and so nothing lent is still being read

    def _join(self, handle: Broadcast, device: torch.device) -> Group:
        meeting, name = handle.meeting, self._place.name
        if name not in meeting.members:
            raise SyncError(f"version {handle.version} goes to {', '.join(meeting.members[1:])}; this is {name}")
        if self._group is None or self._group.meeting != meeting or self._group.closed:
            if self._group:
                self._group.close()
            self._group = Group(meeting, meeting.members.index(name), device, self._seconds)
        return self._group

    def _borrowed(self, handle: Lent) -> Iterator[Tensor]:
        name = self._place.name
        if name not in handle.loans:
            raise SyncError(f"version {handle.version} is lent to {', '.join(handle.loans)}; this is {name}")
        shared, size = handle.loans[name]
        if not size:
            return
        device = torch.device("cuda", torch.cuda.current_device())  # which may have another number at the sender's
        storage = torch.UntypedStorage._new_shared_cuda(device.index, *shared[1:])
        whole = torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (size,), (1,))
        for p in buckets((handle.manifest[index].nbytes for index in handle.moved), size)[0]:
            yield whole[p.place : p.place + p.size]


def from_host(model: nn.Module, handle: Handle, offloaded: Offload) -> InStore:
    """The same weights through the store, after they were offloaded."""
    data = (offloaded.host(each).numpy() for each in _raw(model, handle))
    return InStore(handle.version, handle.manifest, handle.moved, tuple(data))


def publish(model: nn.Module, version: int) -> InStore:
    """All of a model's weights, for whoever reads them."""
    handle = Sender(None, Place("the sender")).publish(model, version)
    assert isinstance(handle, InStore)
    return handle


def receive(model: nn.Module, handle: InStore) -> None:
    """`Receiver.receive` of what needs no group."""
    Receiver(Place("the receiver")).receive(model, handle)


def _intake(model: nn.Module, handle: Handle) -> Intake:
    return Intake(model, handle.manifest, handle.moved, handle.version)


def _raw(model: nn.Module, handle: Handle) -> list[Tensor]:
    state = model.state_dict()
    return [as_bytes(state[handle.manifest[index].name]) for index in handle.moved]


def _read(handle: Handle) -> Iterator[Tensor]:
    assert isinstance(handle, InStore)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to it
        yield from map(torch.from_numpy, handle.data)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
