"""CPU seconds per step, wall time and memory of SFT, GRPO and on-policy distillation: `amalgam run` beside TRL 1.16.

    .venv/bin/python benchmarks/trl_compare.py

Both sides do the quickstart's steps, in one domain, from the same base, in fp32 on one thread, alternately and one at a
time. README.md says what is equal and what is not.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from processes import AMALGAM, ENVIRONMENT, Job
from results import machine, print_table, write_result

from amalgam.errors import UserError
from amalgam.model.config import resolve
from amalgam.model.encoding import Encoding
from amalgam.model.tokenizer import EOS
from amalgam.model.tokenizer import load as load_tokenizer
from amalgam.pipelines.recipe import Recipe, load_recipe
from amalgam.rewards.domains import Domain

ROOT = Path(__file__).parents[1]
TRL = "trl==1.16.0"
DOMAIN = "arithmetic"
STAGES = {"sft": f"sft-{DOMAIN}", "grpo": f"grpo-{DOMAIN}", "distill": "merged"}  # the quickstart's, by kind
SIDES = ("amalgam", "trl", "amalgam, no saving")
WARMUP = 3  # steps
DEADLINE = 1800.0  # seconds for one run
_POLL = 0.02
_PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "reasoning-gym")


@dataclass
class Measurement:
    """One run of one side. All times are differences between the warm-up's last step and the last measured one."""

    kind: str
    side: str
    cpu_seconds_per_step: float
    wall_seconds_per_step: float
    peak_bytes: int  # highest sum of the processes' proportional set sizes, sampled, from start to end
    cpu_by_role: dict[str, float]  # CPU seconds per step
    cpu_seconds_to_first_step: float  # start-up and the first step (in "amalgam" distill, the teacher's SFT too)
    metrics: dict[str, float]  # means over the measured steps


@dataclass
class Work:
    """What all runs share: the quickstart with this base, the measured steps, TRL's Python, a folder to work in."""

    quickstart: Recipe
    steps: int
    python: Path
    folder: Path

    @property
    def total(self) -> int:
        """One step more than is measured: a stage's last step evaluates and saves."""
        return WARMUP + self.steps + 1

    @property
    def base(self) -> str:
        assert self.quickstart.base is not None
        return str(resolve(self.quickstart.base).absolute())

    def settings(self, kind: str) -> dict[str, Any]:
        return self.quickstart.stages[STAGES[kind]].model_dump(mode="json", by_alias=True)


def recipe(work: Work, kind: str, name: str, saving: bool) -> dict[str, Any]:
    """The recipe of one of our runs: the stage, and for distillation an SFT stage before it that makes the teacher."""
    common = {"from": "base", "domains": [DOMAIN], "evaluate": False}
    sft = {**work.settings("sft"), **common, "max_epochs": 1}
    stages = {"measured": {**work.settings(kind), **common, "steps": work.total}}
    if kind == "sft":
        stages = {"measured": sft}
    elif kind == "distill":
        stages = {"teacher": sft, "measured": {**stages["measured"], "teachers": {DOMAIN: "teacher"}}}
    domain = work.quickstart.domains[DOMAIN].model_dump(mode="json")
    return {
        "name": name,
        "base": work.base,
        "domains": {DOMAIN: {**domain, "demonstrations": work.total * sft["batch_size"]}},  # an epoch is all the steps
        "stages": stages,
        "evaluate": {"problems": 1, "max_new_tokens": 24},
        "checkpoint_every": 1 if saving else 10 * work.total,
        "tracking": {"wandb": "off"},
    }


