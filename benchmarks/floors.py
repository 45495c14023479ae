"""How fast an operation can be at best: its operations and bytes, against ceilings measured on the same GPU.

A floor is the longest of three times: FLOP over the rate of a large bf16 product, bytes moved through memory over the
rate of a copy, and bytes gathered over the rate of random 1 KB rows from a pool that fits into L2. Counted is what the
operation needs however it is written: each input read once, each output written once, no intermediate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reached: products in TFLOP/s; copies (read + written) and gathers from L2 in GB/s."""

    tflops: float
    copy_gbs: float
    gather_gbs: float


@dataclass(frozen=True)
class Work:
    flop: float = 0.0
    bytes: float = 0.0
    gathered: float = 0.0

    def times(self, ceilings: Ceilings) -> dict[str, float]:
        """Milliseconds by what would bound it."""
        return {
            "compute": self.flop / ceilings.tflops / 1e9,
            "memory": self.bytes / ceilings.copy_gbs / 1e6,
            "gather": self.gathered / ceilings.gather_gbs / 1e6,
        }

    def floor(self, ceilings: Ceilings) -> float:
        return max(self.times(ceilings).values())


def product(rows: int, size_in: int, size_out: int, groups: int = 1, out_bytes: int = 2, passes: int = 1) -> Work:
    """x [rows, groups in] times a block [out, in] of the weight a group; `passes` 3: with both gradients."""
    moved = 2 * groups * (rows * size_in + size_in * size_out) + out_bytes * groups * rows * size_out
    return Work(2 * passes * rows * groups * size_in * size_out, passes * moved)


def row(
    name: str, tokens: int, ms: float, works: Sequence[Work], ceilings: Ceilings, goal: float | None = None, **more: Any
) -> dict[str, Any]:
    """One measurement; several `works` follow one another. `met`: at most `goal` times the floor."""
    floors = [work.floor(ceilings) for work in works]
    times, flop = works[0].times(ceilings), sum(work.flop for work in works)
    ratio = ms / sum(floors)
    result: dict[str, Any] = {
        "name": name,
        "tokens": tokens,
        "ms": ms,
        "tflops": flop / ms / 1e9 if flop else None,
        "gbs": sum(work.bytes for work in works) / ms / 1e6,
        "floor_ms": sum(floors),
        "bound": max(times, key=lambda kind: times[kind]) if len(works) == 1 else None,
        "ratio": ratio,
    }
    if goal is not None:
        result |= {"goal": goal, "met": ratio <= goal}
    if any(work.gathered for work in works):
        result["ratio_without_gather"] = ms / sum(replace(work, gathered=0.0).floor(ceilings) for work in works)
    return result | more
