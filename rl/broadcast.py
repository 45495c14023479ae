"""A learner's weights to several workers at once: one process group of their own, a flat bucket at a time.

There are two buckets: one is packed, or unpacked, while the other is under way. The group is NCCL's between GPUs (each
member has its own), and Gloo's on the CPU, for tests. Its members meet at a store that the sender opens, and go on with
the same group until one of them changes or fails; then the next generation meets.

Every wait has a deadline and names who is missing; who fails tells the others, through the store. A member that dies
may leave the others in a collective of NCCL, which then is aborted.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import DistError, PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from .weights import Intake, Manifest, Piece, SyncError, buckets, fill, filled

BUCKET = 2**28
"""Bytes of one broadcast: two such buffers are a small part of a GPU, and NCCL needs tens of MB to reach its rate."""

_LOOK_SECONDS = 0.05  # between two looks whether another member has failed
_PATIENCE = 3  # NCCL's watchdog in torch, which ends the process, acts after so many of our deadlines


class Meeting(NamedTuple):
    """Where a group meets, and who: the sender, then the receivers, by unique names."""

    host: str
    port: int
    generation: int
    members: tuple[str, ...]


class Group:
    """One member's side. Any failure closes it for good. `seconds`: the deadline of every wait."""

    def __init__(self, meeting: Meeting, rank: int, device: torch.device, seconds: float):
        self.meeting, self._rank, self._device, self._seconds = meeting, rank, device, seconds
        self.closed = False
        self._round = 0
        self._backend: Any = None
        self._keys: Any = None
        with self._closing():
            store = TCPStore(meeting.host, meeting.port, timeout=timedelta(seconds=seconds))
            self._keys = PrefixStore(f"weights/{meeting.generation}", store)
            self._keys.set(f"joined/{rank}", "")
            self._all("joined", range(len(meeting.members)), "the members of a broadcast of weights to meet")
            self._backend = self._connect(store)

    def send(self, raw: Sequence[Tensor], capacity: int) -> None:
        """The sender's part: the tensors, as bytes, to all. It ends when all have taken and checked them."""
        self._round += 1
        with self._closing():
            self._send(raw, capacity)

    def receive(self, manifest: Manifest, moved: Sequence[int], capacity: int, start: Callable[[], Intake]) -> None:
        """A receiver's part; `start` makes what takes the bytes."""
        self._round += 1
        with self._closing():
            self._receive([manifest[index].nbytes for index in moved], moved, capacity, start())
            self._keys.set(f"{self._round}/done/{self._rank}", "")

    def close(self) -> None:
        if self._backend is not None and self._device.type == "cuda":
            self._backend.abort()
        self._backend, self.closed = None, True

    def _send(self, raw: Sequence[Tensor], capacity: int) -> None:
        plan = buckets([each.numel() for each in raw], capacity)
        memory, works = self._memory(plan), []
        for i, pieces in enumerate(plan):
            if i >= 2:
                self._finish(works[i - 2], i - 2, len(plan))
            works.append(self._start(fill(memory[i % 2], pieces, raw)))
        for i in range(max(len(plan) - 2, 0), len(plan)):
            self._finish(works[i], i, len(plan))
        # Small buckets may still lie in a socket. After this the sender may change its weights.
        self._all(f"{self._round}/done", range(1, len(self.meeting.members)), "the receivers to check what they got")

    def _receive(self, sizes: Sequence[int], moved: Sequence[int], capacity: int, intake: Intake) -> None:
        plan = buckets(sizes, capacity)
        memory = self._memory(plan)
        parts = [memory[i % 2][: filled(pieces)] for i, pieces in enumerate(plan)]
        works = [self._start(part) for part in parts[:1]]
        for i, (part, pieces) in enumerate(zip(parts, plan, strict=True)):
            works += [self._start(further) for further in parts[i + 1 : i + 2]]  # into the other buffer
            self._finish(works[i], i, len(plan))
            for p in pieces:
                intake.take(moved[p.tensor], p.start, part[p.place : p.place + p.size])
            self._keys.set(f"{self._round}/{i}/{self._rank}", "")
        intake.finish()

    def _memory(self, plan: list[list[Piece]]) -> list[Tensor]:
        largest = max(map(filled, plan), default=0)
        return [torch.empty(largest, dtype=torch.uint8, device=self._device) for _ in plan[:2]]

    def _start(self, bucket: Tensor) -> Any:
        """On a GPU it goes beside the current stream, after what that has to do so far."""
        return self._backend.broadcast([bucket], torch.distributed.BroadcastOptions())  # of rank 0

    def _finish(self, work: Any, i: int, count: int) -> None:
        what = f"bucket {i + 1} of {count} to arrive"
        receivers = range(1, len(self.meeting.members))

        def late() -> list[int]:
            return self._missing(f"{self._round}/{i}", receivers) if not self._rank else [0]

        self._until(work.is_completed, what, late)
        try:
            work.wait()  # it raises what went wrong; on a GPU the current stream waits for it
        except RuntimeError as error:
            self._look()
            raise SyncError(f"{what}: the connection broke; without it {self._names(late())}") from error

    def _all(self, key: str, ranks: Sequence[int], what: str) -> None:
        """Until each of these ranks has set its key."""
        self._until(lambda: not self._missing(key, ranks), what, lambda: self._missing(key, ranks))

    def _missing(self, key: str, ranks: Sequence[int]) -> list[int]:
        return [rank for rank in ranks if not self._keys.check([f"{key}/{rank}"])]

    def _until(self, done: Callable[[], bool], what: str, late: Callable[[], list[int]]) -> None:
        began = looked = time.monotonic()
        while not done():
            now = time.monotonic()
            if now > looked + _LOOK_SECONDS:
                looked = now
                self._look()
            if now > began + self._seconds:
                raise TimeoutError(f"{what}: not done after {self._seconds:g} s; without it {self._names(late())}")
            time.sleep(1e-4)

    def _look(self) -> None:
        """Raises what another member failed of."""
        if self._keys.check(["failed"]):
            raise SyncError(self._keys.get("failed").decode())

    def _names(self, ranks: Sequence[int]) -> str:
        return ", ".join(self.meeting.members[rank] for rank in ranks) or "nobody"

    def _connect(self, store: Any) -> Any:
        prefixed = PrefixStore(f"group/{self.meeting.generation}", store)
        rank, size = self._rank, len(self.meeting.members)
        if self._device.type == "cuda":
            from torch.distributed import ProcessGroupNCCL  # pyright: ignore[reportPrivateImportUsage]

            options = ProcessGroupNCCL.Options()
            options._timeout = timedelta(seconds=_PATIENCE * self._seconds)
            return ProcessGroupNCCL(prefixed, rank, size, options)
        from torch.distributed import ProcessGroupGloo  # pyright: ignore[reportPrivateImportUsage]

        options: Any = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
        options._devices = [ProcessGroupGloo.create_device(interface="lo")]  # all on one host
        options._timeout = timedelta(seconds=self._seconds)  # for which letting go of it may wait: it cannot be aborted
        return ProcessGroupGloo(prefixed, rank, size, options)

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """What fails inside closes the group, after the others have been told."""
        try:
            yield
        except BaseException as error:
            host, port = self.meeting[:2]
            try:
                if self._keys is not None and not self._keys.check(["failed"]):
                    self._keys.set("failed", f"{self.meeting.members[self._rank]}: {error}")
            except DistError:
                error.add_note(f"(the sender's store at {host}:{port} does not answer either)")
            self.close()
            if isinstance(error, DistError):
                raise SyncError(f"the sender of the weights does not answer at {host}:{port}") from error
            raise
