"""Evaluation, with a sampler that writes the answers down: its requests, its file, and that it stops on the way."""

import json
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from amalgam.model.config import PRESETS
from amalgam.pipelines import evaluate as module
from amalgam.pipelines.stage import Interrupted, Run
from amalgam.rewards.domains import Domain
from amalgam.rewards.problem import Score
from amalgam.rl.trajectory import Request, Trajectory

PROBLEMS = 5


class Sampler:
    """Asks the run to stop when as many as `stop_after` have come."""

    def __init__(self, run: Run, stop_after: int):
        self.run, self.stop_after, self.ids, self.came = run, stop_after, [], 0

    def generate(self, requests: list[Request], check: Callable[[], None]) -> list[Trajectory]:
        self.ids += [(request.id, request.group) for request in requests]
        for _ in requests:
            self.came += 1
            if self.came == self.stop_after:
                self.run.stop.set()
            check()
        ids, empty = np.zeros(1, np.int32), np.empty(0)
        return [Trajectory(r.id, r.group, r.prompt_ids, ids, empty, empty, empty, "stop", "7") for r in requests]


class Grades:
    failures: Counter[str] = Counter()

    def grade(self, items: list[Any]) -> list[Score]:
        return [Score(float(i == 0), i == 0, {}) for i in range(len(items))]


@pytest.fixture
def run(tmp_path: Path) -> Any:
    domains = {
        name: Domain(name, "chat", {task: {}}, 1, PROBLEMS, 0)
        for name, task in (("numbers", "chain_sum"), ("words", "spell_backward"))
    }
    recipe: Any = SimpleNamespace(base=str(PRESETS / "tiny"), evaluate=SimpleNamespace(problems=5, max_new_tokens=4))
    return Run(recipe, tmp_path, None, None, None, domains, threading.Event())  # pyright: ignore[reportArgumentType]


def evaluated(run: Any, stop_after: int = 0) -> tuple[Sampler, Any]:
    def rollouts(_path: Path, _workers: int, journal: Path) -> Any:
        journal.mkdir(parents=True, exist_ok=True)
        return nullcontext(sampler)

    sampler = Sampler(run, stop_after)
    run.fleet = SimpleNamespace(rollouts=rollouts, lend=lambda *_: nullcontext(Grades()))
    try:
        return sampler, module.evaluate(run, "base")
    except Interrupted as error:
        return sampler, str(error)


def test_requests_are_numbered_and_rows_count_by_domain(run: Any):
    sampler, rows = evaluated(run)
    assert sampler.ids == [(i, i) for i in range(10)]
    assert [(r["model"], r["domain"], r["correct"], r["total"]) for r in rows] == [
        ("base", "numbers", 1, PROBLEMS),
        ("base", "words", 0, PROBLEMS),
    ]
    took = json.loads((run.folder / "evaluations" / "times" / "base.json").read_text())
    assert 0 < took["wall_seconds"] < 60
    written = json.loads((run.folder / "evaluations" / "base.json").read_text())
    assert [o["question"] for o in written["domains"]["words"]] == [
        p.question for p in run.domains["words"].problems("heldout", 0, PROBLEMS)
    ]


def test_an_evaluation_stops_on_the_way_and_is_done_again(run: Any):
    sampler, said = evaluated(run, stop_after=4)
    assert (sampler.came, said) == (4, "the evaluation of base")
    assert not (run.folder / "evaluations" / "base.json").exists()
    run.stop.clear()
    assert evaluated(run)[0].came == 10
    assert sorted(file.name for file in (run.folder / "evaluations").iterdir()) == ["base.json", "times"]
