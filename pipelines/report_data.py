"""A run's folder, read for its report. Any part may be absent: a run can be looked at while it goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError


class Answers(NamedTuple):
    """A model's outcomes on one domain: which problems, and which of them were right."""

    problems: list[tuple[str, int]]
    correct: list[bool]


class Run:
    """A run's folder, read; every part may be absent."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give a run's folder, such as runs/quickstart")
        self.folder = folder
        self.recipe_text, self.recipe = _yaml(folder / "recipe.yaml")
        self.versions = _json(folder / "versions.json") or {}
        self.evaluations = {path.stem: _json(path) for path in sorted(folder.glob("evaluations/*.json"))}
        self.evaluation_times: dict[str, Any] = {
            path.stem: _json(path) for path in sorted(folder.glob("evaluations/times/*.json"))
        }
        self.done = {path.parent.name: _json(path) for path in sorted(folder.glob("stages/*/done.json"))}
        self.metrics = _metrics(folder / "metrics.jsonl")
        self.stages: dict[str, dict[str, Any]] = dict(self.recipe.get("stages", {}))
        for name, row in [*((name, rows[0]) for name, rows in self.metrics.items()), *self.done.items()]:
            self.stages.setdefault(name, {"kind": row["kind"]})  # of a run whose recipe is not there
        self.base = "base" if self.recipe.get("base") else None
        rows = _json(folder / "results.json") or []
        self.scores: dict[str, dict[str, tuple[int, int]]] = {}
        for row in rows:
            self.scores.setdefault(row["model"], {})[row["domain"]] = row["correct"], row["total"]
        for model, evaluation in self.evaluations.items():  # of a run that did not get as far as its results
            for domain, answers in evaluation["domains"].items():
                count = sum(answer["correct"] for answer in answers), len(answers)
                self.scores.setdefault(model, {}).setdefault(domain, count)
        found = (domain for scores in self.scores.values() for domain in scores)
        self.domains = list(dict.fromkeys([*self.recipe.get("domains", {}), *found]))

    def kind(self, model: str) -> str:
        return "base" if model == "base" else self.stages.get(model, {}).get("kind", "")

    def inputs(self, stage: str) -> Iterator[tuple[str, bool]]:
        """(model, whether it teaches or is averaged; otherwise the stage starts from its weights)."""
        settings = self.stages[stage]
        if "from" in settings:
            yield settings["from"], False
        for name in dict.fromkeys([*settings.get("of", ()), *settings.get("teachers", {}).values()]):
            yield name, True

    def answers(self, model: str, domain: str) -> Answers | None:
        rows = self.evaluations.get(model, {"domains": {}})["domains"].get(domain)
        return rows and Answers([(r["task"], r["index"]) for r in rows], [bool(r["correct"]) for r in rows])


def _json(path: Path) -> Any:
    """The file's content, None where it does not exist."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); remove the file or restore it") from None


def _yaml(path: Path) -> tuple[str, dict[str, Any]]:
    import yaml

    if not path.exists():
        return "", {}
    text = path.read_text(encoding="utf-8")
    try:
        return text, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())}); restore the run's recipe") from None


def _metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by stage. A last line without its end is being written, or was torn by a kill, and is left out."""
    stages: dict[str, list[dict[str, Any]]] = {}
    if path.exists():
        text = path.read_text(encoding="utf-8")
        for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON ({error}); mend or remove the line") from None
            stages.setdefault(row["stage"], []).append(row)
    return stages


def rollout_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a step's rollouts, without their arrays. Raises UserError where it is no Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            plain = [field.name for field in file.schema_arrow if not pa.types.is_list(field.type)]
            return file.read(columns=plain).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file ({error}); remove it or restore it") from None
