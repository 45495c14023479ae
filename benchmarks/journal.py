"""The rollout engine's journal: what a step's `append` takes, and what reading takes.

    .venv/bin/python benchmarks/journal.py               # --folder: on the disk that is to be measured

For 1, 64 and 256 requests a step, bare, with the expert ids of a model of 12 layers and 4 experts a token, and with
the picks of 21 indexers of 512 entries too: microseconds of an append, one after another and one each 1.5 ms, which
a decoding step of 256 requests is to take (medians, and the mean of the thread's CPU time), the bytes, and what the
latter is of such a step. Then `recover`, of all that was written. Goal: with experts at most 5 % of the step.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from results import machine, print_table, write_result

from amalgam.rl.journal import Journal, recover
from amalgam.rl.trajectory import Request

STEP_SECONDS = 0.0015  # of 256 requests, at 170,000 tokens a second
GOAL = 0.05
SHAPES: dict[str, dict[str, Any]] = {
    "bare": {},
    "experts": {"experts": (12, 4)},
    "experts, picks": {"experts": (12, 4), "picks": (21, 512)},
}


def appends(folder: Path, name: str, recorded: str, requests: int, steps: int, pause: float) -> dict[str, float]:
    """Microseconds of `steps` appends: median of the wall's, mean of the CPU's; bytes of one."""
    rng, shapes = np.random.default_rng(0), SHAPES[recorded]
    ids = rng.permutation(10**6)[:requests]
    tokens, versions = rng.integers(0, 129_280, requests).astype(np.int32), np.zeros(requests, np.int32)
    logprobs, more = -rng.random(requests, np.float32), {}
    for what, most, dtype in (("experts", 256, np.int16), ("picks", 8192, np.int32)):
        if what in shapes:
            more |= {"fed": ids, what: rng.integers(0, most, (requests, *shapes[what])).astype(dtype)}
    wall, cpu = [], []
    with Journal(folder, name, **shapes) as journal:
        for i in ids.tolist():
            journal.begin(Request(i, 0, np.zeros(100, np.int32)))
        before = journal.path.stat().st_size
        for _ in range(steps):
            began, used = time.perf_counter(), time.thread_time()
            journal.append(ids, tokens, logprobs, versions, **more)
            cpu.append(time.thread_time() - used)
            wall.append(time.perf_counter() - began)
            while time.perf_counter() < began + pause:  # as busy as an engine's thread
                pass
        size = journal.path.stat().st_size - before
    return {"us": 1e6 * median(wall), "cpu_us": 1e6 * mean(cpu), "bytes": size / steps}


def measure(folder: Path, steps: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each setting, and what it took to read the journals of those that record no picks."""
    rows = []
    for recorded in SHAPES:
        for requests in (1, 64, 256):
            few = max(steps // 100, 2) if "picks" in SHAPES[recorded] else steps
            name = f"{recorded}-{requests}"
            at_once = appends(folder / recorded, f"{name}-at-once", recorded, requests, few, 0)
            paced = appends(folder / recorded, f"{name}-paced", recorded, requests, few, STEP_SECONDS)
            rows.append(
                {
                    "recorded": recorded, "requests": requests, "us": at_once["us"], "paced_us": paced["us"],
                    "paced_cpu_us": paced["cpu_us"], "bytes": paced["bytes"],
                    "mb_per_second": at_once["bytes"] / at_once["us"], "of_step": paced["us"] / 1e6 / STEP_SECONDS,
                }
            )  # fmt: skip
    folders = [folder / recorded for recorded, shapes in SHAPES.items() if "picks" not in shapes]
    began = time.perf_counter()
    # The files of a folder have the same ids: the longest history of each is a request.
    tokens = sum(row["requests"] for row in rows if "picks" not in SHAPES[row["recorded"]]) * 2 * steps
    for each in folders:
        assert recover(each)
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for each in folders for path in each.glob("*.journal"))
    read = {"tokens": tokens, "mb": size / 1e6, "seconds": seconds, "tokens_per_second": tokens / seconds}
    return rows, read


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="appends of each setting (3000)")
    parser.add_argument("--folder", type=Path, help="where to write (the system's folder for temporary files)")
    arguments = parser.parse_args()
    where = machine(("amalgam", "numpy"))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows, read = measure(Path(folder), arguments.steps)
    print_table(
        ["recorded", "requests", "us", "us, paced", "CPU us, paced", "bytes", "MB/s", "of a step of 1.5 ms"],
        [
            [row["recorded"], str(row["requests"]), *(f"{row[n]:.0f}" for n in ("us", "paced_us", "paced_cpu_us"))]
            + [f"{row['bytes']:.0f}", f"{row['mb_per_second']:.0f}", f"{100 * row['of_step']:.1f} %"]
            for row in rows
        ],
    )
    print(f"recover: {read['tokens']:,.0f} tokens, {read['mb']:.0f} MB in {read['seconds']:.1f} s")
    met = all(row["of_step"] <= GOAL for row in rows if row["recorded"] == "experts")
    print(write_result("journal", {"machine": where, "goal": GOAL, "met": met, "rows": rows, "recover": read}))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
