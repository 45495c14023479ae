"""A rollout worker: a Ray actor with one model replica, whose engine steps in a thread while its calls answer."""

import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..settings import FULL, Precision
from .cluster import log_to_stderr
from .memory import Span
from .router import Report, unsampled
from .settings import DEADLINE, EngineSettings
from .trajectory import Request, Trajectory

CALLS = 8  # that may run at once: a poll, a look at its health, new weights, submissions
_GATHER_SECONDS = 0.05  # how long something finished may wait for more to tell of


class RolloutWorker:
    """The actor. What of a call concerns the engine is done between two of its steps, within `deadline` seconds.

    Where a step raises, which is a bug, every call from then on raises the same.
    """

    def __init__(self, device: str, threads: int, precision: Precision = FULL, deadline: float = DEADLINE):
        log_to_stderr()
        self.device, self.threads, self.precision, self.deadline = device, threads, precision, deadline
        self.memory = Span()
        self.engine: Any = None
        self._thread: Any = None
        self._receiver: Any = None
        self._offloaded: Any = None

    def load(self, path: str, journal: str, settings: EngineSettings) -> Any:
        """The policy of a checkpoint's folder, as version 0. Its tokens go to a new journal in the folder `journal`.

        Returns `place`.
        """
        from .runner import EngineThread

        if self._thread is not None:
            self._thread.close(self.deadline)
            self._close_journal()
        self.engine = self._thread = self._offloaded = None  # the policy before goes before the next one comes
        self.memory = Span()
        self._folder = Path(journal)
        self._told = threading.Condition()  # guards the next three, and tells of what has finished
        self._report = Report()  # what came since the last poll
        self._began: dict[int, float] = {}  # of requests that have not ended: when they came, 0 after their first token
        self._error: BaseException | None = None
        self._preemptions = 0.0  # so far
        self.engine = self.make_engine(path, settings)
        self._steps = _Steps(self.engine, self._stepped)
        self._thread = EngineThread(cast(Any, self._steps), self._deliver, self._fail)
        self._call(lambda _: _use_threads(self.threads))
        return self.place()

    def make_engine(self, path: str, settings: EngineSettings) -> Any:
        from tokenizers import Tokenizer

        from ..model import end_ids, load
        from .engine import Engine
        from .records import recorded

        model = load(path, device=self.device, precision=self.precision, stored=True)
        tokenizer = Tokenizer.from_file(str(Path(path) / "tokenizer.json"))
        journal = self.new_journal(**recorded(model, settings))
        return Engine(model, end_ids(Path(path)), tokenizer=tokenizer, settings=settings, journal=journal)

    def new_journal(self, **recorded: Any) -> Any:
        from .journal import Journal

        self._recorded, self._journal = recorded, Journal(self._folder, "tokens", **recorded)
        return self._journal

    def submit(self, requests: list[Request]) -> None:
        """One that can never run ends at once with finish "failed", and says why."""
        now = time.monotonic()
        with self._told:
            self._began |= {r.id: now for r in requests}

        def submit(engine: Any) -> None:
            for request in requests:
                try:
                    engine.submit(request)
                except ValueError as error:
                    self._ended(unsampled(request, "failed", str(error)))

        self._call(submit)

    def cancel(self, ids: list[int]) -> None:
        """They end with finish "cancelled"."""
        self._call(lambda engine: [engine.cancel(each) for each in ids])

    def place(self) -> Any:
        """Of `Learner.weights`' receivers."""
        from .transport import here

        return here("a rollout worker", self.device)

    def update(self, handle: Any, cache: str = "keep") -> None:
        """New weights in place, checked by their checksums (`Learner.weights`' handle). Requests go on with them.

        `cache` "rebuild" computes anew what is cached for them, "keep" does not.
        """
        from .transport import Receiver

        self._receiver = self._receiver or Receiver(self.place())
        receive = self._receiver.receive
        self._call(lambda engine: engine.update(lambda model: receive(model, handle), handle.version, cache))

    def offload(self) -> int:
        """The engine gives up its cache and its graphs, until `restore`, and the device memory of the policy's weights
        goes to the host's, until `reload`; the bytes of these."""
        from .offload import Offload, tensors_of

        def out(engine: Any) -> int:
            engine.release()
            self._offloaded = self._offloaded or Offload(tensors_of(engine.model))
            return self._offloaded.out()

        return self._call(out)

    def reload(self) -> None:
        self._call(lambda _: self._offloaded.back())

    def restore(self) -> None:
        self._call(lambda engine: engine.restore())

    def forget(self) -> None:
        """Nothing is unfinished, and all that had finished was taken in: the journal begins anew."""

        def swap(engine: Any) -> None:
            self._close_journal()
            shutil.rmtree(self._folder)
            engine.record(self.new_journal(**self._recorded))

        self._call(swap)

    def poll(self, seconds: float) -> Report:
        """What came since the last poll: soon where something has finished, or else after so many seconds."""
        with self._told:
            self._told.wait_for(lambda: self._error or self._report.finished, seconds)
            self._told.wait_for(lambda: self._error or not self._began, min(seconds, _GATHER_SECONDS))
            if self._error is not None:
                raise self._error
            report, self._report = self._report, Report()
        report.version, report.steps, report.stalled = self.health()
        return report

    def health(self) -> tuple[int, int, float]:
        """The policy's version, the engine's steps so far, and for how many seconds the present one has gone on."""
        began = self._steps.began
        return self.engine.version, self._steps.count, time.monotonic() - began if began is not None else 0.0

    def _call(self, do: Callable[[Any], Any]) -> Any:
        """do(engine) between two steps."""
        return self._thread.call(lambda steps: do(steps.engine)).result(self.deadline)

    def _close_journal(self) -> None:
        from .journal import JournalError

        with suppress(JournalError):  # of one that was given up, which has been told
            self._journal.close()

    def _stepped(self, metrics: dict[str, float]) -> None:
        before, self._preemptions = self._preemptions, metrics["preemptions"]
        with self._told:
            self._report.step(metrics | {"preemptions": self._preemptions - before})

    def _deliver(self, updates: list[Any]) -> None:
        now = time.monotonic()
        with self._told:
            for update in updates:
                self._report.tokens += len(update.token_ids)
                if len(update.token_ids) and (began := self._began.get(update.id)):
                    self._report.first_tokens.append(now - began)
                    self._began[update.id] = 0.0
        for update in updates:
            if update.finished is not None:
                self._ended(update.finished)

    def _ended(self, trajectory: Trajectory) -> None:
        if trajectory.experts.shape[1:] == (0, 0) and (shape := self._recorded.get("experts")):
            trajectory.experts = np.full((len(trajectory), *shape), -1, np.int16)  # nothing of it was fed here
        with self._told:
            self._began.pop(trajectory.request)
            self._report.finished.append(trajectory)
            self._told.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._told:
            self._error = error
            self._told.notify_all()


class _Steps:
    """An engine as runner.EngineThread steps it, whose steps are counted and timed."""

    def __init__(self, engine: Any, after: Callable[[dict[str, float]], None]):
        self.engine, self._after = engine, after
        self.count = 0
        self.began: float | None = None  # when the present step did

    @property
    def busy(self) -> bool:
        return self.engine.busy

    def step(self) -> list[Any]:
        self.began = time.monotonic()
        updates = self.engine.step()
        self.began = None
        self.count += 1
        self._after(self.engine.metrics())
        return updates


def _use_threads(count: int) -> None:
    """PyTorch's threads on the CPU, which each thread of the process has a number of."""
    import torch

    torch.set_num_threads(count)
