"""GRPO with verifiable rewards: sample groups, grade them, learn from the groups that disagree with themselves.

One rollout batch a step and, with `updates: 1`, one optimizer step on it, so that the policy that samples is the
policy that learns. With more, the learner's metrics are the plain means over the step's optimizer steps (our choice).
The algorithm's own parts are in rl/grpo.py.
"""

import time

import numpy as np

from ..rl.grpo import group_advantages, rows
from ..rl.trajectory import Trajectory
from .recipe import Grpo
from .rollout import (
    draw,
    length_metrics,
    sample,
    sampled_rate,
    sampling,
    sampling_params,
    score,
    shown,
    shown_service,
    write_rollouts,
)
from .stage import StageRun, speaker


def grpo(stage: StageRun, settings: Grpo) -> None:
    run, model = stage.run, stage.run.model(settings.from_)
    encoding, tokenizer = speaker(run, settings.from_)
    domains = [run.domains[name] for name in settings.domains]
    params = sampling_params(settings.sampling, run.seed(stage.name))
    loss = {
        "clip_low": settings.clip_low, "clip_high": settings.clip_high, "temperature": params.temperature,
        "indexer_weight": settings.indexer.weight,
    }  # fmt: skip
    with (
        stage.rollouts(model, settings.rollout_workers, settings.rollout, settings.sampling.draft) as rollouts,
        stage.learner(model, settings.optimizer, settings.updates, settings.indexer.unfreeze) as learner,
        stage.grader() as grader,
    ):
        while stage.step < stage.steps:
            began, step = time.monotonic(), stage.step
            problems = draw(domains, "train", step, settings.prompts)
            with sampling(learner, rollouts, step, run.fleet.colocated):
                trajectories = sample(
                    rollouts, encoding, tokenizer, problems,
                    first=step * settings.prompts, group_size=settings.group_size, params=params,
                )  # fmt: skip
            graded = score(grader, trajectories)
            kept, dropped = group_advantages(trajectories)
            metrics = reward_metrics(trajectories) | length_metrics(trajectories) | rollouts.metrics()
            metrics |= {"dropped_groups": dropped, "grades_per_second": graded}
            parts = [part for part in np.array_split(np.arange(len(kept)), settings.updates) if len(part)]
            metrics |= means([learner.step(rows([kept[i] for i in part]), "rl.grpo:loss", **loss) for part in parts])
            write_rollouts(stage.folder / "rollouts", step + 1, trajectories)
            stage.log.samples(step + 1, [shown(t) for t in trajectories[:: settings.group_size]])
            metrics["tokens_per_second"] = sampled_rate(trajectories, began)
            show: dict[str, float | str] = {name: metrics[name] for name in ("reward", "correct", "tokens_per_second")}
            show["rollout"] = shown_service(metrics)
            stage.commit(learner, metrics, show)
        learner.save_model(stage.folder / "checkpoint")
    stage.finish(f"reward {stage.facts['metrics']['reward']:.3f}")


def means(metrics: list[dict[str, float]]) -> dict[str, float]:
    """The plain mean of each metric; nothing of nothing."""
    if not metrics:
        return {}
    return {name: sum((m[name] for m in metrics[1:]), first) / len(metrics) for name, first in metrics[0].items()}


def reward_metrics(trajectories: list[Trajectory]) -> dict[str, float]:
    """Means of the reward, of its parts, and of being correct."""
    scores = [t.score for t in trajectories if t.score is not None]
    names = dict.fromkeys(name for s in scores for name in s.parts)  # each domain may have its own
    parts = {f"part_{name}": float(np.mean([s.parts[name] for s in scores if name in s.parts])) for name in names}
    means = {
        "reward": float(np.mean([s.value for s in scores])),
        "correct": float(np.mean([bool(s.correct) for s in scores])),
    }
    return means | parts
