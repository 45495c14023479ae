"""A stage's progress on disk, with a learner of three numbers and the real files: killed anywhere, it goes on."""

import json
import os
import threading
from collections import Counter
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from amalgam.errors import UserError
from amalgam.pipelines import stage as stage_module
from amalgam.pipelines.stage import Interrupted, StageRun
from amalgam.rl.cluster import Usage
from amalgam.rl.memory import Span
from amalgam.rl.state import read_state, write_state


class Killed(BaseException):
    pass


class Numbers:
    """What StageRun uses of a learner."""

    workers: list[Any] = []
    shapes = {"w": (3,)}

    def __init__(self):
        self.steps, self.weights = 0, torch.zeros(3)

    def step(self, value: float) -> None:
        self.weights = self.weights * 1.5 + value
        self.steps += 1

    def save_state(self, folder: Path) -> int:
        write_state(folder, self.steps, self.shapes, [self.weights])
        return self.steps

    def load_state(self, folder: Path, step: int) -> int:
        self.steps, tensors = read_state(folder, self.shapes, step)
        self.weights = tensors["w"]
        return self.steps


class Log:
    def __init__(self):
        self.rows: list[int] = []

    def step(self, step: int, _: dict[str, float]) -> None:
        self.rows.append(step)

    def artifact(self, _: Path) -> None:
        pass

    def rewind(self, step: int) -> None:
        self.rows = [s for s in self.rows if s <= step]


class Progress:
    """A stage of 7 steps, two of which have nothing to learn from. Killed at its `kill_at`th chance to be, if any."""

    def __init__(self, folder: Path, every: int, patch: pytest.MonkeyPatch):
        self.log, self.stop, self.chances, self.kill_at = Log(), threading.Event(), 0, 0
        self.said: list[str] = []
        patch.setattr(stage_module, "usage", lambda _: [])
        patch.setattr(stage_module, "write_json", self._risky(stage_module.write_json))
        patch.setattr(Numbers, "save_state", self._risky(Numbers.save_state))
        line = SimpleNamespace(update=lambda *_, **__: None, done=lambda _: None)
        self.run: Any = SimpleNamespace(
            recipe=SimpleNamespace(checkpoint_every=every, inputs=lambda _: []),
            folder=folder,
            stop=self.stop,
            fleet=SimpleNamespace(learner=lambda *_: nullcontext(Numbers())),
            console=SimpleNamespace(stage=lambda *_: line, print=self.said.append),
        )
        self.folder = folder / "stages" / "s"
        self.folder.mkdir(parents=True)

    def _risky(self, write):
        def wrapped(*arguments):
            self._chance()
            result = write(*arguments)
            self._chance()
            return result

        return wrapped

    def _chance(self) -> None:
        self.chances += 1
        if self.chances == self.kill_at:
            raise Killed

    def attempt(self, stop_at: int = 0) -> torch.Tensor:
        """The weights at the end."""
        stage = StageRun(self.run, "s", SimpleNamespace(kind="sft"), 7, self.log)  # pyright: ignore
        stage.start()
        with stage.learner(Path(), None) as learner:  # pyright: ignore
            while stage.step < 7:
                if stage.step not in (2, 3):
                    learner.step(stage.step)  # pyright: ignore
                if stage.step + 1 == stop_at:
                    self.stop.set()
                stage.commit(learner, {}, {})
            return learner.weights  # pyright: ignore


@pytest.fixture
def unbroken(tmp_path: Path) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        return Progress(tmp_path / "unbroken", 1, patch).attempt()


