"""What the rollout service decides, without its processes: who gets which request, and what to do when a worker dies.

A worker here is a number; a dead worker's is never used again. Nothing in this file waits, and nothing imports Ray.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from .trajectory import Finish, Past, Request, Trajectory

MAX_DEATHS = 3
"""A worker that dies is replaced. So many deaths in a row at one place, with nothing sampled between, end the run."""


def room(max_batch: int) -> int:
    """The most requests that a worker may have, whose engine feeds `max_batch` at once.

    A quarter more (our choice): enough that no slot is empty until others are sent, and few that wait in an engine,
    where they hold the tail, and where what a death broke off has to wait behind them.
    """
    return max_batch + max(1, max_batch // 4)


class Router:
    """Requests that wait, and those that are with a worker.

    - The members of a group go to one worker, so that its prompt is computed once: the least loaded one, by the most
      tokens that what is with it can still take.
    - A worker has at most `room` requests. The others wait here, and go to whoever has room first: a slow worker does
      not hold the tail. A group goes when there is room for all of it, or for half of what a worker may have.
    - Members that did not fit follow the others of their group. They go elsewhere, which costs their prompt once more,
      only to a worker that has nothing to do.
    - Those that have waited longest go first, and what a dead worker left before all others.
    """

    def __init__(self, room: int):
        self.room = room
        self._waiting: dict[int, list[Request]] = {}  # by group
        self._workers: dict[int, _Load] = {}
        self._ids: set[int] = set()  # of all requests here

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._ids)

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, requests: Iterable[Request]) -> None:
        """ValueError for an id that is here already."""
        for request in requests:
            if request.id in self._ids:
                raise ValueError(f"request {request.id} is on its way already; give each its own id")
            self._ids.add(request.id)
            self._waiting.setdefault(request.group, []).append(request)

    def join(self, worker: int) -> None:
        self._workers[worker] = _Load()

    def leave(self, worker: int) -> list[Request]:
        """What the worker had, which is not here any more."""
        held = self._workers.pop(worker).held
        self._ids -= held.keys()
        return list(held.values())

    def again(self, requests: Iterable[Request]) -> None:
        """What a dead worker left, before all others."""
        later, self._waiting = self._waiting, {}
        self.add(requests)
        for group, members in later.items():
            self._waiting.setdefault(group, []).extend(members)

    def holds(self, worker: int) -> list[Request]:
        return list(self._workers[worker].held.values())

    def finish(self, worker: int, request: int) -> bool:
        """Whether the worker had it, which it has not any more."""
        known = request in self._workers[worker].held
        if known:
            self._workers[worker].drop(request)
            self._ids.remove(request)
        return known

    def take_back(self, requests: Iterable[int]) -> list[Request]:
        """Those of the requests that still wait here, and do not any more."""
        wanted, taken = set(requests), []
        for group, members in list(self._waiting.items()):
            taken += [r for r in members if r.id in wanted]
            self._keep(group, [r for r in members if r.id not in wanted])
        self._ids -= {r.id for r in taken}
        return taken

    def assign(self) -> dict[int, list[Request]]:
        """What is to be sent now, by worker; from here on it counts as with them."""
        sent: dict[int, list[Request]] = {}
        for group in list(self._waiting):
            while members := self._waiting.get(group, []):
                worker = self._choice(group, len(members))
                if worker is None:
                    break
                count = self.room - len(self._workers[worker].held)
                for request in members[:count]:
                    self._workers[worker].take(request)
                sent.setdefault(worker, []).extend(members[:count])
                self._keep(group, members[count:])
            if members and not self._homes(group):
                break  # no worker can take a whole group; those behind it do not overtake
        return sent

    def _homes(self, group: int) -> list[int]:
        return [worker for worker, load in self._workers.items() if load.groups[group]]

    def _choice(self, group: int, members: int) -> int | None:
        """The worker for the next members of a group; None where they have to wait."""
        homes = self._homes(group)
        if homes:
            able = [worker for worker in homes if len(self._workers[worker].held) < self.room]
            able = able or [worker for worker, load in self._workers.items() if not load.held]
        else:
            need = min(members, max(1, self.room // 2))
            able = [worker for worker, load in self._workers.items() if self.room - len(load.held) >= need]
        return min(able, key=lambda worker: self._workers[worker].tokens, default=None)

    def _keep(self, group: int, members: list[Request]) -> None:
        if members:
            self._waiting[group] = members
        else:
            del self._waiting[group]


@dataclass
class _Load:
    """What a worker has. `tokens`: the most that it can still feed, a group's prompt once."""

    held: dict[int, Request] = field(default_factory=dict)
    groups: Counter[int] = field(default_factory=Counter)
    tokens: int = 0

    def take(self, request: Request) -> None:
        if not self.groups[request.group]:
            self.tokens += len(request.prompt_ids)
        self.tokens += request.params.max_new_tokens  # past tokens, which are fed again, and those to come
        self.held[request.id] = request
        self.groups[request.group] += 1

    def drop(self, request_id: int) -> None:
        request = self.held.pop(request_id)
        self.groups[request.group] -= 1
        self.tokens -= request.params.max_new_tokens
        if not self.groups[request.group]:
            self.tokens -= len(request.prompt_ids)


