"""How many requests of how many tokens an engine has room for, from its settings and the model's cache."""

from typing import Any, NamedTuple

import torch

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
def room(model: Any, settings: EngineSettings, slack: int, extra: int, page: int | None = None) -> Room:
    """`max_batch` slots, and pages of what they leave; fewer slots where pages would get less than one request of
    `context` tokens takes, or than half of the memory if there is no `context`. `extra`: bytes of a slot beside the
    cache's. ValueError if not even one request fits."""
    from ..model.cache import probe

    state, each = probe(model, slack, page)
    state, tokens = state + extra, model.new_cache(1, 1, slack, page=page).page
    memory = settings.memory or _memory(model.lm_head.weight.device)
    need = -(-(settings.context or 1) // tokens)
    reserved = (need + 1) * each if settings.context else memory // 2
    slots = max(min(settings.max_batch, (memory - reserved) // max(state, 1) - 1), 1)  # one more is nobody's
    pages = (memory - (slots + 1) * state) // each - 1
    if pages < need:
        raise ValueError(
            f"a cache of {memory} bytes has no room for a request of {settings.context or tokens} tokens: "
            f"that takes {2 * state + (need + 1) * each} bytes"
        )
    longest = settings.context or getattr(model.config, "max_position_embeddings", None) or pages * tokens
    longest = min(longest, pages * tokens)
    return Room(slots, min(pages, slots * -(-longest // tokens)), tokens, longest, state, each)


def _memory(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_BYTES
    return int(torch.cuda.mem_get_info(device)[0] * _FREE_SHARE)
