"""The layout of a decoding step: as that of any chunk, which is the definition, or from one kernel on a GPU."""

import torch
from torch import Tensor

from ..kernels.dispatch import fused
from ..kernels.places import Windows
from .cache import Cache
from .chunks import Chunk, Finished, check_room, laid_out, requests_of
from .layout import Frequencies


def step(
    slots: Tensor | None,
    cache: Cache,
    *,
    window: int,
    compressors: set[tuple[int, int]],
    frequencies: Frequencies,
) -> Chunk:
    """`layout.chunk` of one token for each request; waits for no device."""
    if not fused(cache.length):
        return reference_step(slots, cache, window, compressors, frequencies)
    from ..kernels.fused.layout import Kind
    from ..kernels.fused.layout import step as launch

    check_room(cache.longest + 1, cache)
    kinds = [Kind(ratio, tokens + cache.slack) for ratio, tokens in compressors]
    ring, both = window + cache.slack, (frequencies["main"], frequencies["compress"])
    made = launch(cache.length, slots, cache.table, cache.page, ring, kinds, both)
    result = Chunk(made.cu_seqlens, made.slots, made.past, made.past.numel(), 1, cache.longest + 1, window, cache)
    result.lengths, result.position = made.lengths, made.past
    main, compress, *entries = made.rotations
    result.rotation = {"main": main, "compress": compress}
    result._rings = {ring: made.to}
    place = made.position, made.row_first, ring
    result._places = {0: place}
    for i, (kind, (_, tokens)) in enumerate(zip(kinds, compressors, strict=True)):
        ratio = kind.ratio
        windows = Windows(made.firsts[i], made.numbers[i], entries[i], kind.ring)
        result.finished[ratio, tokens] = Finished(windows, made.rows[i])
        result._rings[kind.ring] = made.rings[i]
        result._places[ratio] = (
            *place, ratio, made.entry_first, result.most // ratio, cache.table.flatten(), cache.page // ratio
        )  # fmt: skip
    return result


def reference_step(
    slots: Tensor | None, cache: Cache, window: int, compressors: set[tuple[int, int]], frequencies: Frequencies
) -> Chunk:
    slots, past = requests_of(slots, cache)
    cu = torch.arange(past.numel() + 1, device=past.device)
    result = Chunk(cu, slots, past, past.numel(), 1, cache.longest + 1, window, cache)
    return laid_out(result, compressors, frequencies)
