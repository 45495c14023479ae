"""What compile_for_h100.py compiles of decoding and of chunks, over a cache whose entries lie in a row or in pages."""

from collections.abc import Callable

import torch
from compile_cases import FP32, HEADS, NARROW, TOKENS, TOPK, WIDTH, WINDOW, meta, places, seen

from amalgam.kernels.fused import cache_formats, hopper_forward, hopper_indexer, indexer
from amalgam.kernels.fused.attention import attend_forward

PAGES = {4: 64, 128: 2}  # by ratio, entries of a page of 256 tokens
REQUESTS = 32
SIZES = ((WINDOW, REQUESTS), (0, TOKENS))  # slots and queries of a step, of a chunk


def dense() -> None:
    """More entries than a program sums up."""
    for page in (0, PAGES[128]):
        place = seen(128, REQUESTS, WINDOW, 2048, page)
        q, rows, entries = meta(REQUESTS, HEADS, NARROW), meta(TOKENS, NARROW), meta(TOKENS, NARROW)
        attend_forward(q, rows, entries, meta(HEADS, dtype=FP32), place, None)


def chosen() -> None:
    """The choice of entries, and their attention."""
    for page in (0, PAGES[4]):
        for slots, tokens in SIZES:
            place = seen(4, tokens, slots, TOKENS, page)
            q, keys, weights = meta(tokens, 64, 128), meta(TOKENS, 128), meta(tokens, 64, dtype=FP32)
            best = indexer.select(q, weights, keys, place, TOPK, None)
            q, rows, entries = meta(tokens, HEADS, NARROW), meta(TOKENS, NARROW), meta(TOKENS, NARROW)
            attend_forward(q, rows, entries, meta(HEADS, dtype=FP32), place, best)


def hopper(ratio: int, page: int, splits: int = 1, few: bool = False) -> None:
    """The Gluon kernels, as compile_cases.py calls them; of CSA's entries, where they are `few`, all are seen."""
    for slots, tokens in SIZES:
        q, rows, entries = meta(tokens, HEADS, WIDTH), meta(TOKENS, WIDTH), meta(TOKENS, WIDTH)
        lse, parts = meta(tokens, HEADS, dtype=FP32), meta(splits, tokens, HEADS, WIDTH, dtype=FP32)
        of_query = (places(tokens), places(tokens), places(tokens), WIDTH**-0.5)
        best, kind = (places(tokens * TOPK), 2) if ratio == 4 and not few else (places(), 1)
        hopper_forward.forward(
            q, rows, entries, best, meta(HEADS, dtype=FP32), q, lse, lse, parts, *of_query, slots, ratio, TOPK,
            splits, WINDOW, kind, 1024, places() if page else None, page,
        )  # fmt: skip


def hopper_scores() -> None:
    for slots, tokens in SIZES:
        q, keys, weights = meta(tokens, 64, 128), meta(TOKENS, 128), meta(tokens, 64, dtype=FP32)
        out, place = meta(tokens, TOKENS, dtype=FP32), seen(4, tokens, slots, TOKENS, PAGES[4])
        hopper_indexer.scores(q, weights, keys, out, place, TOPK, False)


def as_bytes() -> None:
    """V4's entries and keys, written and read."""
    where = meta(TOKENS, dtype=torch.int64)
    entries, keys = meta(TOKENS, 584, dtype=torch.uint8), meta(TOKENS, 68, dtype=torch.uint8)
    cache_formats.write_entries(entries, where, meta(TOKENS, WIDTH), 64)
    cache_formats.read_entries(entries, where, WIDTH, 64, torch.bfloat16)
    cache_formats.write_keys(keys, where, meta(TOKENS, 128))
    cache_formats.read_keys(keys, where, 128, torch.bfloat16)


CASES: dict[str, Callable[[], None]] = {
    "cache, HCA": dense,
    "cache, CSA": chosen,
    "hopper, cache, many entries": lambda: hopper(128, 0, splits=2),
    "hopper, pages, HCA": lambda: hopper(128, PAGES[128]),
    "hopper, pages, many entries": lambda: hopper(128, PAGES[128], splits=2),
    "hopper, pages, CSA": lambda: hopper(4, PAGES[4]),
    "hopper, pages, CSA, few entries": lambda: hopper(4, PAGES[4], few=True),
    "hopper, pages, indexer": hopper_scores,
    "cache, bytes": as_bytes,
}
