"""How many requests of how many tokens an engine has room for, from its settings and the model's cache."""

from typing import NamedTuple

import torch

from ..model import LanguageModel
from ..model.cache import probe
from .settings import EngineSettings

_CPU_BYTES = 2**28
_FREE_SHARE = 0.8  # of a GPU's memory that is free: activations need the rest


class Room(NamedTuple):
    slots: int
    pages: int  # of the pool, without the one that is nobody's
    page: int  # tokens of a page
    capacity: int  # most tokens of a request
    state_bytes: int  # of a slot
    page_bytes: int


@torch.no_grad()
def room(model: LanguageModel, settings: EngineSettings, slack: int, extra: int, page: int | None = None) -> Room:
    """Slots take at most half of the memory, pages the rest. `extra`: bytes of a slot beside the cache's.

    ValueError if not even one request of `context` tokens fits."""
    state, each = probe(model, slack, page)
    state, tokens = state + extra, model.new_cache(1, 1, slack, page=page).page  # pyright: ignore
    memory = settings.memory or _memory(model.lm_head.weight.device)
    slots = max(min(settings.max_batch, memory // 2 // max(state, 1) - 1), 1)
    pages = (memory - (slots + 1) * state) // max(each, 1) - 1
    longest = settings.context or getattr(model.config, "max_position_embeddings", None) or pages * tokens
    if settings.context is None:
        longest = min(longest, max(pages * tokens, tokens))
    need = -(-longest // tokens)
    if pages < need:
        raise ValueError(
            f"a cache of {memory} bytes has no room for a request of {longest} tokens: "
            f"that takes {2 * state + (need + 1) * each} bytes"
        )
    return Room(slots, min(pages, slots * need), tokens, longest, state, each)


def _memory(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_BYTES
    return int(torch.cuda.mem_get_info(device)[0] * _FREE_SHARE)
