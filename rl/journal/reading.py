"""Journals read again: which requests go on, and from which token."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..trajectory import Finish, Past, Request
from . import format
from .format import BEGIN, FINISH, HEADER, STEP, Frames, JournalError, Recorded, Step, widen

REMOVED = "removed.json"
"""Of a folder: the digits of the journals that a compaction has done with, all at once, and is removing."""

_PENDING_BYTES = 1 << 26  # of steps whose rows are not with their requests yet


class Recovered(list[Request]):
    """Unfinished requests by id, each with its past (None before its first token)."""

    torn: dict[Path, int]  # bytes cut off the ends of files


def recover(folder: Path) -> Recovered:
    """Every unfinished request of all journals there, torn tails cut. Also while others write them, or compact them.

    The same request (all but its past) in several files was moved. It goes on from the longest history: each begins
    with what was known, so the longest lacks no token. It is finished if it is in any of them. In one file its last
    begin counts. What a file has finished does not come back from another: a folder is for requests that differ, not
    for the same ones under new weights.
    JournalError, with the file and the byte, for one that is damaged before its end.
    """
    files = read_all(folder, keep_finished=False)
    finished = {life.key for file in files for life in file.finished}
    best: dict[bytes, tuple[Life, Recorded]] = {}
    for file in files:
        for life in file.unfinished:
            if life.key not in finished and (life.key not in best or life.rank > best[life.key][0].rank):
                best[life.key] = (life, file.recorded)
    found = (replace(life.request, past=life.past(recorded)) for life, recorded in best.values())
    recovered = Recovered(sorted(found, key=lambda request: request.id))
    recovered.torn = {file.path: file.torn for file in files if file.torn}
    return recovered


@dataclass(eq=False)
class Life:
    """A request from one begin to its finish, or to the file's end."""

    request: Request  # without its past
    key: bytes  # equal for the same request in another file
    wanted: bool = True  # whether its rows are kept
    drawn: list[tuple[Any, ...]] = field(default_factory=list)  # tokens, logprobs, versions, sets: some rows each
    fed: list[tuple[Any, Any]] = field(default_factory=list)  # experts, picks: some rows each
    finish: Finish | None = None
    tokens: int | None = None  # of the response, once it is finished
    error: str = ""

    @property
    def rank(self) -> tuple[int, int]:
        """How many tokens it has, and how many of them decisions."""
        return sum(len(part[0]) for part in self.drawn), sum(map(_rows, self.fed))

    def drop(self) -> None:
        """Keeps no rows of it."""
        self.wanted = False
        self.drawn.clear()
        self.fed.clear()

    def past(self, recorded: Recorded) -> Past | None:
        """Its tokens, R; -1 in rows of decisions that are not known."""
        drawn = self.rank[0]
        count = drawn if self.tokens is None else self.tokens
        if not count:
            return None
        tokens, logprobs, versions = (np.concatenate([part[i] for part in self.drawn])[:count] for i in range(3))
        sets = [each.copy() for part in self.drawn for each in part[3]][:count] if recorded.sets else None
        experts, picks = (
            None if shape is None else np.full((drawn, *shape), -1, dtype)
            for shape, dtype in ((recorded.experts, np.int16), (recorded.picks, np.int32))
        )
        at = 0
        for part in self.fed:
            rows = slice(at, at + _rows(part))
            if experts is not None:
                experts[rows] = part[0]
            if picks is not None:
                widen(part[1], picks[rows])
            at = rows.stop
        experts, picks = (None if each is None else each[:count] for each in (experts, picks))
        return Past(tokens, logprobs, versions, experts, picks, sets)


