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
from .cache import LayerCache
from .language_model import LanguageModel, Output

# What an attention layer may pass on beside its own numbers: nothing of it changes the result.
_UNUSED = ("dropout", "position_ids")


@dataclass
class KeyValueCache:
    """`length` int64 [B]: tokens each request holds; `capacity`: the most tokens a request may come to hold.

    A layer keeps "keys" [B, capacity, G, D] and "values" [B, capacity, G, D'].
    """

    length: Tensor
    capacity: int
    layers: list[LayerCache]

    def select(self, rows: Tensor) -> "KeyValueCache":
        """The cache of requests `rows` (int64; repeated for forks), as a copy."""
        layers = [{name: t.index_select(0, rows) for name, t in layer.items()} for layer in self.layers]
        return KeyValueCache(self.length.index_select(0, rows), self.capacity, layers)

    def rollback(self, length: Tensor) -> None:
        """Drops each request's tokens from `length` int64 [B] on; later ones overwrite them."""
        if (length > self.length).any():
            raise ValueError(f"a cache of {self.length.tolist()} tokens cannot go back to {length.tolist()}")
        self.length = length.clone()


@dataclass
class _Place:
    """Where the tokens of one call stand. Document b's new tokens are cu_seqlens[b] to cu_seqlens[b + 1]."""

    cu_seqlens: list[int]
    position: Tensor  # int64 [T], in the own document
    start: list[int]  # tokens that each document's cache holds already
    caches: list[LayerCache] | None = None
    capacity: int = 0
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
    if place.caches is None:
        spans = zip(place.cu_seqlens, place.cu_seqlens[1:], strict=False)
        parts = [attend_causal(query[:, :, i:j], key[:, :, i:j], value[:, :, i:j], **numbers) for i, j in spans]
        return torch.cat(parts, 2).transpose(1, 2), None
    return _attend_cached(query, key, value, place, place.caches[layer], numbers).transpose(1, 2), None


def _attend_cached(
    query: Tensor, key: Tensor, value: Tensor, place: _Place, cache: LayerCache, numbers: dict[str, Any]
) -> Tensor:
    """Writes the new keys and values to the cache, and attends to all of each request's: [1, H, T, D]."""
    borders, count = place.cu_seqlens, len(place.start)
    if not cache:
        for name, new in (("keys", key), ("values", value)):
            cache[name] = new.new_zeros(count, place.capacity, new.shape[1], new.shape[3])
    lengths = torch.tensor(borders).diff()
    request = torch.repeat_interleave(torch.arange(count), lengths).to(query.device)
    for name, new in (("keys", key), ("values", value)):
        cache[name][request, place.position] = new[0].transpose(0, 1)
    keys, values = cache["keys"].transpose(1, 2), cache["values"].transpose(1, 2)
    if bool((lengths == 1).all()):  # one token each: all requests at once
        most = max(place.start) + 1
        q, at = query[0].transpose(0, 1).unsqueeze(2), place.position.unsqueeze(1)  # [B, H, 1, D], [B, 1]
        return attend_causal(q, keys[:, :, :most], values[:, :, :most], at, **numbers).permute(2, 1, 0, 3)
    parts = []
    for b, (i, j) in enumerate(zip(borders, borders[1:], strict=False)):
        if i == j:
            continue
        end = place.start[b] + j - i
        at = None if place.start[b] == 0 else place.position[i:j].unsqueeze(0)
        own = (keys[b : b + 1, :, :end], values[b : b + 1, :, :end])
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

    def new_cache(self, requests: int, capacity: int, slack: int = 0) -> KeyValueCache:
        """An empty cache for `requests`, with room for `capacity` tokens each; `rollback` needs no slack here."""
        length = torch.zeros(requests, dtype=torch.int64, device=self.lm_head.weight.device)
        return KeyValueCache(length, capacity, [{} for _ in range(self.config.num_hidden_layers)])

    def extend(self, tokens: Tensor, cu_seqlens: Tensor, cache: KeyValueCache) -> Output:
        """Further tokens int64 [T] of the cache's B requests, cu_seqlens [B + 1]; updates `cache` in place.

        A request may get any number of tokens, 0 too. For inference: the cache's tensors carry no gradient.
        """
        length = cache.length + cu_seqlens.diff()
        if int(length.max()) > cache.capacity:
            raise ValueError(f"a request of {int(length.max())} tokens does not fit a cache of {cache.capacity}")
        output = self._run(tokens, cu_seqlens, cache)
        cache.length = length
        return output

    def prefill(
        self, tokens: Tensor, cu_seqlens: Tensor, capacity: int, slack: int = 0
    ) -> tuple[Output, KeyValueCache]:
        """`extend` on a new cache."""
        cache = self.new_cache(cu_seqlens.numel() - 1, capacity, slack)
        return self.extend(tokens, cu_seqlens, cache), cache

    def decode(self, tokens: Tensor, cache: KeyValueCache) -> Output:
        """`extend` by the next token of each request: tokens int64 [B]."""
        return self.extend(tokens, torch.arange(tokens.numel() + 1, device=tokens.device), cache)

    def _run(self, tokens: Tensor, cu_seqlens: Tensor, cache: KeyValueCache | None) -> Output:
        if int(cu_seqlens[-1]) != len(tokens):
            raise ValueError(f"cu_seqlens ends at {int(cu_seqlens[-1])}, but there are {len(tokens)} tokens")
        hidden, _ = self.states(tokens, cu_seqlens, cache)
        return Output(hidden, torch.empty(len(tokens), 0, 0, dtype=torch.int64, device=tokens.device))

    def states(self, tokens: Tensor, cu_seqlens: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, list[int]]:
        """Hidden states [T, d], and the layers that attended, in order."""
        lengths = cu_seqlens.diff().long()
        first = cu_seqlens[:-1].long() if cache is None else cu_seqlens[:-1] - cache.length
        position = torch.arange(len(tokens), device=tokens.device) - torch.repeat_interleave(first, lengths)
        start = [0] * len(lengths) if cache is None else cache.length.tolist()
        place = _Place(cu_seqlens.tolist(), position, start)
        if cache is not None:
            place.caches, place.capacity = cache.layers, cache.capacity
        result = self.lm.get_decoder()(
            input_ids=tokens.unsqueeze(0), position_ids=position.unsqueeze(0), use_cache=False, place=place
        )
        return result.last_hidden_state[0] * self._scale, place.seen
