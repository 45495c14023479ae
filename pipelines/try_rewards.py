"""`amalgam rewards try`: grades a file of answers and explains each score."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..rewards.data import problem_of, read
from ..rewards.grader import Grader
from ..rewards.problem import Score
from ..rewards.registry import missing, mix

_SHOWN = 100  # characters of a note


def try_rewards(name: str, file: Path, settings: Sequence[str], fields: Sequence[str]) -> list[Score]:
    """Grades the rows of a .jsonl or .parquet file by one reward, prints a line for each, and a summary.

    A row is a problem (`question`, and what the reward grades by) with its `response`; it may have `mode` ("chat" or
    "high"), `ended` (true where absent) and `tokens`. `settings` are KEY=VALUE of the reward's parameters, `fields`
    OURS=THEIRS of the file's names. Returns the scores.

    Raises: UserError for what is no reward, file or row.
    """
    parameters = {key: _yaml(value, key) for key, value in _pairs(settings, "--set")}
    rewards = {name: parameters} if parameters else {name: 1.0}
    parts, rows = mix(rewards), read(str(file), dict(_pairs(fields, "--field")), "try")
    items: list[Any] = []
    for row in rows:
        place = f"{file}: row {row.number}"
        for part, lacking in missing(parts, row.fields):
            raise UserError(f"{place}: no field {lacking[0]!r}, which {part.name} grades by; name it with --field")
        response, mode = row.fields.get("response"), row.fields.get("mode", "chat")
        if not isinstance(response, str):
            raise UserError(f"{place}: no text in the field 'response'; it has {', '.join(row.fields)}")
        if mode not in ("chat", "high"):
            raise UserError(f"{place}: mode is {mode!r}; it is chat or high")
        tokens = row.fields.get("tokens")
        problem = problem_of(row, "try", file.name, rewards)
        ended = row.fields.get("ended", True) is True
        items.append((problem, response, ended, mode, *([tokens] if isinstance(tokens, int) else [])))
    with Grader() as grader:
        scores = grader.grade(items)
    for row, score in zip(rows, scores, strict=True):
        print(f"row {row.number}: {_explained(score)}")
    print(_summary(scores, grader))
    return scores


def _explained(score: Score) -> str:
    verdict = {True: "correct", False: "wrong", None: "-"}[score.correct]
    parts = " ".join(f"{name}={value:.3g}" for name, value in score.parts.items() if "." in name)
    return "  ".join(each for each in (f"{score.value:.3f}", verdict, parts, score.note[:_SHOWN]) if each)


def _summary(scores: list[Score], grader: Grader) -> str:
    mean = sum(score.value for score in scores) / len(scores)
    right = sum(score.correct is True for score in scores)
    failed = ", ".join(f"{count} {kind}" for kind, count in sorted(grader.failures.items())) or "none"
    rate = grader.graded / grader.seconds
    return f"{len(scores)} graded: mean {mean:.3f}, {right} correct; failed: {failed}; {rate:.0f} a second"


def _pairs(given: Sequence[str], option: str) -> list[tuple[str, str]]:
    for each in given:
        if "=" not in each:
            raise UserError(f"{option} {each}: has no value; give KEY=VALUE")
    return [(key, value) for key, _, value in (each.partition("=") for each in given)]


def _yaml(text: str, key: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {key}: {text!r} is no YAML: {' '.join(str(error).split())}") from None
