"""Do the quickstart's stages do their jobs? The quickstart under several seeds, beside the goals that it has to reach.

    .venv/bin/python benchmarks/seeds.py

The runs are kept in runs/seeds. The exit code is 1 if a goal is missed. README.md says what is measured.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from goals import Verdict, verdicts
from processes import AMALGAM, ENVIRONMENT, Job
from results import machine, print_table, write_result

from amalgam.errors import UserError
from amalgam.pipelines.console import Console
from amalgam.pipelines.recipe import load_recipe
from amalgam.pipelines.report_data import Run

DEADLINE = 7200.0  # seconds for one run
MEDIANS = ("steps", "wall_seconds", "cpu_seconds", "peak_rss_bytes")  # of what a stage's done.json says


def overrides(seed: int) -> list[str]:
    return [f"seed={seed}", f"name=quickstart-{seed}"]


def new_folders(seeds: Iterable[int], runs: Path) -> dict[int, Path]:
    """Each seed's run folder. UserError for a seed that cannot be, that is there twice, or whose folder exists."""
    folders: dict[int, Path] = {}
    for seed in seeds:
        if seed in folders:
            raise UserError(f"--seeds: {seed} is there twice; give every seed once")
        folders[seed] = runs / load_recipe("quickstart", overrides(seed)).name
        if folders[seed].exists():
            problem = "is there already, and nobody measured the time that it took"
            raise UserError(f"{folders[seed]}: {problem}; remove it, or give another folder with --runs")
    return folders


def measure(seed: int, folder: Path) -> dict[str, float]:
    """Runs the quickstart in `folder`; what all its processes took together."""
    options = [argument for override in overrides(seed) for argument in ("--set", override)]
    command = [*AMALGAM, "run", "quickstart", *options, "--runs", str(folder.parent.absolute())]
    began = time.monotonic()
    with Job(command, folder.with_suffix(".log"), ENVIRONMENT, folder.parent) as job:
        code = job.root.wait(DEADLINE)
        wall = time.monotonic() - began
    if code:
        raise RuntimeError(f"{command} ended with {code}: {job.tail()}")
    return {"wall_seconds": wall, "cpu_seconds": job.cpu_seconds, "peak_bytes": job.peak_bytes}


def pooled(tables: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The sums of the runs' rows {"model", "domain", "correct", "total"}."""
    together = zip(*tables, strict=True)
    return [{**rows[0], **{key: sum(row[key] for row in rows) for key in ("correct", "total")}} for rows in together]


def stages(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each stage's name and kind, and the medians over the runs of what it took."""
    return [
        {"stage": name, "kind": stage["kind"]}
        | {key: statistics.median(run.done[name][key] for run in runs) for key in MEDIANS}
        | {"peak_since_start": any(run.done[name]["peak_since_start"] for run in runs)}
        for name, stage in runs[0].stages.items()
    ]


def evaluations(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each model and the median over the runs of what its evaluation took."""
    return [
        {"model": model, "wall_seconds": statistics.median(run.evaluation_times[model]["wall_seconds"] for run in runs)}
        for model in runs[0].scores
    ]


def comparison(each: Verdict) -> dict[str, Any]:
    """As JSON has it: null for an estimate that is not there, and for the high end of an interval without one."""
    estimate = each.estimate and [value if math.isfinite(value) else None for value in each.estimate]
    return {**asdict(each), "estimate": estimate, "goal": str(each.goal), "met": each.met}


def show_run(run: dict[str, Any]) -> None:
    wall, cpu, peak = run["wall_seconds"], run["cpu_seconds"], run["peak_bytes"] / 2**20
    print(f"\nseed {run['seed']}: {wall:,.0f} s, {cpu:,.0f} CPU s, peak memory {peak:,.0f} MiB", flush=True)
    Console().table(run["rows"])


def show_stages(rows: Sequence[dict[str, Any]]) -> None:
    header = ["stage", "kind", "steps", "wall s", "CPU s", "peak MiB"]
    print_table(header, [
        [row["stage"], row["kind"], f"{row['steps']:g}", f"{row['wall_seconds']:,.1f}", f"{row['cpu_seconds']:,.1f}",
         f"{row['peak_rss_bytes'] / 2**20:,.0f}{' since start' * row['peak_since_start']}"]
        for row in rows
    ])  # fmt: skip


def show_pooled(rows: Sequence[dict[str, Any]]) -> None:
    """Without intervals: the answers to one problem, one for every seed, depend on each other."""
    cells: dict[str, list[str]] = {}
    for row in rows:
        share = f"{row['correct']}/{row['total']} {100 * row['correct'] / row['total']:5.1f} %"
        cells.setdefault(row["model"], []).append(share)
    print_table(["model", *dict.fromkeys(row["domain"] for row in rows)], [[m, *found] for m, found in cells.items()])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"), help="where runs go (default: %(default)s)")
    options = parser.parse_args()
    folders = new_folders(options.seeds, options.runs)
    options.runs.mkdir(parents=True, exist_ok=True)
    where = machine()
    print(f"{where['cpu']}, {where['cores']} cores, load {where['load_before']:.1f}", flush=True)
    runs, measured = [], []
    for seed, folder in folders.items():
        took = measure(seed, folder)
        runs.append(Run(folder))
        measured.append({"seed": seed, **took, "rows": json.loads((folder / "results.json").read_text())})
        show_run(measured[-1])
    medians, sums, found = stages(runs), pooled([each["rows"] for each in measured]), verdicts(runs)
    print("\nstages, medians over the seeds")
    show_stages(medians)
    print_table(["evaluation of", "wall s"], [[e["model"], f"{e['wall_seconds']:,.1f}"] for e in evaluations(runs)])
    print("\nall seeds together")
    show_pooled(sums)
    print()
    print_table(["", "value", "95 % interval", "goal", ""], [each.cells() for each in found])
    result = {
        "machine": where,
        "runs": measured,
        "stages": medians,
        "evaluations": evaluations(runs),
        "pooled": sums,
        "comparisons": [comparison(each) for each in found],
    }
    print(write_result("seeds", result))
    return 0 if all(each.met for each in found) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
