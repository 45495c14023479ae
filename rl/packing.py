"""From documents of any length to packed micro-batches: no padding, and every rank gets equal work."""

import heapq
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

Row = dict[str, np.ndarray]
"""One document: "tokens" [n], and any further fields with one value (of any shape) a token: [n, ...]."""

Batch = dict[str, np.ndarray]
"""Documents in a row: every field of theirs as one array, and where each document ends."""


def plan(lengths: Sequence[int], max_tokens: int, ranks: int) -> list[list[list[int]]]:
    """rank -> micro-batches -> indices into `lengths`; the same input gives the same plan.

    Every rank gets the same number of micro-batches (the last may be empty) and nearly the same number of
    tokens. A micro-batch holds at most `max_tokens` tokens; a longer document is alone in one. Rule (our
    choice): longest document first, each into the micro-batch with the fewest tokens; one micro-batch more
    for each rank until all fit.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError("a batch needs at least one document, and each document at least one token")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = -(-sum(min(n, max_tokens) for n in lengths) // (max_tokens * ranks))
    while True:
        batches = _spread(order, lengths, count * ranks)
        if all(len(batch) == 1 or sum(lengths[i] for i in batch) <= max_tokens for batch in batches if batch):
            return _deal(batches, lengths, count, ranks)
        count += 1


def _spread(order: list[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """`count` batches of nearly equal token counts."""
    batches: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, batch) for batch in range(count)]
    for i in order:
        tokens, batch = heap[0]
        batches[batch].append(i)
        heapq.heapreplace(heap, (tokens + lengths[i], batch))
    return [sorted(batch) for batch in batches]


def _deal(batches: list[list[int]], lengths: Sequence[int], count: int, ranks: int) -> list[list[list[int]]]:
    """`count` batches to each rank, the largest first, each to the rank with the fewest tokens so far."""
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    sizes = [sum(lengths[i] for i in batch) for batch in batches]
    for batch in sorted(range(len(batches)), key=lambda b: (-sizes[b], b)):
        rank = min((r for r in range(ranks) if len(dealt[r]) < count), key=lambda r: (tokens[r], r))
        dealt[rank].append(batches[batch])
        tokens[rank] += sizes[batch]
    return dealt


def stack(rows: Sequence[Row]) -> Batch:
    """The rows' fields, each concatenated along dim 0 to [T, ...], and "cu_seqlens" int32 [B + 1].

    "tokens" become int64, other fields keep their dtypes. Raises ValueError for a row whose fields are not
    those of the first, or are not as long as its tokens.
    """
    lengths = [len(row["tokens"]) for row in rows]
    for i, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            raise ValueError(f"row {i} has the fields {sorted(row)}, row 0 has {sorted(rows[0])}")
        for field, values in row.items():
            if len(values) != lengths[i]:
                raise ValueError(f"row {i}: {field}: {len(values)} values for {lengths[i]} tokens")
    batch = {field: np.concatenate([row[field] for row in rows]) for field in rows[0]}
    batch["tokens"] = batch["tokens"].astype(np.int64)
    batch["cu_seqlens"] = np.cumsum([0, *lengths], dtype=np.int32)
    return batch


def tensors(arrays: Mapping[str, np.ndarray], device: str | torch.device) -> dict[str, Tensor]:
    """The arrays as tensors of their own memory: what Ray hands over is read-only."""
    return {name: torch.tensor(array, device=device) for name, array in arrays.items()}


def collate(rows: Sequence[Row], device: str | torch.device) -> dict[str, Tensor]:
    """`stack`, as tensors."""
    return tensors(stack(rows), device)
