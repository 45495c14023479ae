"""The records of a verifiable reward: a problem that knows how to score its answers, and a score."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One question; `(task, index)` is its identity among those with the same parameters."""

    domain: str
    """The recipe's domain."""
    task: str
    """reasoning-gym's name of the generator."""
    index: int
    """The generator's seed of this very problem."""
    question: str
    answer: str
    """The stored answer; empty where the task stores none."""
    entry: dict[str, Any]
    """reasoning-gym's own entry, which its scorer wants."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """The task's parameters as JSON: some scorers look at them (the range of puzzle24's numbers)."""

    def to_json(self) -> dict[str, Any]:
        """A dict that survives JSON, tuples and non-string keys of the entry included."""
        return {**asdict(self), "entry": encode(self.entry)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Problem:
        return cls(**{**record, "entry": decode(record["entry"])})


@dataclass(frozen=True)
class Score:
    """What a response is worth."""

    value: float
    """What GRPO maximizes, 0..1."""
    correct: bool
    """What evaluation counts: full marks by the task's own scorer and the right format."""
    parts: dict[str, float]
    """`{"task": 0..1, "format": 0 or 1}`"""
    note: str = ""
    """Why the response counts as failed ("timeout after 5 s: chain_sum"), or empty."""


def encode(value: Any) -> Any:
    """`value` in JSON's types, so that `decode` gives back an equal one.

    Scorers compare boards of tuples with the entry's (arc_agi) and index by integer keys (graph_color), which
    plain JSON would turn into lists and strings. Tuples become {"$tuple": [...]}, dicts that JSON cannot hold
    {"$dict": [[key, value], ...]}. Subclasses of str, int and float (numpy's) lose their subclass.

    Raises: TypeError for any other type.
    """
    match value:
        case None | bool():
            return value
        case str():
            return str(value)
        case int():
            return int(value)
        case float():
            return float(value)
        case list():
            return [encode(item) for item in value]
        case tuple():
            return {"$tuple": [encode(item) for item in value]}
        case dict() if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: encode(item) for key, item in value.items()}
        case dict():
            return {"$dict": [[encode(key), encode(item)] for key, item in value.items()]}
    raise TypeError(f"an entry holds a {type(value).__name__}, which JSON cannot carry: {value!r:.80}")


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    match value:
        case list():
            return [decode(item) for item in value]
        case {"$tuple": items}:
            return tuple(decode(item) for item in items)
        case {"$dict": pairs}:
            return {decode(key): decode(item) for key, item in pairs}
        case dict():
            return {key: decode(item) for key, item in value.items()}
    return value
