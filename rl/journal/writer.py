"""The journal's writer, on the engine's side: one frame a step, in the file before `append` returns.

Why no thread takes the bytes: a write of a step's 30 KB into the page cache takes about 10 us, less than handing them
over would, and what is in the page cache survives the process. A queue would lose what is in it.
"""

import errno
import fcntl
import os
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...model.shards import flush
from ..trajectory import Past, Request, Trajectory
from . import format
from .format import F32, I16, I32, I64, JournalError, Recorded, Step

_PAST_ROWS = 1024  # of a request's past in one frame
_CLOSING_SECONDS = 60.0


class Journal:
    """Writes folder/NAME.journal, a new file: each start of a worker has a name of its own.

    Every call's bytes are written when it returns: the death of the process loses nothing. A thread calls fsync each
    `flush_seconds`: the death of the node loses at most what was written since the last fsync began, that is those
    seconds and an fsync's time. The file is locked (flock) as long as it is open, so that nobody takes it for done.

    `experts` [L, k], `picks` [C, K] and `sets` say what is recorded. JournalError, with file and reason: the file
    cannot be made, or written (by any call, also for an fsync that failed before it). After that the journal is closed
    for good; what it holds so far is valid, and its end may be torn. ValueError: wrong arguments, of which nothing is
    written. All calls are to come from one thread.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        experts: tuple[int, int] | None = None,
        picks: tuple[int, int] | None = None,
        sets: bool = False,
        flush_seconds: float = 1.0,
    ):
        if not name or name != Path(name).name or name.startswith("."):
            raise ValueError(f"{name!r}: a journal's name is that of a file")
        self.path = folder / f"{name}.journal"
        self.recorded = Recorded(experts, picks, sets)
        # Of the requests that are open: their ids in order, and how many tokens each has, and has decisions of.
        self._ids, self._tokens, self._fed = (np.zeros(0, np.int64) for _ in range(3))
        self._error = ""  # why nothing can be written any more
        self._closed = False
        self._written = 0  # bytes
        self._lock = threading.Lock()  # around what needs the descriptor to stay open, or closes it
        self._closing = threading.Event()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # before there is a header: see compact
            flush(folder)
        except OSError as error:
            raise JournalError(f"{self.path}: {error.strerror}") from error
        self._flusher = threading.Thread(target=self._flush, args=(flush_seconds,), name=f"flush {name}", daemon=True)
        self._flusher.start()
        self._write(format.file_start(secrets.token_hex(8), self.recorded))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, request: Request) -> None:
        """A request that this worker takes up, with its past: from where it was before, this journal included.

        If its id is open here already, what this journal has of it is replaced.
        """
        self._check_usable()
        prompt, allowed, past = request.prompt_ids, request.params.allowed, request.past
        if not all(-(2**63) <= number < 2**63 for number in (request.id, request.group)):
            raise ValueError(f"request {request.id} of group {request.group}: not within 64 bits")
        _check("prompt_ids", prompt, I32, len(prompt))
        if prompt.min(initial=0) < 0:
            raise ValueError(f"prompt_ids: request {request.id} has a negative one")
        if allowed is not None:
            _check("allowed", allowed, np.dtype(bool), len(allowed))
        count, known = (0, 0) if past is None else (len(past.response_ids), _known(past, self.recorded))
        frames = [format.begin_frame(request)]
        if past is not None:
            for name in ("experts", "picks", "sets"):
                if (rows := getattr(past, name)) is not None and len(rows) != count:
                    raise ValueError(f"past: request {request.id} has {count} tokens, and {name} of {len(rows)}")
            steps = (self._past_step(request.id, past, start, known) for start in range(0, count, _PAST_ROWS))
            frames += map(format.step_frame, steps)
        self._write(b"".join(frames))
        at = int(np.searchsorted(self._ids, request.id))
        if not self._is_open(request.id):
            self._ids, self._tokens, self._fed = (
                np.insert(each, at, value) for each, value in zip(self._open(), (request.id, 0, 0), strict=True)
            )
        self._tokens[at], self._fed[at] = count, known

    def append(
        self,
        ids: np.ndarray,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        versions: np.ndarray,
        *,
        sets: Sequence[np.ndarray] | None = None,
        fed: np.ndarray | None = None,
        experts: np.ndarray | None = None,
        picks: np.ndarray | None = None,
    ) -> None:
        """What one step of the engine gave, of all requests: call it once a step.

        New tokens: ids int64 [n] of the requests, tokens int32 [n], logprobs float32 [n], versions int32 [n] of the
        policy, sets n of int32. A request that gets two tokens (a draft of which was accepted) has two rows, in order.

        Decisions of the tokens that this step fed, drawn now or in earlier steps: fed int64 [m], the requests, and
        experts int16 [m, L, k], picks int32 [m, C, at most K]. A request's response tokens get their decisions in
        order, each once: a row is of its first one that has none so far. Prompts' tokens have no rows, nor have
        rejected drafts, nor tokens whose decisions came with the request's past and that are only fed again.
        """
        self._check_usable()
        step = self._step(
            ids, tokens, logprobs, versions, sets, np.zeros(0, np.int64) if fed is None else fed, experts, picks
        )
        drawn = self._rows(step.ids)
        same = np.array_equal(step.fed, step.ids)  # as a decoding step has it
        count, known = self._tokens + drawn, self._fed + (drawn if same else self._rows(step.fed))
        if (known > count).any():
            raise ValueError(f"request {self._ids[known > count][0]}: decisions of a token that it does not have")
        if len(step.ids) or len(step.fed):
            self._write(format.step_frame(step))
            self._tokens, self._fed = count, known

    def finish(self, trajectory: Trajectory) -> None:
        """The request is done: its response is the first tokens of those that were appended."""
        self._check_usable()
        request, count = trajectory.request, len(trajectory.response_ids)
        at = int(np.searchsorted(self._ids, request))
        if not self._is_open(request):
            raise ValueError(f"request {request} is not open")
        if count > self._tokens[at]:
            raise ValueError(f"request {request}: a response of {count} tokens, of which {self._tokens[at]} came here")
        self._write(format.finish_frame(request, count, trajectory.finish, trajectory.error))
        self._ids, self._tokens, self._fed = (np.delete(each, at) for each in self._open())

    def close(self) -> None:
        """Waits until all is on the disk, and unlocks the file. JournalError if that fails."""
        self._closing.set()
        self._flusher.join(_CLOSING_SECONDS)
        if self._flusher.is_alive():
            raise JournalError(f"{self.path}: its last fsync took longer than {_CLOSING_SECONDS:.0f} s")
        if self._error:
            raise JournalError(self._error)

    def _past_step(self, request: int, past: Past, start: int, known: int) -> Step:
        """Rows of a past as if a step had drawn and fed them; of all its tokens the first `known` have decisions."""
        rows = slice(start, start + _PAST_ROWS)
        tokens, logprobs, versions = past.response_ids[rows], past.logprobs[rows], past.versions[rows]
        n, m = len(tokens), min(max(known - start, 0), len(tokens))
        sets = past.sets[rows] if self.recorded.sets and past.sets is not None else None
        experts = past.experts[start : start + m] if self.recorded.experts and past.experts is not None else None
        picks = past.picks[start : start + m] if self.recorded.picks and past.picks is not None else None
        ids = np.full(n, request, np.int64)
        return self._step(ids, tokens, logprobs, versions, sets, ids[:m], experts, picks)

    def _step(
        self, ids: Any, tokens: Any, logprobs: Any, versions: Any, sets: Any, fed: Any, experts: Any, picks: Any
    ) -> Step:
        """ValueError that names what is not as `append` says."""
        n, m = len(ids), len(fed)
        for name, value, dtype in (
            ("ids", ids, I64), ("tokens", tokens, I32), ("logprobs", logprobs, F32), ("versions", versions, I32)
        ):  # fmt: skip
            _check(name, value, dtype, n)
        _check("fed", fed, I64, m)
        if n and (tokens.min() < 0 or versions.min() < 0):
            raise ValueError("tokens, versions: a number is negative")
        recorded = self.recorded
        if recorded.sets != (sets is not None) or (sets is not None and len(sets) != n):
            raise ValueError(f"sets: one for each new token if they are recorded, else None; recorded: {recorded.sets}")
        for each in sets or ():
            _check("sets", each, I32, len(each))
        if not m:
            experts, picks = (
                None if shape is None else np.zeros((0, *shape), dtype)
                for shape, dtype in ((recorded.experts, I16), (recorded.picks, I32))
            )
        if m and not (recorded.experts or recorded.picks):
            raise ValueError("fed: this journal records neither experts nor picks")
        for name, value, shape, dtype in (
            ("experts", experts, recorded.experts, I16), ("picks", picks, recorded.picks, I32)
        ):  # fmt: skip
            if (shape is None) != (value is None):
                raise ValueError(f"{name}: an array if they are recorded, else None; recorded: {shape}")
            if value is not None and shape is not None:
                few = name == "picks" and value.shape[-1] < shape[1]
                _check(name, value, dtype, m, shape[0], value.shape[-1] if few else shape[1])
        if picks is not None and picks.min(initial=-1) < -1:
            raise ValueError("picks: a number below -1")
        return Step(ids, tokens, logprobs, versions, sets, fed, experts, picks)

    def _open(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._ids, self._tokens, self._fed

    def _is_open(self, request: int) -> bool:
        return bool((self._ids == request).any())

    def _rows(self, ids: np.ndarray) -> Any:
        """How many of the rows are of each open request. ValueError for one that is not open."""
        if not len(ids):
            return 0
        if not len(self._ids):
            raise ValueError(f"request {ids[0]} is not open")
        at = self._ids.searchsorted(ids)
        wrong = self._ids.take(at, mode="clip") != ids
        if wrong.any():
            raise ValueError(f"request {ids[wrong][0]} is not open")
        return np.bincount(at, minlength=len(self._ids))

    def _check_usable(self) -> None:
        if self._error or self._closed:
            raise JournalError(self._error or f"{self.path}: is closed")

    def _write(self, data: bytes) -> None:
        """All of it, in one call as a rule."""
        with self._lock:
            self._check_usable()
            left = memoryview(data)
            try:
                while left:
                    written = os.write(self._file, left)
                    if not written:
                        raise OSError(errno.EIO, "nothing more can be written")
                    left = left[written:]
            except OSError as error:
                self._error = f"{self.path}: {error.strerror}; the journal is closed"
                self._closing.set()
                raise JournalError(self._error) from error
            self._written += len(data)

    def _flush(self, seconds: float) -> None:
        """The thread: fsync while something new is there, then closes the file."""
        done = 0
        try:
            while not self._closing.wait(seconds) or done < self._written:
                if done < self._written:
                    written = self._written
                    os.fsync(self._file)
                    done = written
        except OSError as error:
            self._error = self._error or f"{self.path}: fsync: {error.strerror}; the journal is closed"
        finally:
            with self._lock:
                self._closed = True
                os.close(self._file)


def _known(past: Past, recorded: Recorded) -> int:
    """How many of its tokens have decisions, or come before one that has."""
    rows = past.experts if recorded.experts else past.picks  # a token that sees no entry yet has no pick
    if not (recorded.experts or recorded.picks) or rows is None or (recorded.picks and past.picks is None):
        return 0
    known = np.flatnonzero((rows >= 0).any((1, 2)))
    return int(known[-1]) + 1 if len(known) else 0


def _check(name: str, value: np.ndarray, dtype: np.dtype, *shape: int) -> None:
    is_array = isinstance(value, np.ndarray)
    if not is_array or (value.dtype, value.shape) != (dtype, shape) or not value.flags.c_contiguous:
        found = f"{value.dtype} {value.shape}" if is_array else type(value).__name__
        raise ValueError(f"{name}: {found}; wanted: {dtype} {shape}, contiguous")