def job(work: Work, kind: str, rows: Path) -> dict[str, Any]:
    """The same for TRL: the same problems in the same order (SFT: the same demonstrations)."""
    settings = work.settings(kind)
    own = work.quickstart.domains[DOMAIN]
    batch = settings["batch_size"] if kind == "sft" else settings["prompts"]
    domain = Domain(DOMAIN, own.mode, own.tasks, work.total * batch, 1, work.quickstart.seed)
    encoding, tokenizer = Encoding.from_checkpoint(work.base), load_tokenizer(work.base)
    data: list[dict[str, Any]] = []
    for problem in domain.problems("demonstrations" if kind == "sft" else "train", 0, work.total * batch):
        messages = domain.messages(problem)
        if kind == "sft":
            answer = {"role": "assistant", "content": domain.demonstration(problem)}
            ids, trained = encoding.ids(tokenizer, [*messages, answer], domain.mode)
            data.append({"input_ids": ids, "completion_mask": [int(each) for each in trained]})
            continue
        prompt = {
            "prompt": encoding.encode(messages, domain.mode),
            "prompt_ids": encoding.prompt_ids(tokenizer, messages, domain.mode),
        }
        scored = {
            "parameters": json.dumps(problem.parameters),
            "entry": json.dumps(problem.entry),
            "task": problem.task,
        }
        data.append({**prompt, **scored, "end_id": tokenizer.token_to_id(EOS)})
    result = {
        "kind": kind, "model": work.base, "data": data, "steps": work.total, "batch": batch, "rows": str(rows),
        "folder": str(work.folder / "trl"), "optimizer": settings["optimizer"], "sampling": None,
    }  # fmt: skip
    if kind != "sft":
        temperature, longest = settings["sampling"]["temperature"], settings["sampling"]["max_new_tokens"]
        result["sampling"] = {"temperature": temperature, "max_completion_length": longest}
    if kind == "grpo":
        result["batch"] = batch * settings["group_size"]
        clip = {"epsilon": settings["clip_low"], "epsilon_high": settings["clip_high"]}
        result["grpo"] = {"num_generations": settings["group_size"], **clip}
    if kind == "distill":
        result["teacher"] = str(work.folder / "distill-amalgam-0" / "stages" / "teacher" / "checkpoint")
    return result


def measure(work: Work, kind: str, side: str, repetition: int) -> Measurement:
    name = f"{kind}-{side.replace(', ', '-').replace(' ', '-')}-{repetition}"
    file, log = work.folder / f"{name}.json", work.folder / f"{name}.log"
    if side == "trl":
        rows, stage = work.folder / f"{name}.jsonl", None
        file.write_text(json.dumps(job(work, kind, rows)))
        command = [str(work.python), str(ROOT / "benchmarks" / "trl_side.py"), str(file)]
    else:
        rows, stage = work.folder / name / "metrics.jsonl", "measured"
        file.write_text(json.dumps(recipe(work, kind, name, saving=side == "amalgam")))  # which is YAML
        command = [*AMALGAM, "run", str(file), "--runs", str(work.folder)]
    with Job(command, log, ENVIRONMENT, work.folder) as run:
        marks = watch(run, rows, stage, [1, WARMUP, WARMUP + work.steps])
        peak = run.peak_bytes
    (_, first), (start, before), (end, after) = marks
    found = read_rows(rows, stage)
    used = {role: (after[role] - before[role]) / (end - start) for role in after}
    return Measurement(
        kind=kind,
        side=side,
        cpu_seconds_per_step=sum(used.values()),
        wall_seconds_per_step=(found[end - 1]["time"] - found[start - 1]["time"]) / (end - start),
        peak_bytes=peak,
        cpu_by_role={role: round(seconds, 4) for role, seconds in sorted(used.items())},
        cpu_seconds_to_first_step=first.total(),
        metrics=means(found[start:end]),
    )


def watch(run: Job, rows: Path, stage: str | None, at: list[int]) -> list[tuple[int, Counter[str]]]:
    """Waits for the run's end. For each number in `at`: the steps that were done when it was reached, and the CPU."""
    marks: list[tuple[int, Counter[str]]] = []
    until = time.monotonic() + DEADLINE
    seen = -1
    while (code := run.root.poll()) is None:
        if time.monotonic() > until:
            raise TimeoutError(f"{run.root.args}: not done after {DEADLINE:g} s; {run.tail()}")
        size = rows.stat().st_size if rows.exists() else 0
        if size != seen and len(marks) < len(at):
            seen = size
            done = len(read_rows(rows, stage))
            if done >= at[len(marks)]:
                marks.append((done, run.cpu()))
        time.sleep(_POLL)
    if code or len(marks) < len(at):
        raise RuntimeError(f"{run.root.args} ended with {code} after {len(marks)} of the steps {at}: {run.tail()}")
    return marks


def read_rows(file: Path, stage: str | None) -> list[dict[str, Any]]:
    """The whole rows of a JSON-lines file, of one stage only if it is named."""
    text = file.read_text() if file.exists() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [row for row in rows if stage is None or row["stage"] == stage]


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Each metric's mean over the steps that have it (ours has no loss in a step whose groups are all dropped)."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float) and name not in ("step", "time", "epoch"):
                values.setdefault(name, []).append(value)
    return {name: statistics.fmean(found) for name, found in values.items()}


def prepare(venv: Path) -> Path:
    """TRL in an environment of its own, with the project's versions of what both use; its Python."""
    python, ready = venv / "bin" / "python", venv / f".{TRL}"
    if not ready.exists():
        print(f"installing {TRL} into {venv} (torch first, so that a local CPU build is taken) ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        for packages in (["torch==2.13.0"], [TRL, "reasoning-gym"]):
            subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), *packages], check=True)
        ready.touch()
    return python.absolute()


