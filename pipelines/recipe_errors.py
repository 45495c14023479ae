"""What is wrong with a recipe, a line each: the place, the key, the mistake and what would be right."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from .yaml_lines import Document, Path, show

_MOST_LINES = 5
_LISTED = 24  # choices named in full where none is near
_RANGE = ("greater_than", "less_than", "too_short", "too_long")  # how these errors' names begin
_NOUNS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", tuple: "a list"}
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}  # annotated_types' names


def suggest(name: str, choices: Iterable[str]) -> str:
    """The nearest choice ("did you mean 'lr'?"), or all of them where none is near."""
    choices = list(choices)
    near = difflib.get_close_matches(name, choices, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    if not choices:
        return "there is none to choose from"
    return "choose from " + ", ".join(choices[:_LISTED]) + (", ..." if len(choices) > _LISTED else "")


def message(problems: Iterable[tuple[Path, str]], document: Document) -> str:
    """A UserError's message: a line for each problem, in the file's order, none twice, five at most."""
    lines = {document.error(path, text): document.origin(path).line for path, text in problems}
    ordered = sorted(lines, key=lambda line: lines[line])
    if len(ordered) > _MOST_LINES:
        ordered[_MOST_LINES:] = [f"... and {len(ordered) - _MOST_LINES} more"]
    return "\n".join(ordered)


def explain(error: ValidationError, root: type[BaseModel]) -> list[tuple[Path, str]]:
    """(path in the document, what is wrong there) for everything that validation as `root` refused."""
    return [_explain(e["type"], e["loc"], e["input"], e["msg"], root) for e in error.errors()]


def _explain(kind: str, loc: Path, value: Any, text: str, root: type[BaseModel]) -> tuple[Path, str]:
    if kind == "extra_forbidden":
        owner, path = _expected_at(loc[:-1], root)
        return (*path, loc[-1]), f"unknown key; {_suggest_key(str(loc[-1]), owner.type)}"
    expected, path = _expected_at(loc, root)
    if kind == "union_tag_not_found":
        return (*path, "kind"), f"missing; {suggest('', _by_kind(expected.type))}"
    if kind == "union_tag_invalid":
        given, choices = value["kind"], _by_kind(expected.type)
        return (*path, "kind"), f"{show(given)} is no kind of stage; {suggest(str(given), choices)}"
    if kind == "missing":
        return path, f"missing; give {expected.wanted()}"
    if kind == "literal_error":
        choices = [str(choice) for choice in get_args(expected.type)]
        return path, f"{show(value)} is not possible; {suggest(str(value), choices)}"
    if kind.startswith(_RANGE):
        return path, f"{show(value)} is out of range; give {expected.wanted()}"
    if expected.type is str and isinstance(value, int | float):
        return path, f'{show(value)} is not text; put it in quotes ("{show(value)}")'
    if kind.endswith(("_type", "_parsing", "_from_float")):
        return path, f"{show(value)} is not {expected.noun()}; give {expected.wanted()}"
    return path, f"{show(value)}: {text}; give {expected.wanted()}"


@dataclass(frozen=True)
class _Expected:
    """What belongs at one place of a recipe: a type, its limits, and an example of it."""

    type: Any
    limits: Sequence[Any] = ()
    example: Any = None

    def noun(self) -> str:
        return _NOUNS.get(get_origin(self.type) or self.type, "a mapping")

    def wanted(self) -> str:
        """For an error message, e.g. "a positive number, e.g. 0.001"."""
        bounds = {at: getattr(limit, at) for limit in self.limits for at in _BOUNDS if hasattr(limit, at)}
        if bounds == {"gt": 0}:
            text = self.noun().replace("a ", "a positive ", 1)
        elif bounds:
            text = f"{self.noun()} " + " and ".join(f"{_BOUNDS[name]} {n}" for name, n in bounds.items())
        elif any(getattr(limit, "min_length", 0) for limit in self.limits):
            text = f"{self.noun()} that is not empty"
        elif self.noun() == "a mapping" and self.example is None:
            text = "a mapping ({KEY: VALUE}, or {})"
        else:
            text = self.noun()
        return text if self.example is None else f"{text}, e.g. {self.example}"


def _expected_at(loc: Path, root: type[BaseModel]) -> tuple[_Expected, Path]:
    """What belongs at pydantic's `loc`, and its path in the document (`loc` also names a union's member)."""
    expected, path = _Expected(root), ()
    for part in loc:
        if members := _by_kind(expected.type):
            expected = _Expected(members[str(part)])
            continue
        path = (*path, part)
        fields = _fields(expected.type)
        if part in fields:
            info = fields[str(part)]
            example = info.examples[0] if info.examples else _flow(info)
            expected = _unwrap(info.annotation, info.metadata, example)
        else:
            inner = get_args(expected.type)
            expected = _unwrap(inner[1] if get_origin(expected.type) is dict else inner[0])
    return expected, path


def _unwrap(kind: Any, limits: Sequence[Any] = (), example: Any = None) -> _Expected:
    """Look through Annotated[T, ...] and T | None."""
    while True:
        if get_origin(kind) is Annotated:
            kind, *more = get_args(kind)
            limits = [*limits, *(limit for part in more for limit in getattr(part, "metadata", [part]))]
        elif type(None) in get_args(kind):
            kind = next(member for member in get_args(kind) if member is not type(None))
        else:
            return _Expected(kind, limits, example)


def _fields(kind: Any) -> dict[str, Any]:
    """Key -> pydantic's field, for a settings class; nothing for any other type."""
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return {}
    return {info.alias or name: info for name, info in kind.model_fields.items()}


def _by_kind(union: Any) -> dict[str, Any]:
    """kind -> settings class, for a union of stages; nothing for any other type."""
    members = [member for member in get_args(union) if "kind" in _fields(member)]
    return {get_args(_fields(member)["kind"].annotation)[0]: member for member in members}


def _suggest_key(key: str, owner: Any) -> str:
    """The nearest key of a settings class; a key of a section below it is named with its section."""
    fields = _fields(owner)
    for name, info in fields.items():
        if key in _fields(info.annotation):
            return f"did you mean '{name}.{key}'?"
    return suggest(key, fields)


def _flow(info: Any) -> str | None:
    """A key's default as one would write it in a recipe; None where it would show nothing."""
    value = None if info.is_required() else info.default
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]" if value else None
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
