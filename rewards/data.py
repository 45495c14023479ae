"""Problems from files: JSONL, Parquet, or whatever Hugging Face's `datasets` loads.

A row is a problem. What rewards look for in it (`question`, `answer`, `tests` ...) may have other names in the file: a
recipe's `fields` says which. The rows are held in memory. Which rows a step sees follows from the run's seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .domains import MODES, Domain, Split
from .problem import Problem, encode
from .registry import missing, mix

Source = str | Mapping[str, Any]
"""A file's path (.jsonl or .parquet), or `datasets.load_dataset`'s arguments ({path, name, split ...})."""


@dataclass(frozen=True)
class Row:
    """One row, with its fields under the names that rewards know."""

    number: int
    """Its line in a JSONL file, from 1; else its place, from 1."""
    fields: dict[str, Any]


def read(source: Source, fields: Mapping[str, str], where: str) -> list[Row]:
    """All rows. `fields`: a name that rewards know -> the file's, dots for what lies inside of it.

    Raises: UserError, starting with the file and the row's number, or with `where` for what is no source.
    """
    shown = str(source) if isinstance(source, str) else str(source.get("path", source))
    rows = []
    for number, row in _rows(source, where):
        if not isinstance(row, dict):
            raise UserError(f"{shown}: row {number}: {row!r:.60} is no object")
        for name, theirs in fields.items():
            row = {**row, name: _field(row, theirs, f"{shown}: row {number}", f"{where}.fields.{name}")}
        _check(row, f"{shown}: row {number}")
        rows.append(Row(number, row))
    if not rows:
        raise UserError(f"{shown}: has no rows")
    return rows


class FileDomain:
    """The problems of one domain of a recipe, from rows. What `domains.Domain` offers, for data.

    Args:
        name: the recipe's name of the domain.
        mode: "chat" or "high", how its problems are answered.
        train: what GRPO and distillation draw from, and SFT's demonstrations.
        heldout: what evaluation uses.
        fields: as for `read`.
        rewards: as for `registry.mix`.
        demonstrations: how many SFT trains on, at most as many as there are.
        seed: the run's.

    Raises: UserError for a row without a field that it needs, or a row of the wrong type.

    `duplicates` are the training rows whose question is also held out, with that row's number; they are left out.
    """

    def __init__(
        self,
        name: str,
        mode: str,
        train: Source,
        heldout: Source,
        fields: Mapping[str, str],
        rewards: Mapping[str, Any],
        demonstrations: int,
        seed: int,
    ) -> None:
        where = f"domains.{name}.data"
        if mode not in MODES:
            raise UserError(f"domains.{name}.mode: {mode!r} is not one of {', '.join(MODES)}")
        self.name, self.mode, self.seed = name, mode, seed
        self._rewards = dict(rewards)
        parts = mix(rewards, f"domains.{name}.rewards")
        tables = [(source, read(source, fields, where)) for source in (train, heldout)]
        for source, rows in tables:
            shown = source if isinstance(source, str) else source.get("path", "")
            for row in rows:
                for part, lacking in missing(parts, row.fields):
                    raise UserError(
                        f"{shown}: row {row.number}: no field {lacking[0]!r}, which {part.name} grades by; it has "
                        f"{', '.join(row.fields)}; name it in {where}.fields"
                    )
        (_, kept), (_, self._heldout) = tables
        seen = {_same(row): row.number for row in self._heldout}
        self.duplicates = [(row.number, seen[_same(row)]) for row in kept if _same(row) in seen]
        self._train = [row for row in kept if _same(row) not in seen]
        if not self._train:
            raise UserError(f"{where}: every training row is held out, too")
        self._order: tuple[int, np.ndarray] = -1, np.arange(0)  # of the last pass that was asked for
        self._files = {"train": _stem(train), "heldout": _stem(heldout)}
        self.demonstrations, self.heldout = min(demonstrations, len(self._train)), len(self._heldout)

    def problems(self, split: Split, start: int, count: int) -> list[Problem]:
        """Problems `start` to `start + count - 1` of a split, the same whenever asked.

        `heldout` is in the file's order and ends where the file does; `train` goes through the rows in an order of its
        own in each pass. `demonstrations` are the first of the first pass, `validation` those that follow.

        Raises: UserError where demonstrations are asked of rows without one, or more for validation than there are.
        """
        match split:
            case "heldout":
                rows = self._heldout[start : start + count]
            case "train":
                rows = [self._drawn(i) for i in range(start, start + count)]
            case "demonstrations" | "validation":
                first = self.demonstrations if split == "validation" else 0
                if first + start + count > len(self._train):
                    raise UserError(
                        f"domains.{self.name}: {count} rows for {split} are not there, with {first} for others of "
                        f"{len(self._train)}; lower demonstrations"
                    )
                rows = [self._drawn(first + i) for i in range(start, start + count)]
                for row in rows:
                    if not isinstance(row.fields.get("demonstration"), str):
                        raise UserError(
                            f"{self._files['train']}: row {row.number}: no text in the field 'demonstration', which "
                            f"SFT learns; name it in domains.{self.name}.data.fields"
                        )
            case _:
                raise ValueError(f"no split {split!r} of files")
        file = self._files["heldout" if split == "heldout" else "train"]
        return [problem_of(row, self.name, file, self._rewards) for row in rows]

    def described_duplicates(self) -> str:
        """What was left out of training, in one line."""
        some = ", ".join(f"row {row} (held-out row {other})" for row, other in self.duplicates[:3])
        more = ", ..." if len(self.duplicates) > 3 else ""
        return f"{len(self.duplicates)} training rows are held out, too, and left out: {some}{more}"

    def demonstration(self, problem: Problem) -> str:
        """What the assistant should have said."""
        return problem.entry["demonstration"]

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        """The prompt: the row's own `messages`, or its question."""
        return problem.entry.get("messages") or [{"role": "user", "content": problem.question}]

    def _drawn(self, i: int) -> Row:
        epoch, place = divmod(i, len(self._train))
        passed, order = self._order  # read and replaced as one: threads may share the domain
        if passed != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self._train))
            self._order = epoch, order
        return self._train[order[place]]


