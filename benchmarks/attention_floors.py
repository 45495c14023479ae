"""How fast attention can be at best: the operations and bytes of its parts, against ceilings measured on the same GPU.

A floor is the longest of three times: FLOP over the rate of a large bf16 product, bytes moved through memory over the
rate of a copy, and bytes gathered over the rate of random 1 KB rows from a pool that fits into L2. Counted is what the
operation needs however it is written: each input read once, each output written once, no intermediate. Formulas, for T
tokens, H heads of D channels, `keys` the sum over queries of what each sees (window rows, then entries), 2 bytes a
number unless said otherwise:

    attention, forward     FLOP 4 H D keys (131,072 a key at 64 x 512): q . k and weight * value
                           bytes 2 (2 T H D + T D + N D): q, rows and entries in, output out
                           gathered 2 D keys: each query fetches its own keys, as decoding needs it to
    attention, backward    FLOP 2.5 x forward's: the scores again, and four products for the gradients
                           bytes 2 (4 T H D + 2 T D + 2 N D): q, output and its gradient in, q's out; rows and entries
                           in, their gradients out
    indexer with top-k     FLOP 2 H D (16,384 at 64 x 128) for each query and complete entry; scores stay on the chip
                           bytes: q, fp32 weights and keys in, K int32 numbers a query out
    product                FLOP 2 rows in out; bytes: both operands and the result; three times both with the backward
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


def keys_seen(tokens: int, window: int, ratio: int = 0, topk: int | None = None) -> int:
    """Of all queries of one document: min(p + 1, window) rows, and (p + 1) // ratio entries, at most topk of them."""
    rows = sum(min(p, window) for p in range(1, tokens + 1))
    most = tokens if topk is None else topk
    return rows + (sum(min(p // ratio, most) for p in range(1, tokens + 1)) if ratio else 0)


def attention(tokens: int, heads: int, dim: int, window: int, ratio: int = 0, topk: int | None = None) -> Work:
    keys, entries = keys_seen(tokens, window, ratio, topk), tokens // ratio if ratio else 0
    moved = 2 * (2 * tokens * heads * dim + tokens * dim + entries * dim)
    return Work(4 * heads * dim * keys, moved, 2 * dim * keys)


def attention_backward(tokens: int, heads: int, dim: int, window: int, ratio: int = 0, topk: int | None = None) -> Work:
    entries = tokens // ratio if ratio else 0
    forward = attention(tokens, heads, dim, window, ratio, topk)
    return Work(2.5 * forward.flop, 2 * (4 * tokens * heads * dim + 2 * tokens * dim + 2 * entries * dim))


def indexer(tokens: int, heads: int, dim: int, ratio: int, topk: int) -> Work:
    pairs = keys_seen(tokens, 0, ratio)
    moved = 2 * (tokens * heads * dim + tokens // ratio * dim) + 4 * tokens * heads + 4 * tokens * topk
    return Work(2 * heads * dim * pairs, moved)


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
