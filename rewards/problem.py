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
    """reasoning-gym's name of the generator, or the file's."""
    index: int
    """The generator's seed of this very problem; its row's number where it comes from a file."""
    question: str
    answer: str
    """The stored answer; empty where the task stores none."""
    entry: dict[str, Any]
    """reasoning-gym's own entry, which its scorer wants, or the row of the file."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """The task's parameters as JSON: some scorers look at them (the range of puzzle24's numbers)."""
    rewards: dict[str, Any] = field(default_factory=dict)
    """What grades it, as `registry.mix` takes it; nothing for the task's own scorer and the format."""

    def to_json(self) -> dict[str, Any]:
        """A dict that survives JSON, tuples and non-string keys of the entry included."""
        return {**asdict(self), "entry": encode(self.entry)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Problem:
        return cls(**{**record, "entry": decode(record["entry"])})


@dataclass(frozen=True)
class Response:
    """What a reward sees of a trajectory."""

    text: str
    """All that the model wrote, without the end token."""
    ended: bool = True
    """Whether it ended with the end token; else it was cut."""
    mode: str = "chat"
    """"chat" or "high": in "high" it reasons first, up to `</think>`."""
    tokens: int | None = None
    """Its length in tokens, the end token among them, where somebody counted."""

    @property
    def content(self) -> str | None:
        """All of it in mode "chat", what follows `</think>` in mode "high". None if there is no `</think>` then, or if
        a further think tag stands in it: nothing that could be graded."""
        content = self.text
        if self.mode == "high":
            _, end, content = self.text.partition("</think>")
            if not end:
                return None
        elif self.mode != "chat":
            raise ValueError(f"unknown mode {self.mode!r}")
        return None if "<think>" in content or "</think>" in content else content

    @property
    def reasoning(self) -> str:
        """What stands before `</think>` in mode "high"; empty in mode "chat"."""
        return self.text.partition("</think>")[0] if self.mode == "high" else ""


@dataclass(frozen=True)
class Score:
    """What a response is worth."""

    value: float
    """What GRPO maximizes, 0..1."""
    correct: bool | None = None
    """What evaluation counts. None from a reward that has no say in it (a length, a style); in a mix of rewards it is
    True if every reward that has a say says so, and at least one does."""
    parts: dict[str, float] = field(default_factory=dict)
    """What the value is made of, each 0..1; logged one by one."""
    note: str = ""
    """Why it is no more ("timeout after 5 s: chain_sum"), or empty."""


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