Problems = Domain | FileDomain
"""What the stages draw problems from."""


def problem_of(row: Row, domain: str, file: str, rewards: dict[str, Any]) -> Problem:
    """A row as a problem that these rewards grade."""
    answer = row.fields.get("answer", "")
    text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    return Problem(domain, file, row.number, _question(row), text, row.fields, {}, rewards)


def _rows(source: Source, where: str) -> Iterator[tuple[int, Any]]:
    if not isinstance(source, str):
        yield from enumerate(_dataset(source, where), 1)
        return
    path = Path(source)
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(
            f"{where}: {source!r} is no .jsonl or .parquet; for others give datasets' arguments: {{path: ...}}"
        )
    if not path.is_file():
        raise UserError(f"{where}: no file {source!r}")
    if path.suffix == ".parquet":
        yield from enumerate(_parquet(path), 1)
        return
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{source}: row {number}: no JSON: {error}") from None


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: no Parquet: {error}") from None
    for batch in file.iter_batches():
        yield from batch.to_pylist()


def _dataset(arguments: Mapping[str, Any], where: str) -> Iterator[Any]:
    import datasets

    try:
        loaded = datasets.load_dataset(**arguments)
    except (ValueError, TypeError, FileNotFoundError, ConnectionError) as error:
        raise UserError(
            f"{where}: datasets cannot load {dict(arguments)}: {' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(loaded, datasets.Dataset):
        raise UserError(f"{where}: {dict(arguments)} has the splits {', '.join(map(str, loaded))}; add split: NAME")
    yield from loaded


def _field(row: Mapping[str, Any], name: str, place: str, key: str) -> Any:
    """A field by its name, or by dots what lies inside of one."""
    if name in row:
        return row[name]
    found: Any = row
    for step in name.split("."):
        if not isinstance(found, Mapping) or step not in found:
            raise UserError(f"{place}: no field {name!r} ({key}); it has {', '.join(row)}")
        found = found[step]
    return found


def _check(row: Mapping[str, Any], place: str) -> None:
    """UserError unless the row can be asked: by a text, or by chat messages that end with the user's."""
    messages: Any = row.get("messages")
    if messages is not None:
        said = isinstance(messages, list) and all(
            isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
            for each in messages
        )
        if not said or not messages:
            raise UserError(f'{place}: messages has to be a list of {{"role": ..., "content": ...}}')
    elif "question" not in row:
        raise UserError(f"{place}: no field 'question', nor messages; it has {', '.join(row)}; name it in fields")
    elif not isinstance(row["question"], str) or not row["question"].strip():
        raise UserError(f"{place}: question is {row['question']!r:.60}, and no text")
    try:
        encode(dict(row))
    except TypeError as error:
        raise UserError(f"{place}: {error}") from None


def _question(row: Row) -> str:
    if row.fields.get("messages"):
        return row.fields["messages"][-1]["content"]
    return row.fields["question"]


def _same(row: Row) -> str:
    """Equal for the same question: upper and lower case and white space do not matter."""
    messages: Sequence[Mapping[str, str]] = row.fields.get("messages") or [{"content": row.fields.get("question", "")}]
    return "\n".join(" ".join(each["content"].casefold().split()) for each in messages)


def _stem(source: Source) -> str:
    return Path(str(source if isinstance(source, str) else source.get("path", "data"))).name
