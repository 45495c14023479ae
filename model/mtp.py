"""Multi-token prediction, depth 1: from the state at token i and the token i + 1, the distribution of token i + 2.

Paper 2.1 and DeepSeek's code; the rest "as in V3" (V3 paper, 2.2). One more block, window attention and learned
routing, whose input is e_proj(enorm(embedding of token i + 1)), added to each of the n streams, plus h_proj(hnorm(X))
with X [n, d] the streams that leave the last layer for token i, not collapsed; then an `hc_head` and a norm of its own,
and the model's own embedding and head. Official names and ours, where x is `mtp.0.` and y is `model.mtp.0.`:

    xe_proj, xh_proj .weight                  ye_proj, yh_proj .weight         [d, d]
    xenorm, xhnorm, xnorm .weight             yenorm, yhnorm, ynorm .weight    [d]
    xhc_head_fn, _base, _scale                yhc_head.hc_fn, .hc_base, .hc_scale
    x... of a layer without a compressor      y..., as `layers.N.` becomes `model.layers.N.`

What pairs token i with token i + 1 is called pair i; it sits at position i. Depth 2 and more is not built.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV4Config

from ..kernels.losses import packed_logprobs
from .attention import RMSNorm, linear
from .cache import Cache, LayerCache, page_tokens
from .chunks import Chunk, chunk
from .deepseek_v4 import Block, DeepseekV4, HyperHead
from .layout import Packed


class MTP(Block):
    def __init__(self, config: DeepseekV4Config):
        super().__init__(config, "sliding_attention", "moe")
        d, eps = config.hidden_size, config.rms_norm_eps
        self.e_proj, self.h_proj = linear(d, d), linear(d, d)
        self.enorm, self.hnorm, self.norm = RMSNorm(d, eps), RMSNorm(d, eps), RMSNorm(d, eps)
        self.hc_head = HyperHead(config)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, streams: Tensor, following: Tensor, place: Packed | Chunk, cache: LayerCache | None
    ) -> Tensor:
        """Pairs of streams [T, n, d] and the embeddings [T, d] of the tokens after them -> hidden states [T, d]."""
        pairs = self.e_proj(self.enorm(following)).unsqueeze(1) + self.h_proj(self.hnorm(streams))
        no_tokens = pairs.new_zeros(0, dtype=torch.int64)  # which only a hash layer asks for
        pairs, update, _, _ = super().forward(pairs, None, no_tokens, place, cache, None)
        return self.hc_head(pairs, update, self.norm)[1]


def mtp_logprobs(
    model: DeepseekV4, streams: Tensor, tokens: Tensor, cu_seqlens: Tensor, *, into_backbone: bool = True
) -> Tensor:
    """fp32 [T]: the block's log p(token | all of its document before it), 0 for a document's first two; for training.

    `streams` [T, n, d] are the model's for the same pack (`Output.streams`). As in V3, the gradient goes on into the
    backbone, the embedding and the head, unless `into_backbone` is False: then the block alone learns.
    """
    head = model.lm_head.weight
    following = model.model.embed_tokens(F.pad(tokens[1:], (0, 1))).squeeze(1)
    if not into_backbone:
        streams, following, head = streams.detach(), following.detach(), head.detach()
    hidden = mtp_hidden(model, streams, following, cu_seqlens)
    return packed_logprobs(hidden, head, tokens, cu_seqlens, ahead=2)


def mtp_hidden(model: DeepseekV4, streams: Tensor, following: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Hidden states [T, d] of a pack's pairs: streams [T, n, d], the embeddings [T, d] of the tokens after them.

    A document's last pair has no such token: what is there instead changes nothing but that pair's own state.
    """
    layout = model.lay_out(cu_seqlens, following.shape[0], set())
    return mtp_block(model)(streams, following, layout, None)


def mtp_cache(model: DeepseekV4, slots: int, capacity: int) -> Cache:
    """An empty cache of pairs. Pairs are of tokens that stay, so it needs no rollback: the slack of 1 is for the two
    pairs that follow a draft that was right."""
    return Cache(slots, capacity, 1, page_tokens(set()), 1, model.lm_head.weight.device, 1)


@torch.no_grad()
def extend_mtp(
    model: DeepseekV4,
    streams: Tensor,
    following: Tensor,
    cu_seqlens: Tensor,
    cache: Cache,
    slots: Tensor | None = None,
) -> Tensor:
    """Further pairs of B requests: streams [T, n, d], the tokens after them int64 [T], cu_seqlens [B + 1], `slots`
    int64 [B] of the cache (None: all).

    Returns hidden states [T, d], which `model.logits` turns into those of the tokens after next.
    """
    places: dict[str, Any] = {**model.places(), "compressors": set()}
    layout = chunk(cu_seqlens, slots, cache, **places)
    hidden = mtp_block(model)(streams, model.model.embed_tokens(following).squeeze(1), layout, cache.layers[0])
    cache.advance(slots, layout.lengths, layout.most)
    return hidden


def mtp_block(model: DeepseekV4) -> MTP:
    """The model's MTP block; ValueError where it has none, as any model but V4."""
    if not isinstance(model, DeepseekV4):
        raise ValueError("the MTP block is DeepSeek-V4's alone")
    if not model.model.mtp:
        raise ValueError("the model has no MTP block: num_nextn_predict_layers is 0 in its config.json")
    return model.model.mtp[0]  # pyright: ignore[reportReturnType]
