"""Evaluation: every model answers the same held-out problems of every domain, greedily."""

import time
from collections import Counter
from typing import Any

from .recipe import BASE
from .rollout import sample, score
from .stage import Run, speaker, write_json

MAX_BATCH = 512
"""Problems between two moments at which a run can be stopped."""


def evaluate(run: Run, model: str) -> list[dict[str, Any]]:
    """Writes evaluations/MODEL.json and returns its rows {"model", "domain", "correct", "total"}.

    What it took is evaluations/times/MODEL.json, so that equal models have equal evaluations. Raises Interrupted, and
    writes nothing, if the run is asked to stop: between two batches of the engine.
    """
    began = time.monotonic()
    settings = run.recipe.evaluate
    encoding, tokenizer = speaker(run, model)
    problems = [(d, p) for d in run.domains.values() for p in d.problems("heldout", 0, settings.problems)]
    limits = {"temperature": 0.0, "max_new_tokens": settings.max_new_tokens}
    with run.fleet.rollouts(run.model(model), 1) as rollouts, run.fleet.lend("grader", run.new_grader) as grader:
        trajectories = []
        for first in range(0, len(problems), MAX_BATCH):
            run.check(f"the evaluation of {model}")
            batch = problems[first : first + MAX_BATCH]
            trajectories += sample(rollouts, encoding, tokenizer, batch, first=first, group_size=1, **limits, seed=0)
        before = Counter(grader.failures)
        score(grader, trajectories)
        failures = dict(Counter(grader.failures) - before)
    outcomes: dict[str, list[dict[str, Any]]] = {name: [] for name in run.domains}
    for t in trajectories:
        assert t.problem is not None and t.score is not None
        outcomes[t.domain].append(
            {
                "task": t.problem.task,
                "index": t.problem.index,
                "question": t.problem.question,
                "answer": t.problem.answer,
                "response": t.text,
                "correct": t.score.correct,
                "parts": t.score.parts,
                "note": t.score.note,
                "finish": t.finish,
            }
        )
    rows = [
        {"model": model, "domain": name, "correct": sum(o["correct"] for o in found), "total": len(found)}
        for name, found in outcomes.items()
    ]
    folder = run.folder / "evaluations"
    (folder / "times").mkdir(parents=True, exist_ok=True)
    write_json(folder / "times" / f"{model}.json", {"wall_seconds": time.monotonic() - began})
    write_json(folder / f"{model}.json", {"model": model, "rows": rows, "failures": failures, "domains": outcomes})
    return rows


def evaluated(run: Run) -> list[str]:
    """The models that the run evaluates: the base, and every stage that does not opt out."""
    base = [BASE] if run.recipe.base is not None else []
    return base + [name for name, stage in run.recipe.graph().items() if stage.evaluate]
