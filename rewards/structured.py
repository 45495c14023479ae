"""Answers that have a structure: a choice, JSON that fits a schema, tool calls."""

import json
import re
from typing import Any

from .answers import answer, blocks, bounded, boxed, tagged
from .problem import Problem, Response, Score

# A letter alone, or one that a mark sets apart from what follows: "B", "(B)", "\text{B}", "B. a dog", but no "A dog".
_LETTER = re.compile(
    r"[\s(\[*_$]*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?[\s(\[*_]*([A-Z])(?:[\s)\]}*_$.]*|[\s*_$]*[).:,\]}].*)",
    re.DOTALL,
)
_SAID = re.compile(r"\b(?:answer|choice|option)\b\s*(?:is|:|=)?\s*:?\s*[(\[*_]*([A-Z])\b(?!['’])", re.IGNORECASE)


def choice(trajectory: Response, problem: Problem) -> Score:
    """1 if the response chooses the problem's answer, a letter (or one of the entry's `choices`, word for word).

    The choice is in `<answer>`, else in the last `\\boxed{}`, else after "answer is", else it is all of the content.
    Two different ones said are none.
    """
    content = trajectory.content
    if content is None:
        return Score(0.0, False, note="no content to grade")
    wanted, choices = problem.answer.strip(), problem.entry.get("choices", [])
    found = tagged(trajectory)
    found = boxed(bounded(content)) if found is None else found
    if found is None:
        said = {letter.upper() for letter in _SAID.findall(content)}
        if len(said) > 1:
            return Score(0.0, False, note=f"chose {' and '.join(sorted(said))}")
        found = said.pop() if said else content
    right = _chosen(found, choices) == _chosen(wanted, choices)
    return Score(float(right), right, note="" if right else f"chose {found.strip()!r:.60}")


def json_schema(trajectory: Response, problem: Problem) -> Score:
    """1 if the answer is JSON that fits the entry's `schema`, and equals the entry's `value` if it has one; else 0.

    The answer is what `<answer>` holds, else the only fenced block of JSON, else all of the content.
    """
    import jsonschema.validators
    import referencing

    try:
        value = _json(trajectory)
    except ValueError as error:
        return Score(0.0, False, note=f"no JSON: {error}"[:200])
    # A registry of its own: nothing that a schema refers to is fetched.
    validator = jsonschema.validators.validator_for(problem.entry["schema"])
    errors = validator(problem.entry["schema"], registry=referencing.Registry()).iter_errors(value)
    if (error := next(iter(errors), None)) is not None:
        return Score(0.0, False, note=f"{error.json_path}: {error.message}"[:200])
    if "value" in problem.entry and not _equal(value, problem.entry["value"]):
        return Score(0.0, False, note="fits the schema, and is not the value that was asked for")
    return Score(1.0, True)


def tool_call(trajectory: Response, problem: Problem, *, partial: bool = False) -> Score:
    """1 if the response makes exactly the calls of the entry's `calls`, in any order; else 0.

    `calls` is a list of {"name", "arguments": {name: value}}; {"any": [...]} stands for one of several values, and ""
    in that list for an argument that may be left out (as BFCL does). The response's calls are in DeepSeek-V4's markup,
    or JSON: one such object or a list of them, in a fenced block or as all of the content.

    Args:
        partial: the share of arguments that are right over all calls, a call's name counted as one of them; calls and
            arguments that nobody asked for count against it.
    """
    wanted = problem.entry["calls"]
    try:
        made = _calls(trajectory)
    except ValueError as error:
        return Score(0.0, False, note=f"no calls: {error}"[:200])
    if not made and not wanted:
        return Score(1.0, True)
    right, total, notes, left = 0, 0, [], list(made)
    for call in wanted:
        points = [_compared(call, other) for other in left]
        best = max(range(len(points)), key=lambda i: points[i][0] / points[i][1], default=None)
        if best is None or not points[best][0]:
            total += 1 + len(call["arguments"])
            notes.append(f"no call of {call['name']}")
            continue
        other = left.pop(best)
        right, total = right + points[best][0], total + points[best][1]
        if points[best][0] < points[best][1]:
            notes.append(f"{call['name']} with {json.dumps(other['arguments'])[:100]}")
    for other in left:
        total += 1 + len(other["arguments"])
        notes.append(f"a call of {other['name']!r:.40} that nobody asked for")
    value = right / total
    return Score(value if partial else float(value == 1.0), value == 1.0, note="; ".join(notes)[:200])


def prepare(problem: Problem) -> None:
    """Imports what a first grade would wait for."""
    import jsonschema.validators  # noqa: F401
    import referencing  # noqa: F401

    from ..model import completion  # noqa: F401


def _chosen(text: str, choices: list[str]) -> str:
    """The letter of a choice; the text itself, in lower case, where it is none."""
    plain = " ".join(text.split()).casefold()
    for place, each in enumerate(choices):
        if plain == " ".join(str(each).split()).casefold():
            return chr(ord("A") + place)
    match = _LETTER.fullmatch(text.strip())
    return match[1] if match else plain


def _json(response: Response) -> Any:
    """Raises: ValueError where it is no JSON, a key comes twice, or a number is none."""
    text = tagged(response)
    if text is None:
        content = response.content
        if content is None:
            raise ValueError("no content to grade")
        found = blocks(content, "json")
        text = bounded(found[0]) if len(found) == 1 else answer(response) or ""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _equal(one: Any, other: Any) -> bool:
    """Equal as JSON: true is not 1, and 1.0 is."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and one == other or _number(one) and _number(other) and one == other


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def _calls(response: Response) -> list[dict[str, Any]]:
    """{"name", "arguments"} of every call. Raises: ValueError for broken markup, or none at all."""
    from ..model.completion import read_strict
    from ..model.tokenizer import DSML, EOS

    if DSML in response.text:
        message = read_strict(bounded(response.text) + EOS, response.mode == "high")
        calls = [call["function"] for call in message.get("tool_calls", [])]
        return [{"name": call["name"], "arguments": json.loads(call["arguments"])} for call in calls]
    found = _json(response)
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError('a call is {"name": ..., "arguments": {...}}')
        if not isinstance(call.get("arguments"), dict):
            raise ValueError(f"the arguments of {call['name']} are no object")
    return calls


def _compared(wanted: dict[str, Any], made: dict[str, Any]) -> tuple[int, int]:
    """How many of a call's points are right, and how many there are; none are of a call by another name."""
    if wanted["name"] != made["name"]:
        return 0, 1 + len(wanted["arguments"])
    right, total = 1, 1 + len(made["arguments"].keys() - wanted["arguments"].keys())
    for name, value in wanted["arguments"].items():
        several = isinstance(value, dict) and value.keys() == {"any"}
        allowed = value["any"] if several else [value]
        if name not in made["arguments"]:
            total += not (several and "" in allowed)
            continue
        total += 1
        right += any(_equal(made["arguments"][name], each) for each in allowed)
    return right, total
