"""Attention at V4-Flash width on one GPU: how exact each operation is, how fast against its floor, and its peers.

    python benchmarks/attention.py [--only attention,indexer,...] [--flashmla PATH]

Needs a CUDA device, torch, triton and transformers; the folder that holds this repository, under the name `amalgam`, on
PYTHONPATH. Parts, each with the ceilings measured as the command starts, when the GPU is not yet hot
(attention_floors.py has the formulas). Up to `passes`, what is timed is one CUDA graph, launched once:

    accuracy      values and gradients of every operation against float64, with their bounds
    attention     forward and backward of the attention of each layer kind, one document of 4,096 to 131,072 tokens
    indexer       scores with top-k, and the gradients of the indexer's own scores
    projections   every product of a block, beside cuBLAS
    passes        norms with RoPE, and the compressors, against the bytes they move
    blocks        a whole block of each kind, forward and backward, with its memory, beside transformers' eager one
    decode        a step at a context of 1,048,576 tokens, against the bytes it must read
    flashmla      FlashMLA's sparse prefill kernel; --flashmla names vLLM's library `_flashmla_C.abi3.so`
    veomni        VeOmni's TileLang kernels, where veomni and tilelang are installed

The result is one file. A part that is measured anew replaces its own rows; the others stay if they are of the same
source, GPU and versions. Exit code 1 if a part failed or a goal was missed.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import attention_accuracy
import attention_blocks
import attention_kernels
import attention_peers
import gpu
from attention_kernels import Rows, Setting
from results import RESULTS, print_table, write_result

from amalgam.kernels.dispatch import VARIABLE
from amalgam.model.config import config_of

PARTS: dict[str, Callable[[Setting], Rows]] = {
    "accuracy": attention_accuracy.accuracy,
    "attention": attention_kernels.attention,
    "indexer": attention_kernels.indexer,
    "projections": attention_kernels.projections,
    "passes": attention_kernels.passes,
    "blocks": attention_blocks.blocks,
    "decode": attention_blocks.decode,
    "flashmla": attention_peers.flashmla,
    "veomni": attention_peers.veomni,
}
SAME = ("source", "gpu", "cuda", "versions")  # what parts of one file have in common
COLUMNS = {
    "tokens": "tokens", "ms": "ms", "TFLOP/s": "tflops", "GB/s": "gbs", "floor ms": "floor_ms", "bound": "bound",
    "x floor": "ratio", "no gather": "ratio_without_gather", "goal": "goal", "det./atomic": "over_atomic",
    "cuBLAS ms": "cublas_ms", "x cuBLAS": "over_cublas", "GiB": "extra_gib", "KiB/token": "extra_kib_a_token",
    "eager ms": "eager_ms", "eager GiB": "eager_gib", "x faster": "faster", "ours ms": "ours_ms", "x ours": "over_ours",
    "rel. difference": "difference", "relative errors": "errors",
}  # fmt: skip


def told(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if key == "goal" and value is not None:
        return f"{value:g} {'met' if row['met'] else 'MISSED'}"
    if value is None:
        return row.get("failed", "-") if key == "ms" else row.get("eager", "-") if key == "eager_ms" else "-"
    if isinstance(value, dict):
        return ", ".join(f"{name} {'not finite' if each is None else f'{each:.1e}'}" for name, each in value.items())
    if isinstance(value, int | str):
        return f"{value:,}" if isinstance(value, int) else value
    if value < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3f}" if value < 10 else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def print_rows(rows: list[dict[str, Any]]) -> None:
    shown = {name: key for name, key in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    print_table(["", *shown], [[row["name"], *(told(row, key) for key in shown.values())] for row in rows])


def kept(file: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """The parts of an earlier result, if they may stand beside new ones."""
    if not file.is_file():
        return {}
    before = json.loads(file.read_bytes())
    if any(before["machine"].get(key) != machine[key] for key in SAME):
        print(f"{file}: of another source, GPU or versions; its parts are dropped")
        return {}
    return before["parts"]


def write(machine: dict[str, Any], parts: dict[str, Any]) -> Path:
    parts = {name: parts[name] for name in PARTS if name in parts}
    return write_result("attention", {"machine": machine, "parts": parts})


def measure(name: str, setting: Setting) -> dict[str, Any]:
    """A part's rows, printed, with the ceilings that they are held to; with `error`, those before it."""
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"ceilings": asdict(setting.ceilings), "rows": rows}
    try:
        for row in PARTS[name](setting):
            rows.append(row)
            print(f"  {row['name']}, {row['tokens']:,}: {told(row, 'errors' if 'errors' in row else 'ms')}", flush=True)
    except Exception as error:  # the other parts can still be measured
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"
    print_rows(rows)
    if name == "blocks":
        result["memory_exponent"] = attention_blocks.growth(rows)
        for kind, exponent in result["memory_exponent"].items():
            print(f"memory of {kind} grows as tokens^{exponent:.3f}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--flashmla", type=Path, help="vLLM's _flashmla_C library, for this torch")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: want some of {', '.join(PARTS)}")
    if os.environ.get(VARIABLE):
        parser.error(f"{VARIABLE} is set: the kernels that a GPU runs by itself are measured")
    machine = gpu.where()
    file = RESULTS / "attention.json"
    parts = kept(file, machine)
    print(f"{machine['gpu']}, torch {machine['versions']['torch']}, source {machine['source']}")
    setting = Setting(config_of("flash"), gpu.ceilings(), flashmla=options.flashmla)
    found = ", ".join(f"{value:,.0f} {unit}" for unit, value in asdict(setting.ceilings).items())
    print(f"ceilings: {found}")
    for name in names:
        if (why := attention_peers.missing(name, setting)) is not None:
            print(f"\n{name}: not run: {why}")
            parts.setdefault(name, {"rows": [], "not_run": why})
            file = write(machine, parts)
            continue
        print(f"\n{name}", flush=True)
        parts[name] = measure(name, setting)
        file = write(machine, parts)
    print(f"\nwrote {file}")
    rows = [row for part in parts.values() for row in part["rows"]]
    missed = [f"{row['name']} {row['tokens']:,}" for row in rows if not row.get("met", True)]
    failed = [f"{name}: {part['error']}" for name, part in parts.items() if "error" in part]
    for what, found in (("goals missed", missed), ("failed", failed)):
        if found:
            print(f"{what}: {'; '.join(found)}")
    return 1 if missed or failed else 0


if __name__ == "__main__":
    sys.exit(main())
