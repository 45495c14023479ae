"""The rollout service, the driver's side: workers that sample from one policy, each in a process of its own.

Requests are sent as rl/router.py decides. Every token is in its worker's journal, in a folder that the driver can read,
before anybody sees it. When a worker dies, what it had begun goes on from its last token with the living workers, while
another one starts.
"""

import logging
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..settings import FULL, Precision
from .cluster import last_words, resources, wait
from .rollout_worker import CALLS, RolloutWorker
from .router import MAX_DEATHS, Deaths, Meter, Report, Router, room, settle, unsampled
from .settings import DEADLINE, EngineSettings
from .trajectory import Request, Trajectory

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 1.0  # after which a worker that has nothing to tell says so
_NO_END = float("inf")
ENGINE = EngineSettings()


class Rollouts:
    """`workers` replicas of one policy. For one thread.

    Every wait has a deadline: a call that a worker does not answer within `deadline` seconds, or a step of its engine
    that takes longer, counts as its death. RuntimeError, with the last one's words, after MAX_DEATHS deaths in a row at
    one place with nothing sampled between. What an engine's step raises is raised here.
    """

    kind = RolloutWorker

    def __init__(
        self,
        workers: int,
        *,
        gpus_per_actor: float = 0.0,
        group: Any = None,
        threads: int = 1,
        precision: Precision = FULL,
        deadline: float = DEADLINE,
    ):
        self._gpus, self._group = gpus_per_actor, group
        self._threads, self._precision, self._deadline = threads, precision, deadline
        self._calls: dict[Any, _Call] = {}  # by Ray's reference: what has not been answered
        self._places = [_Place(i) for i in range(workers)]
        self.workers = [self._start(place) for place in self._places]  # the actors, by place
        self._offloaded = False  # until `restore`
        self._loads = 0  # so far
        self._router = Router(0)
        self._scratch: Any = None  # a temporary folder, where nobody gives one

    def load(self, path: str | Path, *, journal: Path | None = None, settings: EngineSettings = ENGINE) -> None:
        """Every worker takes the policy of this checkpoint's folder, or preset, as version 0.

        `journal`: a folder for this policy's requests alone, on a disk that workers and driver share. What it holds is
        removed.
        """
        from ..model.config import resolve

        if len(self._router):
            raise RuntimeError(f"{len(self._router)} requests have not ended: no other policy can be loaded yet")
        self._until(lambda: not any(place.starts for place in self._places))  # of a worker only one load at a time
        self._offloaded = False
        self._path, self._settings = str(resolve(path).absolute()), settings
        self._handle, self._later, self._version, self._cache = None, None, 0, "keep"
        self._router, self._deaths, self._meter = Router(room(settings.max_batch)), Deaths(), Meter()
        self._ended: deque[Trajectory] = deque()  # to be handed out
        self._cancelled: set[int] = set()
        self._journals_used = False
        self._tokens = 0  # that all workers have sampled
        self._busy_since, self._busy_seconds, self._deaths_told = 0.0, 0.0, 0
        self._folder = journal or self._scratch_folder()
        if self._folder.is_dir():
            shutil.rmtree(self._folder)
        for place in self._places:
            self._prepare(place)
        self._until(lambda: all(place.serves for place in self._places))

    @property
    def receivers(self) -> list[Any]:
        """The `transport.Place` of each worker that serves, for `Learner.weights`."""
        return [place.where for place in self._places if place.serves]

    def sync(self, handle: Any, version: int, cache: str = "keep", later: Callable[[], Any] | None = None) -> None:
        """Every worker takes the learner's weights of that version (`Learner.weights`' reference).

        Requests in flight go on between two steps; `cache` "rebuild" computes anew what is cached for them. A worker
        that is starting takes them before it serves: the same handle, or one that `later` gives where the handle is for
        `receivers` alone.
        """
        self._handle, self._version, self._cache = handle, version, cache
        for place in self._places:
            if place.serves:
                self._catch_up(place)
        if later is not None:
            self._handle = None
        self._later = later
        self._until(lambda: self._is_synced(version))

    def offload(self) -> None:
        """All workers hand their device memory over: weights, caches and graphs. `reload` brings the weights back, for
        `sync`, and `restore` the rest, for requests. One that dies in between takes none before `restore`."""
        if len(self._router):
            raise RuntimeError(f"{len(self._router)} requests have not ended: their workers' memory is in use")
        self._until(lambda: not any(place.starts for place in self._places))
        if not self._offloaded:
            self._offloaded = True
            self._all("hand its memory over", "offload")

    def reload(self) -> None:
        self._all("take its weights back", "reload")

    def restore(self) -> None:
        self._offloaded = False
        self._all("make its cache", "restore")
        for place in self._places:
            if not place.serves and not place.starts:
                self._prepare(place)

    def submit(self, requests: list[Request]) -> None:
        """Puts them on their way; `results` has what becomes of them. ValueError for an id that is on its way."""
        if not len(self._router):
            self._forget()
            self._busy_since = time.monotonic()
        self._router.add(requests)
        self._dispatch()

    def results(self, seconds: float = _NO_END) -> Iterator[Trajectory]:
        """What finishes within so many seconds, as it comes; ends when nothing is unfinished."""
        until = time.monotonic() + seconds
        while True:
            while self._ended:
                yield self._ended.popleft()
            left = until - time.monotonic()
            if not len(self._router) or left <= 0:
                return
            self._turn(left)

    def generate(self, requests: list[Request], check: Callable[[], None] = lambda: None) -> list[Trajectory]:
        """A trajectory for each request, in order. `check` is called as they come; what it raises is raised."""
        self.submit(requests)
        found = {}
        for trajectory in self.results():
            found[trajectory.request] = trajectory
            check()
        return [found[request.id] for request in requests]

    def cancel(self, ids: list[int]) -> None:
        """Those of them that have not ended come out with finish "cancelled"."""
        for request in self._router.take_back(ids):
            self._deliver(unsampled(request, "cancelled"))
        for place in self._places:
            held = {r.id for r in self._router.holds(place.worker)}.intersection(ids) if place.serves else set()
            if held:
                self._cancelled |= held
                self._call(place, f"cancel {len(held)} requests", self._actor(place).cancel.remote(list(held)))

    @property
    def deaths(self) -> int:
        """Since the policy was loaded."""
        return self._deaths.total

    def metrics(self) -> dict[str, float]:
        """Of what was done since they were asked for before; rl/router.py says what they are."""
        seconds, self._busy_seconds = self._busy_seconds, 0.0
        if len(self._router):
            now = time.monotonic()
            seconds, self._busy_since = seconds + now - self._busy_since, now
        deaths, self._deaths_told = self.deaths - self._deaths_told, self.deaths
        return self._meter.read(seconds, deaths)

    def close(self) -> None:
        import ray

        for worker in self.workers:
            ray.kill(worker)
        self.workers, self._calls = [], {}
        if self._scratch is not None:
            self._scratch.cleanup()

    # --- a turn: what can be sent is sent, and what was answered is taken in

    def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            self._turn(_NO_END)

    def _turn(self, seconds: float) -> None:
        import ray

        self._dispatch()
        refs = list(self._calls)
        ray.wait(refs, num_returns=1, timeout=min(seconds, _POLL_SECONDS))
        answered, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for ref in answered:
            if ref in self._calls:  # its worker has not died meanwhile
                self._take_in(ref, self._calls.pop(ref))
        now = time.monotonic()
        late = [call for call in self._calls.values() if now - call.began > self._deadline]
        for call in {call.place.index: call for call in reversed(late)}.values():  # of each worker the first
            self._died(call.place, TimeoutError(f"{call.what}: not done after {self._deadline:g} s"))

    def _take_in(self, ref: Any, call: "_Call") -> None:
        from ray.exceptions import RayActorError

        try:
            answer = wait(ref, call.what, self._deadline)
        except RayActorError as death:
            self._died(call.place, death)
        else:
            if call.then is not None:
                call.then(answer)

    def _call(self, place: "_Place", what: str, ref: Any, then: Callable[[Any], None] | None = None) -> Any:
        self._calls[ref] = _Call(place, f"rollout worker {place.index} to {what}", then, time.monotonic())
        return ref

    def _dispatch(self) -> None:
        for worker, requests in self._router.assign().items():
            self._journals_used = True
            place = next(place for place in self._places if place.worker == worker)
            self._call(place, f"take {len(requests)} requests", self._actor(place).submit.remote(requests))
            if not place.polled:
                self._poll(place)

    def _poll(self, place: "_Place") -> None:
        """Asks the worker what has finished, again and again while it has requests."""
        place.polled = True
        ref = self._actor(place).poll.remote(_POLL_SECONDS)
        self._call(place, "say what has finished", ref, lambda report: self._polled(place, report))

    def _polled(self, place: "_Place", report: Report) -> None:
        place.polled = False
        self._tokens += report.tokens
        self._meter.add(report)
        if report.journal_lost and not place.unjournaled:
            lost = "cannot be written (see its log): if it dies, requests go on from where that ends"
            _LOG.error("the journal of rollout worker %d %s", place.index, lost)
        place.unjournaled = report.journal_lost
        for trajectory in report.finished:
            if self._router.finish(place.worker, trajectory.request):
                self._deliver(trajectory)
        if report.stalled > self._deadline:
            what = f"the engine of rollout worker {place.index} to end its step {report.steps + 1}"
            self._died(place, TimeoutError(f"{what}: not done after {report.stalled:.3g} s"))
        elif self._router.holds(place.worker):
            self._poll(place)

    def _deliver(self, trajectory: Trajectory) -> None:
        self._ended.append(trajectory)
        self._cancelled.discard(trajectory.request)
        if not len(self._router):
            self._busy_seconds += time.monotonic() - self._busy_since

    # --- workers come and go

    def _start(self, place: "_Place") -> Any:
        import ray

        where = resources(self._gpus, self._group, place.index)
        actor = ray.remote(self.kind).options(**where, max_concurrency=CALLS)
        return actor.remote("cuda" if self._gpus else "cpu", self._threads, self._precision, self._deadline)

    def _prepare(self, place: "_Place") -> None:
        """Its worker loads the policy, and serves as soon as it has the last version."""
        place.worker, self._loads = self._loads, self._loads + 1
        place.version, place.starts, place.serves, place.polled = 0, True, False, False
        place.folder = self._folder / f"worker-{place.index}-{place.worker}"
        ref = self._actor(place).load.remote(self._path, str(place.folder), self._settings)
        self._call(place, f"load {self._path}", ref, lambda where: self._loaded(place, where))

    def _loaded(self, place: "_Place", where: Any) -> None:
        place.where = where
        self._catch_up(place)

    def _catch_up(self, place: "_Place") -> None:
        if place.version != self._version:
            version = self._version
            if self._handle is None and self._later is not None:
                self._handle = self._later()
            ref = self._actor(place).update.remote(self._handle, self._cache)
            self._call(place, f"take version {version}", ref, lambda _: self._has(place, version))
        elif not place.serves:
            place.starts, place.serves = False, True
            self._router.join(place.worker)

    def _has(self, place: "_Place", version: int) -> None:
        place.version = version
        self._catch_up(place)

    def _is_synced(self, version: int) -> bool:
        """Whether those that serve have it, and one does, unless all have died that could before `restore`."""
        serving = [place.version == version for place in self._places if place.serves]
        return (bool(serving) or self._offloaded) and all(serving)

    def _died(self, place: "_Place", why: Exception) -> None:
        """What its worker had goes on elsewhere, and another worker starts."""
        import ray

        ray.kill(self._actor(place))  # which may only hang
        self._calls = {ref: call for ref, call in self._calls.items() if call.place is not place}
        served, place.serves = place.serves, False
        held = self._router.leave(place.worker) if served else []
        settled = settle(held, _journaled(place.folder) if held else [])
        self._router.again(settled.again)
        self.cancel([request.id for request in settled.again if request.id in self._cancelled])
        self._tokens += settled.tokens
        in_a_row = self._deaths.count(place.index, served, self._tokens)
        words = last_words(why)
        if in_a_row >= MAX_DEATHS:
            how_often = f"died {in_a_row} times in a row, with nothing sampled between"
            raise RuntimeError(f"rollout worker {place.index} {how_often}; the last: {words or why}") from why
        line = f"its last words: {words.splitlines()[-1]}" if words else str(why).splitlines()[0]
        _LOG.warning("rollout worker %d died; its %d requests go on; %s", place.index, len(held), line)
        self.workers[place.index] = self._start(place)
        place.starts = False
        if not self._offloaded:
            self._prepare(place)

    def _forget(self) -> None:
        """All has been delivered: journals begin anew, and what the dead left is removed."""
        if not self._journals_used:
            return
        self._all("begin a new journal", "forget")
        for folder in set(self._folder.iterdir()) - {place.folder for place in self._places}:
            shutil.rmtree(folder)
        self._journals_used = False

    def _all(self, what: str, method: str) -> None:
        """A call of all that serve, until it is answered by those that do not die of it."""
        serving = [place for place in self._places if place.serves]
        refs = [self._call(place, what, getattr(self._actor(place), method).remote()) for place in serving]
        self._until(lambda: not any(ref in self._calls for ref in refs))

    def _scratch_folder(self) -> Path:
        self._scratch = self._scratch or tempfile.TemporaryDirectory(prefix="amalgam-journal-")
        return Path(self._scratch.name) / "journal"

    def _actor(self, place: "_Place") -> Any:
        return self.workers[place.index]


@dataclass(eq=False)
class _Place:
    """Where a worker is, and another one after its death."""

    index: int
    worker: int = -1  # the router's number of the one that is there
    where: Any = None  # it is (transport.Place)
    folder: Path = Path()  # of its journal
    version: int = 0  # of its policy
    starts: bool = False
    serves: bool = False
    polled: bool = False  # has been asked what has finished, and not answered
    unjournaled: bool = False  # its journal was given up


@dataclass(eq=False)
class _Call:
    """What a worker was asked to do, and when."""

    place: _Place
    what: str
    then: Callable[[Any], None] | None  # with the answer
    began: float


def _journaled(folder: Path) -> list[Request]:
    """What a worker's journal knows of its requests, ended or not, as they were at their last token.

    RuntimeError where the driver does not see it: a request must not silently begin anew.
    """
    from .journal.reading import read_all

    if not folder.is_dir():
        raise RuntimeError(f"{folder}: the journal of a worker that died is not there; is that a disk that all share?")
    files = read_all(folder, keep_finished=True)
    lives = [(life, file.recorded) for file in files for life in [*file.finished, *file.unfinished]]
    return [replace(life.request, past=life.past(recorded)) for life, recorded in lives]
