"""reasoning-gym's own scorers as a reward."""

import functools
import json
import math
from collections.abc import Callable
from typing import Any

from . import domains
from .answers import tagged
from .problem import Problem, Response, Score


def reasoning_gym(trajectory: Response, problem: Problem) -> Score:
    """The score of the task's own scorer for what `<answer>` holds, and 0 without an answer."""
    answer = tagged(trajectory)
    if answer is None:
        return Score(0.0, False)
    score = float(_scorer(problem.task, json.dumps(problem.parameters))(answer, problem.entry))
    if not math.isfinite(score):
        raise ValueError(f"its score is {score}")
    return Score(score, score >= 1.0)


def prepare(problem: Problem) -> None:
    """Builds the task's scorer, which can take a second. Raises: UserError for a task that is not there."""
    _scorer(problem.task, json.dumps(problem.parameters))


@functools.cache
def _scorer(task: str, parameters: str) -> Callable[[str, dict[str, Any]], float]:
    return domains.make_scorer(task, json.loads(parameters))
