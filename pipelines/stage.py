"""What every stage shares: the run around it, its folder, its progress on disk, and its meters."""

import hashlib
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..model import template
from ..model.config import resolve
from ..model.encoding import Encoding
from ..model.shards import write_text
from ..model.template import Template
from ..rewards.data import Problems
from ..rewards.grader import Grader
from ..rl.cluster import Usage, usage
from ..rl.fleet import Fleet
from ..rl.learner import Learner
from ..rl.memory import Span
from ..rl.rollout import Rollouts
from ..rl.settings import Draft, EngineRoom, EngineSettings, Optimization
from ..rl.state import rewind
from .console import Console, StageLine
from .recipe import BASE, Recipe
from .tracking import StageLog, Tracker

_NOTHING: Mapping[str, Any] = {
    "wall_seconds": 0.0, "cpu_seconds": 0.0, "peak_rss_bytes": 0, "peak_since_start": False, "failures": {},
}  # fmt: skip


class Interrupted(Exception):
    """A stage or an evaluation stopped between two of its steps because it was asked to."""


@dataclass
class Run:
    """One run of a recipe. Stages and evaluations run in threads; `stop` asks them to end after their current step."""

    recipe: Recipe
    folder: Path
    fleet: Fleet
    tracker: Tracker
    console: Console
    domains: dict[str, Problems]
    stop: threading.Event = field(default_factory=threading.Event)

    def model(self, name: str) -> Path:
        """The checkpoint's folder of a stage's model, or of `base`."""
        if name == BASE:
            assert self.recipe.base is not None
            return resolve(self.recipe.base)
        return self.folder / "stages" / name / "checkpoint"

    def check(self, where: str) -> None:
        """Raises Interrupted, which says `where`, if the run was asked to stop."""
        if self.stop.is_set():
            raise Interrupted(where)

    def new_grader(self) -> Grader:
        return Grader(workers=1)

    def seed(self, name: str) -> int:
        """63 bits for the noise of one stage, from the recipe's seed and the stage's name."""
        digest = hashlib.blake2b(f"{self.recipe.seed}/{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


@dataclass
class StageRun:
    """One stage of a run, while it runs. Its progress is one file, renamed into place after everything it points to.

    It lists the last two saves, as many as the learner's state holds.
    """

    run: Run
    name: str
    settings: Any
    steps: int
    log: StageLog
    step: int = 0  # finished steps
    facts: dict[str, Any] = field(default_factory=dict)  # what the stage itself has to remember
    _learned: int = 0  # optimizer steps up to the saved state: GRPO takes none for a batch without advantages
    _saves: list[dict[str, Any]] = field(default_factory=list)  # that progress.json lists, the newest last
    line: StageLine = field(init=False)
    _began: float = field(default_factory=time.monotonic)
    _before: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)  # `spent` by the attempts before this one
    _failed: Callable[[], Counter[str]] = Counter  # failed grades of this attempt by kind
    _meters: list[Callable[[], Usage]] = field(default_factory=list)  # of the actors at work
    _used: list[Usage] = field(default_factory=list)  # by those that are done
    _memory: Span = field(default_factory=Span)  # of this process
    _peak: int = 0

    @property
    def folder(self) -> Path:
        return self.run.folder / "stages" / self.name

    @contextmanager
    def learner(
        self, model: Path, optimization: Optimization, updates: int = 1, unfreeze: tuple[str, ...] = ()
    ) -> Iterator[Learner]:
        """A learner with the model, or with the state that an interrupted run of this stage left.

        `updates`: the most optimizer steps that a step of the stage takes; the schedule counts them. `unfreeze` as for
        `Learner.load`.
        """
        with self.run.fleet.learner(model, optimization, self.steps * updates, unfreeze) as learner:
            if self.step:
                learner.load_state(self.folder / "state", self._learned)
            with self.metered(learner.workers):
                yield learner

    @contextmanager
    def rollouts(self, model: Path, workers: int, room: EngineRoom, draft: Draft) -> Iterator[Rollouts]:
        """Their journals are in the stage's folder until it is done. Colocated, they start out offloaded, so that a
        learner can be lent."""
        engine = EngineSettings(**room.model_dump(), draft=draft)
        lent = self.run.fleet.rollouts(model, workers, self.folder / "journal", engine)
        with lent as rollouts, self.metered(rollouts.workers):
            if self.run.fleet.colocated:
                rollouts.offload()
            yield rollouts

    @contextmanager
    def grader(self) -> Iterator[Grader]:
        with self.run.fleet.lend("grader", self.run.new_grader) as grader:
            before = Counter(grader.failures)
            self._failed = lambda: Counter(grader.failures) - before
            yield grader
            failed = self._failed()  # from here on the grader may count for another stage
            self._failed = lambda: failed

    @contextmanager
    def metered(self, workers: list[Any]) -> Iterator[None]:
        """Counts the CPU time and the memory of these actors as the stage's; what one that died had spent is lost."""
        before = {worker: used.cpu_seconds for worker, used in zip(workers, usage(workers), strict=True)}

        def meter() -> Usage:
            now = dict(zip(workers, usage(workers), strict=True))  # of other workers where some were replaced
            cpu = sum(max(used.cpu_seconds - before.get(worker, 0.0), 0.0) for worker, used in now.items())
            return Usage(cpu, *_held(list(now.values())))

        self._meters.append(meter)
        yield
        self._meters.remove(meter)
        self._used.append(meter())

    def spent(self) -> dict[str, Any]:
        """Wall and CPU seconds and failed grades by kind: this attempt's, and those before it up to their last save.

        "peak_rss_bytes": the sum of the peaks of the processes, the driver's and the metered actors', in the attempt
        where it was highest; "peak_since_start" if some of them cannot tell a stage's peak from that of their life.
        """
        before, driver = self._before, Usage(time.thread_time(), self._memory.peak(), self._memory.since_start)
        used = [*self._used, *(meter() for meter in self._meters), driver]
        peak, since_start = _held(used)
        self._peak = max(self._peak, peak)  # a worker that has died since has none
        return {
            "wall_seconds": before["wall_seconds"] + time.monotonic() - self._began,
            "cpu_seconds": before["cpu_seconds"] + sum(each.cpu_seconds for each in used),
            "peak_rss_bytes": max(before["peak_rss_bytes"], self._peak),
            "peak_since_start": before["peak_since_start"] or since_start,
            "failures": dict(Counter(before["failures"]) + self._failed()),
        }

    def commit(self, learner: Learner, metrics: dict[str, float], shown: Mapping[str, float | str]) -> None:
        """One more step is finished: log it, show it, and save the learner's state every `checkpoint_every` steps."""
        self.step += 1
        self.facts["metrics"] = metrics
        self.log.step(self.step, metrics)
        self.line.update(self.step, **shown)
        stopped = self.run.stop.is_set()
        if stopped or self.step % self.run.recipe.checkpoint_every == 0 or self.step == self.steps:
            self.save(learner)
        if stopped:
            raise Interrupted(f"{self.name} step {self.step}")

    def save(self, learner: Learner) -> None:
        # The state's folder keeps the one before, so that a kill between the two writes leaves a pair that fits.
        self._learned = learner.save_state(self.folder / "state")
        before = [save for save in self._saves if save["learned"] < self._learned]
        save = {"step": self.step, "learned": self._learned, "facts": dict(self.facts), "spent": self.spent()}
        self._saves = [*before[-1:], save]
        write_json(self.folder / "progress.json", self._saves)

    def start(self) -> None:
        """From the beginning, or from the last save whose state is whole if there is one."""
        self._go_back()
        if self._saves:
            saved = self._saves[-1]
            self.step, self._learned, self.facts = saved["step"], saved["learned"], dict(saved["facts"])
            self._before = saved["spent"]
        self.log.rewind(self.step)
        self.line = self.run.console.stage(self.name, self.settings.kind, self.steps, self.step)

    def _go_back(self) -> None:
        """Forgets the saves after the last one whose state is whole, and says so if there are any.

        The stage begins again if its only save is torn. UserError if there are two and no whole state.
        """
        file, state = self.folder / "progress.json", self.folder / "state"
        saves = json.loads(file.read_text()) if file.is_file() else []
        learned = rewind(state, [save["learned"] for save in saves]) if saves else None
        if learned is None and len(saves) > 1:
            raise UserError(f"{state}: no state in it is whole; remove {self.folder} to begin the stage again")
        self._saves = [save for save in saves if learned is not None and save["learned"] <= learned]
        if len(self._saves) < len(saves):
            torn, step = saves[-1]["step"], self._saves[-1]["step"] if self._saves else 0
            self.run.console.print(f"{self.name}: the state of step {torn} is torn; going back to step {step}")
            write_json(file, self._saves)  # a state that fits the torn save may come before the next save does

    def finish(self, summary: str, scratch: tuple[str, ...] = ()) -> None:
        """The checkpoint is in place: the stage is done, and its state and `scratch` folders are not needed any more.

        If the stage was interrupted before, done.json counts what all its attempts spent, each up to its last save:
        after a kill, what came later is lost.
        """
        self.log.artifact(self.folder / "checkpoint")
        write_json(
            self.folder / "done.json",
            {
                "stage": self.name,
                "kind": self.settings.kind,
                "inputs": self.run.recipe.inputs(self.name),
                "steps": self.step,
                **self.spent(),
            },
        )
        for name in ("state", "journal", *scratch):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.line.done(summary)


def _held(used: list[Usage]) -> tuple[int, bool]:
    """The sum of the peaks, and whether one is its process's in its whole life."""
    return sum(each.peak_rss_bytes for each in used), any(each.since_start for each in used)


def speaker(run: Run, model: str) -> tuple[Encoding | Template, Any]:
    """The chat encoding and the tokenizer of a model of the run."""
    return template.speaker(run.model(model))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")
