"""Evaluation: every model answers the same held-out problems of every domain, greedily."""

import shutil
import time
from collections import Counter
from typing import Any

from ..rl.trajectory import SamplingParams
from .recipe import BASE
from .rollout import sample, score
from .stage import Run, speaker, write_json


def evaluate(run: Run, model: str) -> list[dict[str, Any]]:
    """Writes evaluations/MODEL.json and returns its rows {"model", "domain", "correct", "total"}.

    What it took is evaluations/times/MODEL.json, so that equal models have equal evaluations. Raises Interrupted, and
    writes nothing, if the run is asked to stop meanwhile.
    """
    began = time.monotonic()
    settings = run.recipe.evaluate
    encoding, tokenizer = speaker(run, model)
    problems = [(d, p) for d in run.domains.values() for p in d.problems("heldout", 0, settings.problems)]
    params = SamplingParams(temperature=0.0, max_new_tokens=settings.max_new_tokens)
    folder = run.folder / "evaluations"
    journal = folder / f"{model}.journal"
    lent = run.fleet.rollouts(run.model(model), 1, journal)
    with lent as rollouts, run.fleet.lend("grader", run.new_grader) as grader:
        trajectories = sample(
            rollouts, encoding, tokenizer, problems,
            first=0, group_size=1, params=params, check=lambda: run.check(f"the evaluation of {model}"),
        )  # fmt: skip
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
    (folder / "times").mkdir(parents=True, exist_ok=True)
    write_json(folder / "times" / f"{model}.json", {"wall_seconds": time.monotonic() - began})
    write_json(folder / f"{model}.json", {"model": model, "rows": rows, "failures": failures, "domains": outcomes})
    shutil.rmtree(journal)
    return rows


def evaluated(run: Run) -> list[str]:
    """The models that the run evaluates: the base, and every stage that does not opt out."""
    base = [BASE] if run.recipe.base is not None else []
    return base + [name for name, stage in run.recipe.graph().items() if stage.evaluate]
