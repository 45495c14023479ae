"""What the benchmarks share: the machine they name, a table, and the JSON file of a result."""

import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("amalgam", "torch", "transformers", "ray", "deepspeed", "tokenizers", "numpy")


def machine(packages: Iterable[str] = _PACKAGES) -> dict[str, Any]:
    """CPU model, cores, load, versions, date."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_result(name: str, result: dict[str, Any]) -> Path:
    """results/NAME.json, with the command that made it."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    command = " ".join(["python", f"benchmarks/{name}.py", *sys.argv[1:]])
    file.write_text(json.dumps({"command": command, **result}, indent=1, ensure_ascii=False) + "\n")
    return file


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """The first column to the left, the others to the right."""
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