class JournalFile:
    """A whole file, read. `keep_finished`: also the rows of its finished requests. JournalError as `recover` has it."""

    def __init__(self, path: Path, *, keep_finished: bool):
        self.path, self._keep = path, keep_finished
        self.id = ""  # the file's own digits; empty if it ends within its header
        self.recorded = Recorded()
        self.finished: list[Life] = []
        self._open: dict[int, Life] = {}
        self._slots: dict[int, int] = {}  # of the open requests' ids, in _lives
        self._lives: list[Life] = []
        self._pending: list[tuple[list[int], list[int], Step]] = []  # with the slots of its rows, drawn and fed
        self._pending_bytes = 0
        read: dict[int, Callable[[bytes], None]] = {BEGIN: self._begin, STEP: self._step, FINISH: self._finish}
        frames = Frames(path)
        try:
            for kind, payload in frames:
                if not self.id and kind == HEADER:
                    self.id, self.recorded = format.read_header(payload)
                elif self.id and kind in read:
                    read[kind](payload)
                else:
                    raise ValueError(f"a frame of kind {kind} has no place there")
            self._settle()
            self._check()
        except ValueError as error:
            raise JournalError(f"{path}: frame at byte {frames.place}: {error}") from error
        self.torn = frames.torn

    @property
    def unfinished(self) -> list[Life]:
        return list(self._open.values())

    def _begin(self, payload: bytes) -> None:
        life = Life(format.read_begin(payload), blake2b(payload, digest_size=16).digest())
        request = life.request.id
        if request in self._open:
            self._open[request].drop()
        self._open[request], self._slots[request] = life, len(self._lives)
        self._lives.append(life)

    def _step(self, payload: bytes) -> None:
        step = format.read_step(payload, self.recorded)
        slots = [list(map(self._slots.get, ids.tolist())) for ids in (step.ids, step.fed)]
        if None in slots[0] or None in slots[1]:
            raise ValueError("a request that is not open")
        self._pending.append((slots[0], slots[1], step))  # pyright: ignore[reportArgumentType]
        self._pending_bytes += len(payload)
        if self._pending_bytes > _PENDING_BYTES:
            self._settle()

    def _finish(self, payload: bytes) -> None:
        request, tokens, how, error = format.read_finish(payload)
        if request not in self._open:
            raise ValueError(f"request {request}, which is not open, is finished")
        del self._slots[request]
        life = self._open.pop(request)
        life.finish, life.tokens, life.error = how, tokens, error
        if not self._keep:
            life.drop()
        self.finished.append(life)

    def _settle(self) -> None:
        """Gives the pending steps' rows to their requests."""
        drawn, fed, steps = (list(each) for each in zip(*self._pending, strict=True)) if self._pending else ([], [], [])
        self._pending, self._pending_bytes = [], 0
        columns = [[getattr(step, name) for step in steps] for name in ("tokens", "logprobs", "versions")]
        sets = [each for step in steps for each in step.sets or ()] if self.recorded.sets else None
        for life, rows, taken in self._by_life(drawn, columns):
            life.drawn.append((*taken, sets and [sets[i] for i in rows.tolist()]))
        experts = [step.experts for step in steps] if self.recorded.experts else None
        picks = _same_width([step.picks for step in steps]) if self.recorded.picks else None
        for life, _, taken in self._by_life(fed, [each for each in (experts, picks) if each is not None]):
            life.fed.append((taken[0] if experts else None, taken[-1] if picks else None))

    def _by_life(
        self, slots: list[list[int]], columns: list[list[np.ndarray]]
    ) -> Iterator[tuple[Life, np.ndarray, list[np.ndarray]]]:
        """For each request that is wanted: its rows of all, in order, and the columns there."""
        flat = np.fromiter(chain.from_iterable(slots), np.int64)
        if not len(flat):
            return
        whole = [np.concatenate(column) for column in columns]
        order = flat.argsort(kind="stable")
        borders = (np.diff(flat[order]) != 0).nonzero()[0] + 1
        for rows in np.split(order, borders):
            life = self._lives[flat[rows[0]]]
            if life.wanted:
                yield life, rows, [column[rows] for column in whole]

    def _check(self) -> None:
        """ValueError for a request that has more decisions, or a longer response, than tokens."""
        for life in self._lives:
            if life.wanted and max(life.rank[1], life.tokens or 0) > life.rank[0]:
                raise ValueError(f"request {life.request.id}: {life.rank[0]} tokens, decisions of {life.rank[1]}")


def read_all(folder: Path, *, keep_finished: bool) -> list[JournalFile]:
    """Every journal of a folder, by name, but those that a compaction is removing.

    It begins again if a file has gone meanwhile: what another said of a request could be out of date without it.
    """
    while True:
        with suppress(FileNotFoundError):
            files = [JournalFile(path, keep_finished=keep_finished) for path in journals(folder)]
            gone = removed(folder)
            return [file for file in files if file.id not in gone]


def removed(folder: Path) -> list[str]:
    """The digits of the journals that a compaction is removing."""
    with suppress(FileNotFoundError):
        return json.loads((folder / REMOVED).read_text())
    return []


def digits(path: Path) -> str:
    """A journal's own, of its header alone; empty if it has none yet."""
    for _, payload in Frames(path):
        return format.read_header(payload)[0]
    return ""


def journals(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.journal") if path.is_file())


def _rows(part: tuple[Any, Any]) -> int:
    experts, picks = part
    return len(picks if experts is None else experts)


def _same_width(picks: list[Any]) -> list[np.ndarray]:
    """int32, each as wide as the widest."""
    width = max((each.shape[2] for each in picks), default=0)
    wide = [np.full((*each.shape[:2], width), -1, np.int32) for each in picks]
    for each, out in zip(picks, wide, strict=True):
        widen(each, out)
    return wide