def test_the_schedule_counts_optimizer_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A GRPO step may take several."""
    progress, asked = Progress(tmp_path, 1, monkeypatch), []
    progress.run.fleet.learner = lambda *arguments: asked.append(arguments) or nullcontext(Numbers())
    stage = StageRun(progress.run, "s", SimpleNamespace(kind="grpo"), 7, progress.log)  # pyright: ignore
    with stage.learner(Path("model"), None, updates=4):  # pyright: ignore
        assert asked == [(Path("model"), None, 28, ())]


@pytest.mark.parametrize("every", [1, 3])
def test_a_stage_may_be_killed_before_and_after_each_of_its_writes(tmp_path: Path, unbroken: torch.Tensor, every: int):
    kills = 0
    for kill_at in count(1):
        with pytest.MonkeyPatch.context() as patch:
            progress = Progress(tmp_path / f"{kill_at}", every, patch)
            progress.kill_at = kill_at
            try:
                progress.attempt()
                break
            except Killed:
                kills += 1
                assert torch.equal(progress.attempt(), unbroken)
                assert progress.log.rows == [1, 2, 3, 4, 5, 6, 7]
    assert kills == 4 * (7 if every == 1 else 3)


def tear(state: Path) -> None:
    """Cuts the newest state short."""
    newest = max(json.loads((state / "state.json").read_text()), key=lambda entry: entry["step"])
    os.truncate(state / newest["file"], 50)


@pytest.mark.parametrize(("every", "stop_at", "before"), [(1, 1, 0), (1, 4, 1), (1, 5, 4), (3, 4, 0), (3, 5, 3)])
def test_a_torn_state_is_replaced_by_the_one_before(
    tmp_path: Path, unbroken: torch.Tensor, every: int, stop_at: int, before: int
):
    """And what then is killed at any moment goes on too: the state that is left is not written over too early.

    The steps 3 and 4 take no optimizer step: their state is the second's, and torn with it.
    """
    for kill_at in count(1):
        with pytest.MonkeyPatch.context() as patch:
            progress = Progress(tmp_path / f"{kill_at}", every, patch)
            with pytest.raises(Interrupted):
                progress.attempt(stop_at)
            progress.stop.clear()
            tear(progress.folder / "state")
            progress.chances, progress.kill_at = 0, kill_at
            try:
                assert torch.equal(progress.attempt(), unbroken)
                ended = True
            except Killed:
                assert torch.equal(progress.attempt(), unbroken)
                ended = False
            assert progress.said[0] == f"s: the state of step {stop_at} is torn; going back to step {before}"
            assert progress.log.rows == [1, 2, 3, 4, 5, 6, 7]
        if ended:
            break


def test_a_stage_whose_states_are_both_torn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    progress = Progress(tmp_path, 1, monkeypatch)
    with pytest.raises(Interrupted):
        progress.attempt(5)
    for file in (progress.folder / "state").glob("*.safetensors"):
        os.truncate(file, 50)
    with pytest.raises(UserError, match=f"state: no state in it is whole; remove {progress.folder} to begin"):
        progress.attempt()
    assert progress.log.rows == [1, 2, 3, 4, 5]


def test_a_stage_that_is_asked_to_stop_saves_its_last_step(tmp_path: Path, unbroken: torch.Tensor):
    """Also where the recipe saves every third only."""
    for step in range(1, 8):
        with pytest.MonkeyPatch.context() as patch:
            progress = Progress(tmp_path / f"{step}", 3, patch)
            with pytest.raises(Interrupted, match=f"s step {step}"):
                progress.attempt(stop_at=step)
            progress.stop.clear()
            assert json.loads((tmp_path / f"{step}/stages/s/progress.json").read_text())[-1]["step"] == step
            assert torch.equal(progress.attempt(), unbroken)
            assert progress.log.rows == [1, 2, 3, 4, 5, 6, 7]


def test_done_says_what_all_attempts_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """CPU seconds of the stage's thread, of actors that other stages had before and that are replaced, failed grades;
    the attempt with the highest peak of memory.

    The grader counts for another stage once this one has given it back.
    """
    progress, cpu, failures = Progress(tmp_path, 3, monkeypatch), {"a": 100.0, "b": 0.0}, Counter(timeout=7)
    memory = {"a": 1000, "b": 200}
    grader = SimpleNamespace(failures=failures)
    progress.run.fleet.lend, progress.run.new_grader = lambda *_: nullcontext(grader), None
    monkeypatch.setattr(stage_module, "usage", lambda workers: [Usage(cpu[w], memory[w], w == "b") for w in workers])
    monkeypatch.setattr(Span, "peak", lambda _: 5)
    monkeypatch.setattr(stage_module.time, "thread_time", lambda: 0.25)

    def attempt(workers: list[str]) -> StageRun:
        stage = StageRun(progress.run, "s", SimpleNamespace(kind="grpo"), 7, progress.log)  # pyright: ignore
        stage.start()
        with stage.metered(workers), stage.grader():
            cpu["a"] += 10.0
            failures["timeout"] += 2
            stage.commit(Numbers(), {}, {})  # pyright: ignore
            workers[0] = "b"
            cpu["b"] += 3.0
            failures["raised"] += 1
        return stage

    progress.stop.set()
    with pytest.raises(Interrupted):
        attempt(["a"])
    file = tmp_path / "stages" / "s" / "progress.json"
    (saved,) = json.loads(file.read_text())
    assert 0 < saved["spent"].pop("wall_seconds") < 60
    assert saved["spent"] == {
        "cpu_seconds": 10.25, "peak_rss_bytes": 1005, "peak_since_start": False, "failures": {"timeout": 2},
    }  # fmt: skip
    saved["spent"]["wall_seconds"] = 1000.0
    file.write_text(json.dumps([saved]))
    progress.stop.clear()
    memory["a"] = 100
    stage = attempt(["a"])
    failures["timeout"] += 100
    stage.finish("")
    done = json.loads((tmp_path / "stages" / "s" / "done.json").read_text())
    assert 1000 < done["wall_seconds"] < 1060
    assert (done["peak_rss_bytes"], done["peak_since_start"]) == (1005, True)
    assert (done["cpu_seconds"], done["failures"]) == (10.25 + 3.25, {"timeout": 4, "raised": 1})


def test_what_a_save_points_to_is_on_the_disk_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The state's file, then its index, then the progress; each under its name before the next."""
    progress, flushed = Progress(tmp_path, 7, monkeypatch), []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path / "stages" / "s"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    progress.attempt()
    names = ["state/a.safetensors", "state/.state.json", "state", ".progress.json.new", "."]
    assert [str(path) for path in flushed] == names
