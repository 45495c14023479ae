"""What a run leaves behind while it runs: metrics.jsonl always, and Weights & Biases beside it.

metrics.jsonl is the source of truth: one object a step, written whole or not at all. Weights & Biases gets
the same numbers, one run a stage in one group a pipeline, with the checkpoints' lineage as artifacts by
reference and a table of sample rollouts. It is imported lazily, stays silent, and keeps to the run's folder.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError

WandbMode = Literal["auto", "offline", "online", "off"]
# Deadlines of wandb's own waits: to start a run, and to upload what is left at its end.
START_SECONDS, FINISH_SECONDS = 60, 300


class Tracker:
    """A run's metrics. Its stages may run at once, each in a thread of its own.

    `wandb_mode`: "offline" (uploaded later with `wandb sync`), "online", "auto" (online if the user is logged
    in, else offline) or "off". Where wandb is not installed, "online" raises UserError and the other modes
    leave it at metrics.jsonl; `status` says in words what was decided.
    """

    def __init__(self, run_dir: Path, recipe_name: str, wandb_mode: WandbMode, project: str) -> None:
        self.run_dir, self.recipe_name, self.project = Path(run_dir).resolve(), recipe_name, project
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.id = _stored_id(self.run_dir / "run_id")
        self.mode: Literal["offline", "online", "off"]
        self.mode, self.status = self._decide(wandb_mode)
        self._metrics = _Lines(self.run_dir / "metrics.jsonl")
        self._starting = threading.Lock()

    def stage(self, name: str, kind: str, config: Mapping[str, Any], inputs: Mapping[str, Path]) -> StageLog:
        """A context manager. `inputs`: model -> checkpoint's folder, of all that the stage is made from."""
        return StageLog(self, name, kind, config, inputs)

    def close(self) -> None:
        self._metrics.close()

    def _decide(self, asked: WandbMode) -> tuple[Literal["offline", "online", "off"], str]:
        if asked == "off":
            return "off", "metrics.jsonl"
        if importlib.util.find_spec("wandb") is None:
            if asked == "online":
                raise UserError("tracking.wandb: online, but wandb is not there; `pip install wandb` or set it to off")
            return "off", "metrics.jsonl (wandb is not installed)"
        # Before the first import: wandb reads these once. What the user has set stays.
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_DATA_DIR", str(self.run_dir / "wandb"))
        os.environ.setdefault("WANDB_CACHE_DIR", str(self.run_dir / "wandb" / "cache"))
        if asked != "offline":
            import wandb

            logged_in = wandb.login(prompt=False, verify=False)
            if asked == "online" and not logged_in:
                raise UserError("tracking.wandb: online without a login; run `wandb login` or set it to offline")
            asked = "online" if logged_in else "offline"
        return asked, f"metrics.jsonl and wandb, {asked}"

    def _start_wandb(self, stage: str, kind: str, config: Mapping[str, Any], inputs: Mapping[str, Path]) -> Any:
        """A wandb run that goes on under the same id after an interruption; None where wandb is off."""
        if self.mode == "off":
            return None
        import wandb

        # x_disable_stats: sampling the machine every few seconds takes time from the cores that train.
        settings = wandb.Settings(
            silent=True, console="off", x_disable_stats=True, disable_git=True, disable_code=True,
            init_timeout=START_SECONDS, finish_timeout=FINISH_SECONDS,
        )  # fmt: skip
        try:
            with self._starting:
                run = wandb.init(
                    project=self.project, group=f"{self.recipe_name}-{self.id}", job_type=kind, name=stage,
                    id=f"{self.id}-{stage}", resume="allow", reinit="create_new", mode=self.mode,
                    dir=self.run_dir, config={**config, "inputs": sorted(inputs)}, settings=settings,
                )  # fmt: skip
        except (wandb.Error, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"tracking.wandb: {self.mode}, but Weights & Biases did not start ({reason}); "
                "mend that, or set tracking.wandb to offline or off"
            ) from error
        # wandb takes inputs only from its server; offline they stand in the config and the output's metadata.
        if not run.offline:
            for name, path in inputs.items():
                run.use_artifact(self._checkpoint(name, path, {}))
        return run

    def _checkpoint(self, name: str, path: Path, metadata: dict[str, Any]) -> Any:
        """Same files, same version: wandb goes by content, so an input meets an earlier stage's output."""
        import wandb

        artifact = wandb.Artifact(f"{self.id}-{name}", type="model", metadata=metadata)
        artifact.add_reference(Path(path).resolve().as_uri())
        return artifact