def versions(python: Path) -> dict[str, str]:
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {_PACKAGES}}}))"
    return json.loads(subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout)


def summarize(found: list[Measurement]) -> dict[str, Any]:
    """The median of each number over the repetitions of one kind and side."""

    def median(name: str) -> float:
        return statistics.median(getattr(each, name) for each in found)

    cpu = [each.cpu_seconds_per_step for each in found]
    metrics = found[0].metrics
    return {
        "kind": found[0].kind,
        "side": found[0].side,
        "repetitions": len(found),
        "cpu_seconds_per_step": median("cpu_seconds_per_step"),
        "cpu_range": [min(cpu), max(cpu)],
        "wall_seconds_per_step": median("wall_seconds_per_step"),
        "peak_bytes": median("peak_bytes"),
        "cpu_seconds_to_first_step": median("cpu_seconds_to_first_step"),
        "new_tokens": metrics.get("response_tokens", metrics.get("completions/mean_length")),
    }


def as_if_none_dropped(work: Work, found: list[Measurement]) -> float:
    """CPU seconds per step of our GRPO if all groups were kept: at most this, the learner's share scaled up.

    (The learner also syncs and saves the weights, which takes no longer with more groups.)
    """
    estimates = []
    for each in found:
        kept = 1 - each.metrics["dropped_groups"] / work.settings("grpo")["prompts"]
        estimates.append(each.cpu_seconds_per_step + each.cpu_by_role["LearnerWorker"] * (1 / kept - 1))
    return statistics.median(estimates)


def show(rows: list[dict[str, Any]]) -> None:
    theirs = {row["kind"]: row["cpu_seconds_per_step"] for row in rows if row["side"] == "trl"}
    table = [
        [
            f"{row['kind']}: {row['side']}",
            f"{row['cpu_seconds_per_step']:.3f}",
            "-".join(f"{each:.3f}" for each in row["cpu_range"]),
            f"{theirs[row['kind']] / row['cpu_seconds_per_step']:.2f}",
            f"{row['wall_seconds_per_step']:.3f}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
            f"{row['cpu_seconds_to_first_step']:.0f}",
            "" if row["new_tokens"] is None else f"{row['new_tokens']:.1f}",
        ]
        for row in rows
    ]
    header = ["", "CPU s/step", "range", "TRL / this", "wall s/step", "peak MiB", "CPU s to step 1", "new tokens"]
    print_table(header, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny", help="a preset, or a checkpoint's folder (default: %(default)s)")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-trl", help="TRL's own environment (made if missing)")
    parser.add_argument("--steps", type=int, default=20, help="measured steps (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="of every side (default: %(default)s)")
    options = parser.parse_args()
    quickstart = load_recipe("quickstart", [f"base={options.base}"])
    python = prepare(options.venv)
    where = machine()
    found: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="trl_compare-") as folder:
        work = Work(quickstart, options.steps, python, Path(folder))
        for kind in STAGES:
            for repetition in range(options.repetitions):
                for side in SIDES:
                    found.append(measure(work, kind, side, repetition))
                    print(f"{kind}, {side}: {found[-1].cpu_seconds_per_step:.3f} CPU s/step", flush=True)
    of = {(kind, side): [m for m in found if (m.kind, m.side) == (kind, side)] for kind in STAGES for side in SIDES}
    rows = [summarize(group) for group in of.values()]
    all_groups = as_if_none_dropped(work, of["grpo", "amalgam"])
    result = {
        "machine": where,
        "trl_versions": versions(python),
        "steps": {"warmup": WARMUP, "measured": options.steps},
        "settings": {kind: work.settings(kind) for kind in STAGES},
        "summary": rows,
        "grpo_cpu_seconds_per_step_as_if_no_group_were_dropped": all_groups,
        "runs": [asdict(each) for each in found],
    }
    file = write_result("trl_compare", result)
    print(f"{where['cpu']}, {where['cores']} cores, load {where['load_before']:.1f}; medians of {options.repetitions}")
    show(rows)
    dropped, prompts = of["grpo", "amalgam"][0].metrics["dropped_groups"], work.settings("grpo")["prompts"]
    print(f"grpo: amalgam drops {dropped:.1f} of {prompts} groups a step (equal rewards), TRL learns from all;")
    print(f"with all of them, amalgam would take at most {all_groups:.3f} CPU s/step")
    print(file)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
