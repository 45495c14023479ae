"""Rewards by name, and mixes of them: what a recipe's `rewards:` means.

A reward is a function `reward(trajectory, problem) -> Score`. Its parameters are its keyword-only arguments. A name is
one of `REWARDS`, or `module:function` for one of the user's own.
"""

import importlib
import inspect
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

from ..errors import UserError
from .problem import Problem, Response, Score

Reward = Callable[..., Score]


class Kind(NamedTuple):
    """A reward of our own."""

    where: str
    """"module:function" inside this package."""
    needs: tuple[tuple[str, ...], ...] = ()
    """Fields that a problem's entry has to have: all of one of these tuples."""


REWARDS: dict[str, Kind] = {
    "reasoning-gym": Kind("gym:reasoning_gym"),
    "math": Kind("mathematics:math", (("answer",),)),
    "code": Kind("code:code", (("inputs", "outputs"), ("tests",))),
    "instruction": Kind("instruction:instruction", (("instruction_id_list", "kwargs"),)),
    "choice": Kind("structured:choice", (("answer",),)),
    "json": Kind("structured:json_schema", (("schema",),)),
    "tool-call": Kind("structured:tool_call", (("calls",),)),
    "format": Kind("form:format"),
    "length": Kind("form:length"),
    "language": Kind("form:language"),
    "judge": Kind("judge:judge"),
}
DEFAULT = {"task": {"reward": "reasoning-gym", "weight": 0.9}, "format": {"weight": 0.1}}
"""Of problems from reasoning-gym (our choice)."""
_GIVEN = {"generate"}  # arguments that are handed in, not written in a recipe


@dataclass(frozen=True)
class Part:
    """One reward in a mix."""

    label: str
    """How its part is called in metrics and tables."""
    name: str
    weight: float
    parameters: dict[str, Any]

    @property
    def function(self) -> Reward:
        return resolve(self.name, self.label)

    @property
    def seconds(self) -> float:
        """What one grade may take beyond the grader's own deadline: `seconds` of the reward's module, if it has one."""
        limit = self._own("seconds")
        return float(limit(**self.parameters)) if limit else 0.0

    @property
    def compiles(self) -> Callable[[str], bool] | None:
        """Which code may be compiled while it grades; None, for a reward of the user's, means any."""
        if self.name not in REWARDS:
            return None
        return self._own("compiles") or (lambda source: False)

    def prepare(self, problem: Problem) -> None:
        """What takes long the first time, for problems like this one."""
        if prepare := self._own("prepare"):
            prepare(problem)

    def grade(self, response: Response, problem: Problem) -> Score:
        """Its score, the value clipped to 0..1.

        Raises: TypeError if the function returns no Score, ValueError if a value is no number.
        """
        return _checked(self.name, self.function(response, problem, **self.parameters))

    def _own(self, name: str) -> Any:
        """What the module of one of our rewards has by that name, or None."""
        if self.name not in REWARDS:
            return None
        module = importlib.import_module(f".{REWARDS[self.name].where.partition(':')[0]}", __package__)
        return getattr(module, name, None)

    @property
    def needs(self) -> tuple[tuple[str, ...], ...]:
        return REWARDS[self.name].needs if self.name in REWARDS else ()


def mix(rewards: Mapping[str, Any], where: str = "rewards") -> list[Part]:
    """A recipe's `rewards`: label -> weight, or {"reward": NAME (the label where absent), "weight", parameters ...}.

    Raises: UserError, starting with `where`, for a name, a weight or a parameter that is none.
    """
    parts = []
    for label, given in rewards.items():
        place = f"{where}.{label}"
        settings = dict(given) if isinstance(given, Mapping) else {"weight": given}
        name, weight = settings.pop("reward", label), settings.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise UserError(f"{place}.weight: {weight!r} is no weight; give a number above 0")
        parts.append(Part(label, name, float(weight), _typed(resolve(name, place), settings, place)))
    if not parts:
        raise UserError(f"{where}: names no reward; there are {', '.join(REWARDS)}, or module:function")
    return parts


