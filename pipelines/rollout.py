"""From problems to scored trajectories: what GRPO, distillation and evaluation have in common."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..model.encoding import Encoding
from ..model.template import Template
from ..rewards.data import Problems
from ..rewards.domains import Split
from ..rewards.grader import Grader
from ..rewards.problem import Problem
from ..rl.learner import Learner
from ..rl.rollout import Rollouts
from ..rl.settings import Sampling
from ..rl.trajectory import Request, SamplingParams, Trajectory


def draw(domains: list[Problems], split: Split, step: int, count: int) -> list[tuple[Problems, Problem]]:
    """`count` problems of step `step`, evenly from the domains; no problem comes twice in a stage."""
    drawn = []
    for i, domain in enumerate(domains):
        mine = len(range(i, count, len(domains)))
        drawn += [(domain, problem) for problem in domain.problems(split, step * mine, mine)]
    return drawn


def sample(
    rollouts: Rollouts,
    encoding: Encoding | Template,
    tokenizer: Any,
    problems: list[tuple[Problems, Problem]],
    *,
    first: int,
    group_size: int,
    params: SamplingParams,
    check: Callable[[], None] = lambda: None,
) -> list[Trajectory]:
    """`group_size` responses to each problem; groups and requests are numbered from `first` * (their size) on.

    `check` is called as they come, and may raise. RuntimeError, which says why, if one could not be sampled.
    """
    requests = []
    for i, (domain, problem) in enumerate(problems, start=first):
        prompt = np.array(encoding.prompt_ids(tokenizer, domain.messages(problem), domain.mode), np.int32)
        requests += [Request(i * group_size + j, i, prompt, params) for j in range(group_size)]
    trajectories = rollouts.generate(requests, check)
    if failed := [t for t in trajectories if t.finish == "failed"]:
        why = f"the first is request {failed[0].request}: {failed[0].error}"
        raise RuntimeError(f"{len(failed)} of {len(trajectories)} responses could not be sampled; {why}")
    for trajectory, (domain, problem) in zip(trajectories, _repeated(problems, group_size), strict=True):
        trajectory.domain, trajectory.mode, trajectory.problem = domain.name, domain.mode, problem
    return trajectories


@contextmanager
def sampling(learner: Learner, rollouts: Rollouts, version: int, colocated: bool) -> Iterator[None]:
    """Inside, the workers sample with the learner's weights, as that version. Colocated, they have the device's memory
    inside, and the learner has it outside; while the weights change hands, both have theirs."""
    if colocated:
        rollouts.reload()
    handle = learner.weights(version, rollouts.receivers)
    rollouts.sync(handle, version, later=lambda: learner.weights(version))
    if colocated:
        learner.offload()
        rollouts.restore()
    yield
    if colocated:
        rollouts.offload()
        learner.reload()


def sampling_params(settings: Sampling, seed: int) -> SamplingParams:
    """A stage's, of all its requests."""
    return SamplingParams(**settings.model_dump(exclude={"draft"}), seed=seed)


def score(grader: Grader, trajectories: list[Trajectory]) -> float:
    """Grades the responses, each in a process that can be killed, and writes the scores into the trajectories.

    Returns how many it graded a second.
    """
    began = time.monotonic()
    items = [
        (t.problem, t.text, t.finish == "stop", t.mode, len(t.response_ids))
        for t in trajectories
        if t.problem is not None
    ]
    for trajectory, result in zip(trajectories, grader.grade(items), strict=True):
        trajectory.score = result
    return len(items) / (time.monotonic() - began)


def shown(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as a row of a table."""
    problem, result = trajectory.problem, trajectory.score
    row = {
        "request": trajectory.request,
        "group": trajectory.group,
        "domain": trajectory.domain,
        "prompt": problem.question if problem else "",
        "response": trajectory.text,
        "finish": trajectory.finish,
        "tokens": len(trajectory.response_ids),
    }
    if result is not None:
        row |= {"value": result.value, "correct": result.correct, "note": result.note}
        row |= {f"part_{name}": part for name, part in result.parts.items()}
    return row


def write_rollouts(folder: Path, step: int, trajectories: list[Trajectory]) -> None:
    """rollouts/STEP.parquet: a row for each trajectory, with its ids and log-probs; renamed into place."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"step": step, **shown(t), "response_ids": t.response_ids, "logprobs": t.logprobs, "versions": t.versions}
        for t in trajectories
    ]
    columns = dict.fromkeys(name for row in rows for name in row)  # each domain has its own parts of a score
    rows = [{name: row.get(name) for name in columns} for row in rows]
    file = folder / f"{step:06}.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file.with_suffix(".new"))
    file.with_suffix(".new").rename(file)


def length_metrics(trajectories: list[Trajectory]) -> dict[str, float]:
    """Mean response length in tokens, the share of responses that were cut, and of drafts that were right, if any."""
    drafted = sum(t.drafted for t in trajectories)
    accepted = sum(t.accepted for t in trajectories)
    return {
        "response_tokens": float(np.mean([len(t.response_ids) for t in trajectories])),
        "unfinished": float(np.mean([t.finish == "length" for t in trajectories])),
        **({"draft_acceptance": accepted / drafted} if drafted else {}),
    }


def shown_service(metrics: dict[str, float]) -> str:
    """How the rollout workers did in a step (`Rollouts.metrics`), in a few words; what is as it should be is left out.

    Tokens a second while they sampled, and the requests that one of them decoded at once.
    """
    words = f"{metrics['rollout/tokens_per_second']:,.0f} tok/s in batches of {metrics['rollout/batch']:.3g}"
    counts = {"queued": metrics["rollout/queue"], **{n: metrics[f"rollout/{n}"] for n in ("preemptions", "deaths")}}
    return ", ".join([words, *(f"{name} {round(count)}" for name, count in counts.items() if count >= 0.5)])


def sampled_rate(trajectories: list[Trajectory], began: float) -> float:
    """Sampled tokens a second of a step that began at that monotonic time.

    Prompts do not count: a group's is computed once, whatever the group's size.
    """
    return sum(len(t.response_ids) for t in trajectories) / (time.monotonic() - began)


def _repeated(problems: list[tuple[Problems, Problem]], times: int) -> list[tuple[Problems, Problem]]:
    return [pair for pair in problems for _ in range(times)]