class StageLog:
    """One stage's metrics; made by `Tracker.stage`, used in a `with`."""

    def __init__(self, tracker: Tracker, name: str, kind: str, config: Mapping[str, Any], inputs: Mapping[str, Path]):
        self.name, self.kind = name, kind
        self._tracker, self._config, self._inputs = tracker, config, inputs
        self._wandb: Any = None

    def __enter__(self) -> StageLog:
        self._wandb = self._tracker._start_wandb(self.name, self.kind, self._config, self._inputs)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one row. NaN and infinities, which JSON lacks, become null and keep their key."""
        values = {key: float(value) for key, value in metrics.items()}
        row = {"stage": self.name, "kind": self.kind, "step": int(step), "time": round(time.time(), 3)}
        if clash := sorted(row.keys() & values.keys()):
            raise ValueError(f"stage {self.name}: a metric may not be called {', '.join(clash)}")
        row |= {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._tracker._metrics.append(row)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show rollouts as a table in wandb, and only there: the run's folder has them as Parquet."""
        if self._wandb is None or not rows:
            return
        import wandb

        columns: list[Any] = list(dict.fromkeys(key for row in rows for key in row))
        data: list[Any] = [[row.get(column) for column in columns] for row in rows]
        table = wandb.Table(columns=columns, data=data, allow_mixed_types=True)
        self._wandb.log({"samples": table}, step=step)

    def artifact(self, path: Path) -> None:
        """Log a checkpoint's folder as this stage's output: by reference, with checksums, not copied."""
        if self._wandb is not None:
            inputs = {name: str(Path(folder).resolve()) for name, folder in self._inputs.items()}
            metadata = {"stage": self.name, "kind": self.kind, "inputs": inputs}
            self._wandb.log_artifact(self._tracker._checkpoint(self.name, path, metadata))

    def rewind(self, step: int) -> None:
        """Drop this stage's rows after `step`, the last finished one: those steps are about to be run again.

        wandb needs none: it ignores a step that it has, and the same step comes out the same.
        """
        self._tracker._metrics.keep(lambda stage, at: stage != self.name or at <= step)


class _Lines:
    """A JSON-lines file for several threads: each row is one write, so that rows never mix."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        text = path.read_bytes()
        # A row torn by a kill would spoil the row that is written after it.
        os.ftruncate(self._file, text.rfind(b"\n") + 1)

    def append(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        with self._lock:
            written = os.write(self._file, line)
        if written != len(line):
            raise OSError(f"{self.path}: wrote {written} of {len(line)} bytes; is the disk full?")

    def keep(self, wanted: Callable[[str, int], bool]) -> None:
        """Leave only the rows whose stage and step are wanted."""
        with self._lock:
            lines = self.path.read_text().splitlines(keepends=True)
            kept = "".join(line for number, line in enumerate(lines, 1) if wanted(*self._place(number, line)))
            beside = self.path.with_suffix(".jsonl.new")
            beside.write_text(kept)
            os.replace(beside, self.path)
            os.close(self._file)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND)

    def close(self) -> None:
        os.close(self._file)

    def _place(self, number: int, line: str) -> tuple[str, int]:
        try:
            row = json.loads(line)
            return row["stage"], int(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            problem = f"{self.path}:{number}: not a row of metrics ({error!r}); mend or remove the line"
            raise UserError(problem) from None


def _stored_id(path: Path) -> str:
    """The run's id, 12 hexadecimal digits, made once: names in wandb stay the same over an interruption."""
    if not path.exists():
        beside = path.with_suffix(".new")
        beside.write_text(uuid.uuid4().hex[:12])
        os.replace(beside, path)
    text = path.read_text().strip()
    if len(text) != 12 or not set(text) <= set("0123456789abcdef"):
        raise UserError(f"{path}: {text[:40]!r} is no run id; restore its 12 hexadecimal digits, or remove it")
    return text
