"""Evaluation, with a sampler that writes the answers down: its batches, its file, and that it stops between batches."""

import json
import threading
from collections import Counter
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
    """Ten problems in batches of four; asks the run to stop in the middle of batch `stop_in`."""

    def __init__(self, run: Run, stop_in: int):
        self.run, self.stop_in, self.ids = run, stop_in, []

    def generate(self, requests: list[Request], **_: Any) -> list[Trajectory]:
        self.ids.append([(request.id, request.group) for request in requests])
        if len(self.ids) == self.stop_in:
            self.run.stop.set()
        ids, empty = np.zeros(1, np.int32), np.empty(0)
        return [Trajectory(r.id, r.group, r.prompt_ids, ids, empty, empty, empty, "stop", "7") for r in requests]


class Grades:
    failures: Counter[str] = Counter()

    def grade(self, items: list[Any]) -> list[Score]:
        return [Score(float(i == 0), i == 0, {}) for i in range(len(items))]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(module, "MAX_BATCH", 4)
    domains = {
        name: Domain(name, "chat", {task: {}}, 1, PROBLEMS, 0)
        for name, task in (("numbers", "chain_sum"), ("words", "spell_backward"))
    }
    recipe: Any = SimpleNamespace(base=str(PRESETS / "tiny"), evaluate=SimpleNamespace(problems=5, max_new_tokens=4))
    return Run(recipe, tmp_path, None, None, None, domains, threading.Event())  # pyright: ignore[reportArgumentType]


def evaluated(run: Any, stop_in: int = 0) -> tuple[Sampler, Any]:
    sampler = Sampler(run, stop_in)
    run.fleet = SimpleNamespace(rollouts=lambda *_: nullcontext(sampler), lend=lambda *_: nullcontext(Grades()))
    try:
        return sampler, module.evaluate(run, "base")
    except Interrupted as error:
        return sampler, str(error)


def test_requests_are_numbered_through_the_batches_and_rows_count_by_domain(run: Any):
    sampler, rows = evaluated(run)
    assert sampler.ids == [[(i, i) for i in part] for part in (range(4), range(4, 8), range(8, 10))]
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


def test_an_evaluation_stops_after_its_batch_and_is_done_again(run: Any):
    sampler, said = evaluated(run, stop_in=2)
    assert (len(sampler.ids), said) == (2, "the evaluation of base")
    assert not (run.folder / "evaluations").exists()
    run.stop.clear()
    assert len(evaluated(run)[0].ids) == 3
