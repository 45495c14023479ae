"""A recipe that runs in seconds: two domains, a base that can write the format, every kind of stage but pretraining."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from amalgam.model import initialize, save
from amalgam.model.config import PRESETS
from amalgam.model.encoding import Encoding
from amalgam.model.tokenizer import load as load_tokenizer
from amalgam.pipelines.sft import loss, weighted
from amalgam.rewards.domains import Domain
from amalgam.rl.packing import Row, collate

from .. import tiny

TASKS: dict[str, dict[str, dict[str, Any]]] = {
    "numbers": {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}},
    "words": {"spell_backward": {"min_word_len": 3, "max_word_len": 4}},
}
DEMONSTRATIONS = 24
_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
STEPS = {"sft": 6, "grpo": 12, "average": 0, "merged": 4}
RECIPE = f"""\
name: tiny-run
base: BASE
domains:
  numbers: {{tasks: {json.dumps(TASKS["numbers"])}, demonstrations: {DEMONSTRATIONS}}}
  words: {{tasks: {json.dumps(TASKS["words"])}, demonstrations: {DEMONSTRATIONS}}}
stages:
  sft-{{domain}}:
    kind: sft
    from: base
    batch_size: 8
    max_epochs: 2
    validation: 8
    indexer: {{weight: 1}}
    optimizer: {{lr: 0.001}}
  grpo-{{domain}}:
    kind: grpo
    from: sft-{{domain}}
    steps: {STEPS["grpo"]}
    prompts: 4
    group_size: 4
    sampling: {{max_new_tokens: 8}}
    indexer: {{weight: 0.3}}
    optimizer: {{lr: 0.001, micro_batch_tokens: 200}}
  average: {{kind: average, of: "grpo-{{domain}}"}}
  merged:
    kind: distill
    from: base
    teachers: grpo-{{domain}}
    steps: {STEPS["merged"]}
    prompts: 5
    sampling: {{max_new_tokens: 8}}
    indexer: {{weight: 0.3}}
    optimizer: {{lr: 0.001}}
evaluate: {{problems: 8, max_new_tokens: 8}}
stages_at_once: 2
tracking: {{wandb: "off"}}
"""


def make_base(folder: Path) -> Path:
    """A random model after a few steps on all demonstrations: its samples of one prompt differ in reward."""
    model = initialize(tiny.config(), 0)
    model.origin = PRESETS / "tiny"
    encoding, tokenizer = Encoding.default(), load_tokenizer(model.origin)
    rows: list[Row] = []
    for name, tasks in TASKS.items():
        domain = Domain(name, "chat", tasks, DEMONSTRATIONS, 8, 0)
        for problem in domain.problems("demonstrations", 0, DEMONSTRATIONS):
            answer = {"role": "assistant", "content": domain.demonstration(problem)}
            ids, trained = encoding.ids(tokenizer, [*domain.messages(problem), answer], "chat")
            rows.append({"tokens": np.array(ids, np.int32), "trained": np.array(trained, np.float32)})
    batch = collate(weighted(rows), "cpu")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(25):
        optimizer.zero_grad()
        loss(model, batch, {})[0].backward()
        optimizer.step()
    save(model, folder)
    return folder


def metrics(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of metrics.jsonl by stage."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["stage"], []).append(row)
    return found


def outcome(run: Path) -> dict[str, Any]:
    """All that a run found out, without what the clock wrote: equal if and only if the runs are bit-equal."""
    clock = ("time", "tokens_per_second", "grades_per_second", "rollout/tokens_per_second")
    clock += ("rollout/time_to_first_token",)
    files = [*run.glob("stages/*/checkpoint/*"), *run.glob("evaluations/*.json"), run / "results.json"]
    found: dict[str, Any] = {str(f.relative_to(run)): f.read_bytes() for f in files}
    for file in run.glob("stages/*/rollouts/*.parquet"):
        found[str(file.relative_to(run))] = pq.read_table(file).to_pylist()
    for stage, rows in metrics(run).items():
        found[f"metrics of {stage}"] = [{k: v for k, v in row.items() if k not in clock} for row in rows]
    return found


@contextmanager
def driver(recipe: Path, runs: Path) -> Iterator["Driver"]:
    """`amalgam run` in a process of its own; none of all the processes it brings about outlives the block."""
    made = Driver(recipe, runs)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait(timeout=60)
        for pid in made.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Driver:
    def __init__(self, recipe: Path, runs: Path):
        self._mark = f"AMALGAM_TEST_DRIVER={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        # -P: the working directory stays off sys.path
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "amalgam.pipelines.cli", "run", str(recipe), "--runs", str(runs)],
            env={**os.environ, name: value},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def processes(self) -> list[int]:
        """All processes that the driver brought about and that are still there, by what they inherited from it."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes()
            except OSError:  # gone, or not ours
                continue
            if self._mark.encode() in environment.split(b"\0") and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        return found

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"{what}: not within {seconds} s"
            assert self.process.poll() is None, f"{what}: the driver ended: {self.process.communicate()[0]}"
            time.sleep(0.01)

    def kill(self) -> None:
        """kill -9 of the driver alone; what it started has to notice, within a minute.

        Not Ray's two agents: now and then each holds the end of the pipe whose closing would tell the other.
        """
        self.process.kill()
        self.process.wait(timeout=60)
        until = time.monotonic() + 60
        while left := [c for c in map(_command, self.processes()) if c and not c.startswith(_AGENTS)]:
            assert time.monotonic() < until, f"outlive the driver: {left}"
            time.sleep(0.05)


def _command(pid: int) -> str:
    """Empty if it is gone, or ended and not yet reaped."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
