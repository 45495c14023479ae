"""The GRPO stage with a learner and a sampler that count: how a step's metrics come about."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from amalgam.pipelines import grpo as module
from amalgam.pipelines.report import _rollout_samples
from amalgam.pipelines.rollout import length_metrics, sampled_rate, sampling, shown_service, write_rollouts
from amalgam.rewards.problem import Score
from amalgam.rl.router import Meter
from amalgam.rl.settings import EngineRoom, IndexerLoss, Sampling
from amalgam.rl.trajectory import Trajectory

PROMPT, RESPONSE = 5, 3


def trajectory(i: int, group: int) -> Trajectory:
    ids = np.zeros(PROMPT, np.int32), np.zeros(RESPONSE, np.int32)
    made = Trajectory(i, group, *ids, np.zeros(RESPONSE, np.float32), np.zeros((8, 1, 2)), ids[1], "stop", "")
    made.score = Score(float(i % 2), bool(i % 2), {"task": 1.0})
    return made


def step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, updates: int, groups: int) -> dict[str, float]:
    """The metrics of one step on groups of two; the learner's k-th call returns loss 0.1 k and grad_norm -0.0."""
    calls: list[int] = []
    committed: list[dict[str, float]] = []

    def learn(rows: list[Any], *_: Any, **__: Any) -> dict[str, float]:
        calls.append(len(rows))
        return {"loss": 0.1 * len(calls), "grad_norm": -0.0}

    def commit(_: Any, metrics: dict[str, float], shown: dict[str, float]) -> None:
        committed.append(metrics)
        stage.step += 1

    stage: Any = SimpleNamespace(
        name="s", step=0, steps=1, folder=tmp_path, commit=commit, finish=lambda _: None,
        facts={"metrics": {"reward": 0}},
        run=SimpleNamespace(
            model=lambda _: None, domains={}, seed=lambda _: 0, fleet=SimpleNamespace(colocated=False)
        ),
        log=SimpleNamespace(samples=lambda *_: None),
        learner=lambda *_: nullcontext(SimpleNamespace(step=learn, weights=lambda _: None, save_model=lambda _: None)),
        rollouts=lambda *_: nullcontext(SimpleNamespace(metrics=lambda: Meter().read(1.0, 0))),
        grader=lambda: nullcontext(None),
    )  # fmt: skip
    settings: Any = SimpleNamespace(
        from_="m", domains=[], prompts=groups, group_size=2, updates=updates, optimizer=None, rollout_workers=1,
        clip_low=0.2, clip_high=0.28, sampling=Sampling(temperature=1.0, max_new_tokens=4, draft="off"),
        indexer=IndexerLoss(), rollout=EngineRoom(),
    )  # fmt: skip
    monkeypatch.setattr(module, "speaker", lambda *_: (None, None))
    monkeypatch.setattr(module, "draw", lambda *_: [])
    monkeypatch.setattr(module, "sampling", lambda *_: nullcontext())
    monkeypatch.setattr(module, "score", lambda *_: 1.0)
    monkeypatch.setattr(module, "sample", lambda *_, **__: [trajectory(i, i // 2) for i in range(2 * groups)])
    module.grpo(stage, settings)
    assert sum(calls) == 2 * groups
    (metrics,) = committed
    return metrics


def test_the_metrics_of_a_step_are_the_means_over_its_updates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert step(monkeypatch, tmp_path, updates=4, groups=4)["loss"] == pytest.approx((0.1 + 0.2 + 0.3 + 0.4) / 4)
    assert step(monkeypatch, tmp_path, updates=4, groups=1)["loss"] == pytest.approx((0.1 + 0.2) / 2)


def test_one_updates_metrics_are_the_learners_bit_by_bit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    metrics = step(monkeypatch, tmp_path, updates=1, groups=3)
    assert (metrics["loss"].hex(), metrics["grad_norm"].hex()) == ((0.1).hex(), (-0.0).hex())
    assert module.means([]) == {}


def test_the_rate_counts_what_was_sampled(monkeypatch: pytest.MonkeyPatch):
    """Not the prompt, which a group has once."""
    monkeypatch.setattr("time.monotonic", lambda: 12.0)
    assert sampled_rate([trajectory(i, 0) for i in range(4)], began=10.0) == 4 * RESPONSE / 2


def test_colocated_each_has_the_memory_when_it_needs_it():
    both = MagicMock()
    for colocated in (False, True):
        with sampling(both.learner, both.rollouts, 3, colocated):
            both.sample()
    names = [call[0] for call in both.method_calls]
    assert names[:3] == ["learner.weights", "rollouts.sync", "sample"]
    assert names[3:] == [
        "rollouts.reload", "learner.weights", "rollouts.sync", "learner.offload", "rollouts.restore", "sample",
        "rollouts.offload", "learner.reload",
    ]  # fmt: skip


def test_drafts_are_counted_over_all_tokens():
    drafted = [replace(trajectory(i, 0), drafted=10 * i, accepted=i) for i in range(3)]
    assert length_metrics(drafted)["draft_acceptance"] == pytest.approx(0.1)
    assert "draft_acceptance" not in length_metrics([trajectory(0, 0)])


def test_the_line_names_what_is_not_as_it_should_be():
    metrics = Meter().read(1.0, 0) | {"rollout/tokens_per_second": 1234.4, "rollout/batch": 3.1415}
    assert shown_service(metrics) == "1,234 tok/s in batches of 3.14"
    metrics |= {"rollout/queue": 7.6, "rollout/preemptions": 2.0, "rollout/deaths": 1.0}
    assert shown_service(metrics) == "1,234 tok/s in batches of 3.14, queued 8, preemptions 2, deaths 1"


def test_each_domain_may_have_parts_of_its_own(tmp_path: Path):
    one, other = trajectory(0, 0), trajectory(1, 1)
    one.domain, other.domain = "sums", "code"
    one.score, other.score = Score(0.5, True, {"math": 0.5}), Score(1.0, True, {"code": 1.0, "format": 1.0})
    metrics = module.reward_metrics([one, other])
    assert metrics == {"reward": 0.75, "correct": 1.0, "part_math": 0.5, "part_code": 1.0, "part_format": 1.0}
    write_rollouts(tmp_path / "stages" / "s" / "rollouts", 1, [one, other])
    run: Any = SimpleNamespace(folder=tmp_path, stages=["s"], kind=lambda _: "grpo")
    (shown,) = _rollout_samples(run)
    assert [row["parts"] for row in shown["rows"]] == [{"math": 0.5}, {"code": 1.0, "format": 1.0}]