def resolve(name: str, where: str) -> Reward:
    """The function of that name. Raises: UserError, starting with `where`, if there is none or it is no reward."""
    if name in REWARDS:
        module, _, function = REWARDS[name].where.partition(":")
        return getattr(importlib.import_module(f".{module}", __package__), function)
    module, colon, function = str(name).partition(":")
    if not colon:
        near = get_close_matches(str(name), REWARDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(REWARDS)}, or module:function"
        raise UserError(f"{where}: no reward {name!r}; {hint}")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{where}: {name} cannot be imported: {error}; is its folder on PYTHONPATH?") from error
    if not inspect.isroutine(found) or len(_positional(found)) != 2:
        raise UserError(f"{where}: {name} is no reward: it has to be a function of (trajectory, problem)")
    return typing.cast(Reward, found)


def combine(parts: Sequence[Part], scores: Sequence[Score]) -> Score:
    """The mix's score: the weighted mean of these, one for each part, with their values and their own parts by name."""
    total = sum(part.weight for part in parts)
    value = sum(part.weight * score.value for part, score in zip(parts, scores, strict=True)) / total
    said = [score.correct for score in scores if score.correct is not None]
    named: dict[str, float] = {}
    for part, score in zip(parts, scores, strict=True):
        named[part.label] = score.value
        named |= {f"{part.label}.{name}": number for name, number in score.parts.items()}
    several = len(parts) > 1
    notes = [f"{part.label}: {s.note}" if several else s.note for part, s in zip(parts, scores, strict=True) if s.note]
    return Score(value, bool(said) and all(said), named, "; ".join(notes))


def missing(parts: Sequence[Part], entry: Mapping[str, Any]) -> Iterator[tuple[Part, tuple[str, ...]]]:
    """The rewards whose fields a row lacks, with what the first of their choices lacks."""
    for part in parts:
        lacking = [tuple(field for field in fields if field not in entry) for fields in part.needs]
        if lacking and all(lacking):
            yield part, lacking[0]


def _checked(name: str, score: Any) -> Score:
    if not isinstance(score, Score):
        raise TypeError(f"{name} returned {type(score).__name__} and not a Score")
    numbers = {"value": score.value, **score.parts}
    for key, number in numbers.items():
        if isinstance(number, str) or not math.isfinite(number):
            raise ValueError(f"the {key} of {name} is {number!r}")
    parts = {key: float(number) for key, number in score.parts.items()}
    return Score(min(max(float(score.value), 0.0), 1.0), score.correct, parts, " ".join(score.note.split())[:200])


def _positional(function: Any) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [each for each in inspect.signature(function).parameters.values() if each.kind in kinds]


def _typed(function: Reward, parameters: dict[str, Any], where: str) -> dict[str, Any]:
    """The parameters in the types that the function declares. Raises: UserError as `mix` does."""
    from pydantic import TypeAdapter, ValidationError

    declared = {
        name: each
        for name, each in inspect.signature(function).parameters.items()
        if each.kind is inspect.Parameter.KEYWORD_ONLY and name not in _GIVEN
    }
    hints, typed = typing.get_type_hints(function), {}
    for name, value in parameters.items():
        if name not in declared:
            near = "".join(f"did you mean {each}? " for each in get_close_matches(name, declared, n=1))
            takes = f"it takes {', '.join(declared)}" if declared else "it takes none"
            raise UserError(f"{where}.{name}: no such parameter; {near}{takes}")
        try:
            typed[name] = TypeAdapter(hints.get(name, Any)).validate_python(value)
        except ValidationError as error:
            raise UserError(f"{where}.{name}: {value!r} does not fit; {error.errors()[0]['msg']}") from error
    for name, each in declared.items():
        if each.default is inspect.Parameter.empty and name not in typed:
            raise UserError(f"{where}: needs {name}")
    return typed
