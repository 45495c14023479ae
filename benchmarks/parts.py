"""What commands of several parts share: how a part's rows are printed, and the file that holds them.

A part is a function from a command's setting to rows, one a measurement: `name`, `tokens`, what was found, and where
there is a goal, `goal` and whether it is `met`. The parts of a command go to one file. A part that is measured anew
replaces its own rows; the others stay if they are of the same source, GPU and versions.
"""

import argparse
import json
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu
from floors import Ceilings
from results import RESULTS, print_table, write_result

from amalgam.kernels.dispatch import VARIABLE

Row = dict[str, Any]
Rows = Iterator[Row]
Parts = Mapping[str, Callable[[Any], Rows]]
SAME = ("source", "gpu", "cuda", "versions")  # what parts of one file have in common
COLUMNS = {
    "tokens": "tokens", "ms": "ms", "forward ms": "forward_ms", "tokens/s": "tokens_a_second", "TFLOP/s": "tflops",
    "GB/s": "gbs", "of peak %": "percent_of_peak", "of step %": "percent_of_step", "floor ms": "floor_ms",
    "bound": "bound", "x floor": "ratio", "no gather": "ratio_without_gather", "x one teacher": "over_one",
    "det./atomic": "over_atomic", "cuBLAS ms": "cublas_ms", "x cuBLAS": "over_cublas", "GiB": "extra_gib",
    "KiB/token": "extra_kib_a_token", "bf16 ms": "bf16_ms", "weights GiB": "weights_gib",
    "eager ms": "eager_ms", "eager GiB": "eager_gib", "x faster": "faster",
    "ours ms": "ours_ms", "x ours": "over_ours", "rel. difference": "difference",
    "largest difference": "largest_difference", "numbers": "numbers", "differing": "differing", "waits": "waits",
    "goal": "goal", "relative errors": "errors",
}  # fmt: skip
# What of a row is said as soon as it is there: the first that it has.
FOUND = ("errors", "differing", "difference", "largest_difference", "waits", "failed", "ms")


def told(row: Row, key: str) -> str:
    value = row.get(key)
    if key == "goal" and value is not None:
        return f"{value if isinstance(value, str) else f'{value:g}'} {'met' if row['met'] else 'MISSED'}"
    if value is None:
        return row.get("failed", "-") if key == "ms" else row.get("eager", "-") if key == "eager_ms" else "-"
    if isinstance(value, dict):
        return ", ".join(f"{name} {'not finite' if each is None else f'{each:.1e}'}" for name, each in value.items())
    if isinstance(value, int | str):
        return f"{value:,}" if isinstance(value, int) else value
    if value < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3f}" if value < 10 else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def print_rows(rows: list[Row]) -> None:
    shown = {name: key for name, key in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    print_table(["", *shown], [[row["name"], *(told(row, key) for key in shown.values())] for row in rows])


def measure(part: Callable[[Any], Rows], setting: Any) -> dict[str, Any]:
    """A part's rows, printed, with the ceilings that they are held to; with `error`, those before it."""
    rows: list[Row] = []
    result: dict[str, Any] = {"ceilings": asdict(setting.ceilings), "rows": rows}
    try:
        for row in part(setting):
            rows.append(row)
            key = next((key for key in FOUND if row.get(key) is not None), "ms")
            print(f"  {row['name']}, {row['tokens']:,}: {told(row, key)}", flush=True)
    except Exception as error:  # the other parts can still be measured
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"
    print_rows(rows)
    return result


def kept(file: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """The parts of an earlier result, if they may stand beside new ones."""
    if not file.is_file():
        return {}
    before = json.loads(file.read_bytes())
    if any(before["machine"].get(key) != machine[key] for key in SAME):
        print(f"{file}: of another source, GPU or versions; its parts are dropped")
        return {}
    return before["parts"]


def parser_of(doc: str | None, parts: Parts) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(parts), help="parts, with commas between them")
    return parser


def asked(parser: argparse.ArgumentParser, parts: Parts) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the names of the parts that are to run."""
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(parts):
        parser.error(f"--only: {', '.join(sorted(unknown))}: want some of {', '.join(parts)}")
    if os.environ.get(VARIABLE):
        parser.error(f"{VARIABLE} is set: the kernels that a GPU runs by itself are measured")
    return options, names


def run(
    command: str,
    parts: Parts,
    names: list[str],
    setting_of: Callable[[Ceilings], Any],
    missing: Callable[[str, Any], str | None] = lambda name, setting: None,
    summary: Callable[[str, list[Row]], dict[str, Any]] = lambda name, rows: {},
) -> int:
    """Measures the parts `names` and writes results/COMMAND.json after each; 1 if one failed or a goal was missed.

    `missing` says why a part cannot run, if it cannot; `summary` what its rows say together.
    """
    machine = gpu.where()
    file = RESULTS / f"{command}.json"
    done = kept(file, machine)
    print(f"{machine['gpu']}, torch {machine['versions']['torch']}, source {machine['source']}")
    setting = setting_of(gpu.ceilings())
    print(f"ceilings: {', '.join(f'{value:,.0f} {unit}' for unit, value in asdict(setting.ceilings).items())}")
    for name in names:
        if (why := missing(name, setting)) is not None:
            print(f"\n{name}: not run: {why}")
            done.setdefault(name, {"rows": [], "not_run": why})
        else:
            print(f"\n{name}", flush=True)
            found = measure(parts[name], setting)
            done[name] = found | (more := summary(name, found["rows"]))
            for key, value in more.items():
                print(f"{key}: {value}")
        file = write_result(command, {"machine": machine, "parts": {n: done[n] for n in parts if n in done}})
    print(f"\nwrote {file}")
    rows = [row for part in done.values() for row in part["rows"]]
    missed = [f"{row['name']} {row['tokens']:,}" for row in rows if not row.get("met", True)]
    failed = [f"{name}: {part['error']}" for name, part in done.items() if "error" in part]
    for what, found in (("goals missed", missed), ("failed", failed)):
        if found:
            print(f"{what}: {'; '.join(found)}")
    return 1 if missed or failed else 0