class Settled(NamedTuple):
    """What a dead worker's requests come to."""

    again: list[Request]  # that go on elsewhere, with their past
    tokens: int  # that it had sampled for them


def settle(held: list[Request], journaled: list[Request]) -> Settled:
    """`held`: what the worker had by our books. `journaled`: what its journal knows, also of what had finished.

    A request that the journal lacks had not reached the engine, and goes on from where it was when it was sent. One
    whose response was whole is not sampled again either: an engine ends it at once, and its prefill gives the records
    of the prompt, which no journal has. What the journal knows beyond our books has been delivered.
    """
    pasts = {request.id: request.past for request in journaled}
    again = [replace(request, past=pasts.get(request.id) or request.past) for request in held]
    return Settled(again, sum(map(_length, again)) - sum(map(_length, held)))


def _length(request: Request) -> int:
    return len(request.past.response_ids) if request.past is not None else 0


class Deaths:
    """Counts deaths by the place whose worker died. A place's count starts anew where its worker had served, and any
    worker had sampled since the death before: whoever kills workers that do their work ends no run."""

    def __init__(self):
        self.total = 0
        self._in_a_row: Counter[int] = Counter()
        self._tokens: dict[int, int] = {}  # at the last death

    def count(self, place: int, served: bool, tokens: int) -> int:
        """Deaths in a row at that place. `tokens`: that all workers have sampled so far."""
        self.total += 1
        went_on = served and tokens > self._tokens.get(place, 0)
        self._in_a_row[place] = 1 if went_on else self._in_a_row[place] + 1
        self._tokens[place] = tokens
        return self._in_a_row[place]


@dataclass
class Report:
    """What a worker says when it is asked: how it is now, and what came since it was asked before."""

    version: int = 0  # of its policy
    steps: int = 0  # of its engine, so far
    stalled: float = 0.0  # seconds for which the present step has gone on
    finished: list[Trajectory] = field(default_factory=list)
    tokens: int = 0  # sampled
    active: int = 0  # steps, over which the next two are summed
    running: float = 0.0
    waiting: float = 0.0
    cache_use: float = 0.0  # the highest, as a share
    preemptions: float = 0.0
    journal_lost: bool = False  # given up, as its disk is full
    first_tokens: list[float] = field(default_factory=list)  # seconds from submission, one for each request

    def step(self, metrics: dict[str, float]) -> None:
        """One more step of the engine, its metrics after it, and how many requests gave way in it."""
        self.active += 1
        self.running += metrics["running"]
        self.waiting += metrics["waiting"]
        self.cache_use = max(self.cache_use, metrics["cache_use"])
        self.preemptions += metrics["preemptions"]
        self.journal_lost = bool(metrics["journal_lost"])


class Meter:
    """Sums up the reports of all workers between two looks at them."""

    def __init__(self):
        self._reports: list[Report] = []

    def add(self, report: Report) -> None:
        self._reports.append(replace(report, finished=[]))

    def read(self, seconds: float, deaths: int) -> dict[str, float]:
        """The metrics of `seconds` in which there was something to do, by their names in metrics.jsonl; then anew.

        `batch` and `queue` are means over the engines' steps, of one worker; `cache_use` is the highest.
        """
        reports, self._reports = self._reports, []
        steps = max(1, sum(r.active for r in reports))
        first = [each for r in reports for each in r.first_tokens]
        return {
            "rollout/tokens_per_second": sum(r.tokens for r in reports) / seconds if seconds else 0.0,
            "rollout/batch": sum(r.running for r in reports) / steps,
            "rollout/queue": sum(r.waiting for r in reports) / steps,
            "rollout/cache_use": max((r.cache_use for r in reports), default=0.0),
            "rollout/preemptions": sum(r.preemptions for r in reports),
            "rollout/time_to_first_token": float(np.median(first)) if first else 0.0,
            "rollout/deaths": float(deaths),
        }


def unsampled(request: Request, finish: Finish, error: str = "") -> Trajectory:
    """Of a request that ends without an engine: the tokens that it came with, if any, and no record of experts."""
    none = np.zeros(0, np.int32)
    past = request.past or Past(none, none.astype(np.float32), none)
    return Trajectory(
        request=request.id,
        group=request.group,
        prompt_ids=request.prompt_ids,
        response_ids=past.response_ids,
        logprobs=past.logprobs,
        experts=np.zeros((0, 0, 0), np.int16),
        versions=past.versions,
        finish=finish,
        text="",
        error=error,
    )
