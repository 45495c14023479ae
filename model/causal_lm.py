"""Any decoder that transformers' AutoModelForCausalLM loads, as a LanguageModel: packed, never padded.

transformers runs the model on one row [1, T] of packed tokens, with positions that restart in each document, and calls
our function for the attention, the only place where tokens meet. A cache holds keys and values of each request, so a
decoding step is a row of one token a request. model/transformers_checkpoint.py loads, and refuses what cannot be
served this way.

Dropout is off in training too (our choice: a policy's log-probs are no random numbers). Experts are not recorded:
routing replay is V4's alone. Left out: gradient checkpointing, attention over a whole pack in one launch.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.dense import attend_causal
from .cache import Cache, page_tokens
from .language_model import LanguageModel, Output

# What an attention layer may pass on beside its own numbers: nothing of it changes the result.
_UNUSED = ("dropout", "position_ids")


@dataclass
class _Place:
    """Where the tokens of one call stand. Document b's new tokens are cu_seqlens[b] to cu_seqlens[b + 1]."""

    cu_seqlens: list[int]
    position: Tensor  # int64 [T], in the own document
    start: list[int]  # tokens that each document's cache holds already
    cache: Cache | None = None
    slots: Tensor | None = None  # int64 [B]
    seen: list[int] = field(default_factory=list)  # the layers that attended


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    place: _Place | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]."""
    unknown = [name for name, thing in rest.items() if name not in _UNUSED and isinstance(thing, Tensor)]
    if place is None:
        raise ValueError("its layers do not pass arguments on to the attention")
    if attention_mask is not None or unknown:
        raise ValueError(f"its attention takes {'a mask' if attention_mask is not None else unknown[0]}")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise ValueError("its attention is not causal")
    layer: Any = module.layer_idx
    place.seen.append(layer)
    numbers: dict[str, Any] = {
        "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "window": sliding_window,
        "softcap": softcap,
        "sinks": s_aux,
    }
    if place.cache is None:
        spans = zip(place.cu_seqlens, place.cu_seqlens[1:], strict=False)
        parts = [attend_causal(query[:, :, i:j], key[:, :, i:j], value[:, :, i:j], **numbers) for i, j in spans]
        return torch.cat(parts, 2).transpose(1, 2), None
    return _attend_cached(query, key, value, place, place.cache, layer, numbers).transpose(1, 2), None


def _attend_cached(
    query: Tensor, key: Tensor, value: Tensor, place: _Place, cache: Cache, layer: int, numbers: dict[str, Any]
) -> Tensor:
    """Writes the new keys and values to the cache, and attends to all of each request's: [1, H, T, D]."""
    assert place.slots is not None
    borders, table = place.cu_seqlens, cache.table[place.slots].long()
    lengths = torch.tensor(borders).diff()
    request = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(query.device)
    row = table[request, place.position // cache.page] * cache.page + place.position % cache.page
    pools = []
    for name, new in (("past_keys", key), ("past_values", value)):
        pools.append(cache.pool(cache.layers[layer], name, new[0].transpose(0, 1)))
        pools[-1][row] = new[0].transpose(0, 1)

    def past(which: slice, most: int) -> tuple[Tensor, Tensor]:
        """Keys and values [b, G, most, D] of some requests' first tokens."""
        at = torch.arange(most, device=table.device)
        rows = table[which][:, at // cache.page] * cache.page + at % cache.page
        return pools[0][rows].transpose(1, 2), pools[1][rows].transpose(1, 2)

    if bool((lengths == 1).all()):  # one token each: all requests at once
        q, at = query[0].transpose(0, 1).unsqueeze(2), place.position.unsqueeze(1)  # [B, H, 1, D], [B, 1]
        return attend_causal(q, *past(slice(None), max(place.start) + 1), at, **numbers).permute(2, 1, 0, 3)
    parts = []
    for b, (i, j) in enumerate(zip(borders, borders[1:], strict=False)):
        if i == j:
            continue
        at = None if place.start[b] == 0 else place.position[i:j].unsqueeze(0)
        own = past(slice(b, b + 1), place.start[b] + j - i)
        parts.append(attend_causal(query[:, :, i:j], *own, at, **numbers))
    return torch.cat(parts, 2)


class CausalLM(LanguageModel):
    """A transformers model. `Output.experts` is [T, 0, 0]: nothing is recorded."""

    def __init__(self, lm: Any):
        super().__init__()
        self.lm, self.config = lm, lm.config
        # Cohere and Granite scale their logits; we scale the states before the head, so that `hidden` says it all.
        self._scale = getattr(lm.config, "logit_scale", None) or 1.0 / getattr(lm.config, "logits_scaling", 1.0)

    @property
    def lm_head(self) -> nn.Linear:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.lm.get_output_embeddings()

    def train(self, mode: bool = True) -> "CausalLM":
        """As for any module, but the layers stay as in evaluation: no dropout, no jitter."""
        super().train(mode)
        self.lm.train(False)
        return self

    def forward(
        self, tokens: Tensor, cu_seqlens: Tensor, *, replay: Tensor | None = None, index_loss: bool = False
    ) -> Output:
        """A pack of whole documents: tokens int64 [T], cu_seqlens [B + 1]; no document sees another."""
        if replay is not None and replay.numel():
            raise ValueError(f"routing replay is DeepSeek-V4's alone; {self.config.model_type} has none")
        if index_loss:
            raise ValueError(f"the indexer's loss is DeepSeek-V4's alone; {self.config.model_type} has no indexer")
        return self._run(tokens, cu_seqlens, None)

    def new_cache(
        self, slots: int, capacity: int, slack: int = 0, pages: int | None = None, page: int | None = None
    ) -> Cache:
        """An empty cache with room for `capacity` tokens of each request; `rollback` needs no slack here."""
        layers = self.config.num_hidden_layers
        return Cache(slots, capacity, capacity, page or page_tokens(set()), layers, self.lm_head.weight.device, pages)

    def extend(self, tokens: Tensor, cu_seqlens: Tensor, cache: Cache, slots: Tensor | None = None) -> Output:
        """Further tokens int64 [T] of B requests, cu_seqlens [B + 1]; updates `cache` in place.

        The requests are those in `slots` int64 [B], or in all slots. One may get any number of tokens, 0 too. For
        inference: the cache's tensors carry no gradient.
        """
        after = (cache.length if slots is None else cache.length[slots]) + cu_seqlens.diff()
        if int(after.max()) > cache.capacity:
            raise ValueError(f"a request of {int(after.max())} tokens does not fit a cache of {cache.capacity}")
        output = self._run(tokens, cu_seqlens, cache, slots)
        cache.advance(slots, cu_seqlens.diff(), int(after.max()))
        return output

    def prefill(self, tokens: Tensor, cu_seqlens: Tensor, capacity: int, slack: int = 0) -> tuple[Output, Cache]:
        """`extend` on a new cache."""
        cache = self.new_cache(cu_seqlens.numel() - 1, capacity, slack)
        return self.extend(tokens, cu_seqlens, cache), cache

    def decode(self, tokens: Tensor, cache: Cache, slots: Tensor | None = None) -> Output:
        """`extend` by the next token of each request: tokens int64 [B]."""
        return self.extend(tokens, torch.arange(tokens.numel() + 1, device=tokens.device), cache, slots)

    def _run(self, tokens: Tensor, cu_seqlens: Tensor, cache: Cache | None, slots: Tensor | None = None) -> Output:
        if int(cu_seqlens[-1]) != len(tokens):
            raise ValueError(f"cu_seqlens ends at {int(cu_seqlens[-1])}, but there are {len(tokens)} tokens")
        hidden, _ = self.states(tokens, cu_seqlens, cache, slots)
        return Output(hidden, torch.empty(len(tokens), 0, 0, dtype=torch.int64, device=tokens.device))

    def states(
        self, tokens: Tensor, cu_seqlens: Tensor, cache: Cache | None, slots: Tensor | None = None
    ) -> tuple[Tensor, list[int]]:
        """Hidden states [T, d], and the layers that attended, in order."""
        lengths, past = cu_seqlens.diff().long(), None
        if cache is not None:
            slots = torch.arange(cache.length.numel(), device=tokens.device) if slots is None else slots
            past = cache.length[slots]
        first = cu_seqlens[:-1].long() if past is None else cu_seqlens[:-1] - past
        position = torch.arange(len(tokens), device=tokens.device) - torch.repeat_interleave(first, lengths)
        start = [0] * len(lengths) if past is None else past.tolist()
        place = _Place(cu_seqlens.tolist(), position, start, cache, slots)
        result = self.lm.get_decoder()(
            input_ids=tokens.unsqueeze(0), position_ids=position.unsqueeze(0), use_cache=False, place=place
        )
        return result.last_hidden_state[0] * self._scale, place.seen
