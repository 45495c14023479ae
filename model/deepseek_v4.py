"""DeepSeek-V4 over packed sequences: residual streams, MoE, the whole model, its decoding step.

Module and parameter names are transformers', so that a state dict means the same in both; the MTP block, which
transformers does not have, is in mtp.py. Shapes: T packed tokens, B documents, L layers, k experts a token, n residual
streams, d hidden size.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV4Config

from ..kernels.dispatch import wants_triton
from ..kernels.embedding import embed
from ..kernels.hyper import Update, counters, enter, leave
from ..kernels.low_precision import experts_fp8, experts_qat
from ..kernels.moe import experts, route
from ..kernels.project import Product, few, project, project_each, project_wide
from ..kernels.rope import inverse_frequencies
from ..kernels.swiglu import gated
from ..kernels.upcast import upcast
from ..settings import FULL
from .attention import Attention, CSACompressor, Indexer, RMSNorm, linear
from .cache import Cache, LayerCache, page_tokens
from .chunks import Chunk, chunk
from .language_model import LanguageModel, Output
from .layout import Packed, packed, packed_by_sizes
from .step import step
from .stored import StoredFp4, StoredFp8

# What V4 keeps in fp32 whatever the model's dtype, by part of the name (transformers keeps the same parameters).
FP32_ISLANDS = ("_hc.", "hc_head.", ".sinks", "position_bias", "e_score_correction_bias", "norm.weight", "_frequencies")


class HyperConnection(nn.Module):
    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        n, self.config = config.hc_mult, config
        self.fn = nn.Parameter(torch.zeros((2 + n) * n, n * config.hidden_size))
        self.base = nn.Parameter(torch.zeros((2 + n) * n))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(
        self, streams: Tensor, update: Update | None, norm: RMSNorm, counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The streams [T, n, d] with `update`; the sublayer's input [T, d], after `norm`; its post and comb.

        `counts`: of kernels.hyper.counters, as in `HyperHead`."""
        c = self.config
        weights = (self.fn, self.base, self.scale, norm.weight)
        options = {"norm_eps": c.rms_norm_eps, "eps": c.hc_eps, "counts": counts}
        return enter(streams, update, *weights, iterations=c.hc_sinkhorn_iters, **options)


class HyperHead(nn.Module):
    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        n, self.config = config.hc_mult, config
        self.hc_fn = nn.Parameter(torch.zeros(n, n * config.hidden_size))
        self.hc_base = nn.Parameter(torch.zeros(n))
        self.hc_scale = nn.Parameter(torch.ones(1))

    def forward(
        self, streams: Tensor, update: Update | None, norm: RMSNorm, counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The streams [T, n, d] with the last update, and what they collapse to [T, d], after `norm`."""
        c = self.config
        weights = (self.hc_fn, self.hc_base, self.hc_scale, norm.weight)
        return leave(streams, update, *weights, norm_eps=c.rms_norm_eps, eps=c.hc_eps, counts=counts)


class Router(nn.Module):
    """The gate's weight, and a hash layer's table or a learned layer's correction bias (both are buffers)."""

    tid2eid: Tensor
    e_score_correction_bias: Tensor

    def __init__(self, config: DeepseekV4Config, hashed: bool):
        super().__init__()
        self.hashed, self.topk, self.scaling = hashed, config.num_experts_per_tok, config.routed_scaling_factor
        self.experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        if hashed:
            self.register_buffer("tid2eid", torch.zeros(config.vocab_size, self.topk, dtype=torch.int64))
        else:
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor, tokens: Tensor, replay: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ids and weights [T, k]. A hash layer's table always wins over `replay`, which can only repeat it."""
        return self.choice(project_wide(x, self.weight), tokens, replay)

    def choice(self, logits: Tensor, tokens: Tensor, replay: Tensor | None) -> tuple[Tensor, Tensor]:
        """`forward` from what the gate gives, fp32 [T, E]."""
        if self.hashed:
            return route(logits, topk=self.topk, scaling=self.scaling, chosen=self.tid2eid, tokens=tokens)
        bias = self.e_score_correction_bias
        return route(logits, topk=self.topk, scaling=self.scaling, bias=bias, chosen=replay)


class Experts(nn.Module):
    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        e, d, i = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.zeros(e, 2 * i, d))
        self.down_proj = nn.Parameter(torch.zeros(e, d, i))
        self.precision: Literal["full", "fp8", "fp4"] = "full"  # of what they multiply (model/precision.py)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, limit: float, shared: Tensor) -> Tensor:
        """x [T, d], ids and weights [T, k], what the shared expert gives [T, d] -> their sum [T, d], added in fp32."""
        gate_up, down = self.gate_up_proj, self.down_proj
        if self.precision == "full":
            return experts(x, ids, weights, gate_up, down, limit, shared)
        if isinstance(gate_up, StoredFp8 | StoredFp4) and isinstance(down, StoredFp8 | StoredFp4):
            routed = experts_fp8(x, ids, weights, gate_up.experts(), down.experts(), limit)
        else:
            routed = experts_qat(x, ids, weights, gate_up, down, limit, fp4=self.precision == "fp4")
        return (routed + upcast(shared)).to(x.dtype)


class SharedExpert(nn.Module):
    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        d, i = config.hidden_size, config.moe_intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = linear(d, i), linear(d, i), linear(i, d)
        self.limit = config.swiglu_limit

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj.precision == "full":
            gate_up = project(x, torch.cat([self.gate_proj.weight, self.up_proj.weight]))
        else:
            gate_up = torch.cat([self.gate_proj(x), self.up_proj(x)], 1)
        return self.down_proj(gated(gate_up, self.limit))


class MoE(nn.Module):
    def __init__(self, config: DeepseekV4Config, hashed: bool):
        super().__init__()
        self.gate = Router(config, hashed)
        self.experts = Experts(config)
        self.shared_experts = SharedExpert(config)
        self.limit = config.swiglu_limit

    def forward(self, x: Tensor, tokens: Tensor, replay: Tensor | None) -> tuple[Tensor, Tensor]:
        """[T, d] -> [T, d] and the expert ids [T, k]; the routed sum and the shared expert are added in fp32."""
        shared = self.shared_experts
        if few(x) and shared.gate_proj.precision == "full":  # all that has x as its input is one launch
            gate, up = shared.gate_proj.weight, shared.up_proj.weight
            first = Product(gate, up=up, limit=shared.limit)
            logits, hidden = project_each(x, [Product(self.gate.weight, wide=True), first])
            (ids, weights), added = self.gate.choice(logits, tokens, replay), shared.down_proj(hidden)
        else:
            (ids, weights), added = self.gate(x, tokens, replay), shared(x)
        return self.experts(x, ids, weights, self.limit, added), ids


class Block(nn.Module):
    def __init__(self, config: DeepseekV4Config, attention: str, mlp: str):
        super().__init__()
        self.self_attn = Attention(config, attention)
        self.mlp = MoE(config, mlp == "hash_moe")
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn_hc = HyperConnection(config)
        self.ffn_hc = HyperConnection(config)

    def forward(
        self,
        streams: Tensor,
        update: Update | None,
        tokens: Tensor,
        place: Packed | Chunk,
        cache: LayerCache | None,
        replay: Tensor | None,
        index_loss: bool = False,
        counts: Sequence[Tensor | None] = (None, None),
    ) -> tuple[Tensor, Update, Tensor, Tensor | None]:
        """New streams [T, n, d] and the update that is to come, expert ids [T, k], `Attention.forward`'s KL or
        `Attention.extend`'s picks.

        `update` is the block's before; a chunk's `cache` is updated in place.
        """
        streams, x, post, comb = self.attn_hc(streams, update, self.input_layernorm, counts[0])
        if isinstance(place, Packed):
            x, index = self.self_attn(x, place, index_loss)
        else:
            assert cache is not None
            x, index = self.self_attn.extend(x, place, cache)
        streams, x, post, comb = self.ffn_hc(streams, Update(x, post, comb), self.post_attention_layernorm, counts[1])
        x, ids = self.mlp(x, tokens, replay)
        return streams, Update(x, post, comb), ids, index


class Embedding(nn.Embedding):
    def forward(self, input: Tensor, copies: int = 1) -> Tensor:
        """int64 [T] -> [T, copies, d]."""
        return embed(input, self.weight, copies)


class Backbone(nn.Module):
    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        kinds = zip(config.layer_types or (), config.mlp_layer_types or (), strict=True)  # transformers fills both
        self.layers = nn.ModuleList([Block(config, *kind) for kind in kinds])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hc_head = HyperHead(config)
        from .mtp import MTP  # which is built from this file's blocks

        if config.num_nextn_predict_layers > 1:
            raise ValueError(f"num_nextn_predict_layers: {config.num_nextn_predict_layers} is not built; 0 or 1 is")
        self.mtp = nn.ModuleList([MTP(config) for _ in range(config.num_nextn_predict_layers)])


def check_kernels(config: DeepseekV4Config, device: torch.device) -> None:
    """ValueError where the kernels that would run on `device` do not take such a model."""
    if device.type != "meta" and wants_triton(device):
        from ..kernels.fused.limits import check_model

        check_model(config, device)


class DeepseekV4(LanguageModel):
    """The model. `precision` says what is rounded as deployment stores it (`precision.set_precision` sets it).

    The indexers' parameters do not require gradients: V4's language-model loss does not reach them (the choice is
    discrete), and the published post-training runs of others freeze them too. Nor do the MTP block's, for the same
    first reason. A stage that has the indexers' or the block's own loss asks for them with `unfreeze`.
    """

    numerics = "deepseek"
    longest: int | None = None  # tokens of a document at most, while packs are laid out by their sizes alone
    main_frequencies: Tensor
    compress_frequencies: Tensor

    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        self.config = config
        self.precision = FULL
        self.model = Backbone(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        self.compressors = {(a.ratio, a.compressor.tokens) for a in self._attentions() if a.compressor is not None}
        parameters: Any = config.rope_parameters
        for kind in ("main", "compress"):
            table = inverse_frequencies(config.qk_rope_head_dim, parameters[kind])
            self.register_buffer(f"{kind}_frequencies", table, persistent=False)
        for module in (*self._indexers(), self.model.mtp):
            module.requires_grad_(False)
        check_kernels(config, self.lm_head.weight.device)

    def unfreeze(self, part: str) -> None:
        """Lets gradients reach a part of the model that only a loss of its own trains: "indexer" or "mtp"."""
        found = {"indexer": self._indexers(), "mtp": list(self.model.mtp)}.get(part)
        if not found:
            raise ValueError(f"the model has no part {part!r} that is frozen")
        for module in found:
            module.requires_grad_(True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DeepseekV4":
        """What `.to`, `.bfloat16()` and the like go through, on a module around this one too: islands stay fp32.

        DeepSpeed's bf16 section sets every parameter's data itself; `_run` refuses such a model.
        """
        tensors = [*self.named_parameters(), *self.named_buffers()]
        islands = [tensor for name, tensor in tensors if any(part in name for part in FP32_ISLANDS)]
        islands += [tensor.grad for tensor in islands if tensor.grad is not None]
        kept = {id(tensor) for tensor in islands}

        def widest(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrower = moved.dtype.itemsize < tensor.dtype.itemsize
            return tensor.to(moved.device) if id(tensor) in kept and narrower else moved

        super()._apply(widest, recurse)
        check_kernels(self.config, self.lm_head.weight.device)
        return self

    def _attentions(self) -> list[Attention]:
        return [block.self_attn for block in self.model.layers]  # pyright: ignore

    def _indexers(self) -> list[Indexer]:
        return [a.compressor.indexer for a in self._attentions() if isinstance(a.compressor, CSACompressor)]

    def frequencies(self) -> dict[str, Tensor]:
        return {"main": self.main_frequencies, "compress": self.compress_frequencies}

    def forward(
        self, tokens: Tensor, cu_seqlens: Tensor, *, replay: Tensor | None = None, index_loss: bool = False
    ) -> Output:
        """A pack of whole documents: tokens int64 [T], cu_seqlens [B + 1]; no document sees another.

        With cu_seqlens on the host, neither this nor its backward waits for the device.
        `replay` int64 [T, L, k] forces recorded expert ids on learned layers (rows with -1 choose by themselves).
        `index_loss` asks for `index_kl` (kernels/indexer.py), the mean over CSA layers (our choice), of the query that
        predicts each token: 0 for a document's first. Its gradient reaches the indexers alone, if they are unfrozen.
        """
        if index_loss and not self._indexers():
            raise ValueError("the model has no CSA layer, and so no indexer that could have a loss")
        layout = self.lay_out(cu_seqlens, tokens.numel(), {ratio for ratio, _ in self.compressors})
        _check(tokens, layout.position)
        return self._run(tokens, layout, [None] * self.config.num_hidden_layers, replay, index_loss)

    def lay_out(self, cu_seqlens: Tensor, tokens: int, ratios: set[int]) -> Packed:
        """The layout of a pack with the entries of `ratios`; where `longest` is set, nothing asks the device."""
        window, frequencies = self.config.sliding_window, self.frequencies()
        if self.longest is None:
            return packed(cu_seqlens, window, ratios, frequencies)
        return packed_by_sizes(cu_seqlens, tokens, self.longest, window, ratios, frequencies)

    def new_cache(
        self, slots: int, capacity: int, slack: int = 0, pages: int | None = None, page: int | None = None
    ) -> Cache:
        """An empty cache with room for `capacity` tokens of each request; `slack` is what `rollback` may drop.

        It has `pages` of `page` tokens (None: what all slots need, of the usual size); `page` is a multiple of each
        compressor's ratio."""
        ratios = {ratio for ratio, _ in self.compressors}
        page = page or page_tokens(ratios)
        if any(page % ratio for ratio in ratios):
            raise ValueError(f"a page of {page} tokens; want a multiple of {sorted(ratios)}")
        return Cache(slots, capacity, slack, page, len(self.model.layers), self.main_frequencies.device, pages)

    def extend(self, tokens: Tensor, cu_seqlens: Tensor, cache: Cache, slots: Tensor | None = None) -> Output:
        """Further tokens int64 [T] of B requests, cu_seqlens [B + 1]; updates `cache` in place.

        The requests are those in `slots` int64 [B], or in all slots. One may get any number of tokens, 0 too. The
        borders between such chunks change no token's result. No gradient: what a cache holds has none.
        """
        return self._extend(tokens, chunk(cu_seqlens, slots, cache, **self.places()), slots)

    def prefill(self, tokens: Tensor, cu_seqlens: Tensor, capacity: int, slack: int = 0) -> tuple[Output, Cache]:
        """`extend` on a new cache."""
        cache = self.new_cache(cu_seqlens.numel() - 1, capacity, slack)
        return self.extend(tokens, cu_seqlens, cache), cache

    def decode(self, tokens: Tensor, cache: Cache, slots: Tensor | None = None) -> Output:
        """`extend` by the next token of each request: tokens int64 [B]. What it computes with has shapes that follow
        from B, `cache.longest` and `cache.capacity`, and laying it out waits for no device (model/graph.py)."""
        return self._extend(tokens, step(slots, cache, **self.places()), slots)

    def places(self) -> dict[str, Any]:
        """What the layouts of chunks (chunks.py) are told about the model."""
        return {
            "window": self.config.sliding_window,
            "compressors": self.compressors,
            "frequencies": self.frequencies(),
        }

    @torch.no_grad()
    def _extend(self, tokens: Tensor, layout: Chunk, slots: Tensor | None) -> Output:
        _check(tokens, layout.position)
        output = self._run(tokens, layout, layout.cache.layers, None)
        layout.cache.advance(slots, layout.lengths, layout.most)
        return output

    def _run(
        self,
        tokens: Tensor,
        place: Packed | Chunk,
        caches: list,
        replay: Tensor | None,
        index_loss: bool = False,
    ) -> Output:
        if (dtype := self.model.norm.weight.dtype).itemsize < 4:
            name = str(dtype).removeprefix("torch.")
            raise ValueError(f"V4's fp32 parameters were cast to {name}; run DeepSpeed without its bf16 section")
        streams = self.model.embed_tokens(tokens, self.config.hc_mult)
        update, chosen, indices = None, [], []
        counts = counters(streams, 2 * len(caches) + 1)
        for i, (block, cache) in enumerate(zip(self.model.layers, caches, strict=True)):
            own = None if replay is None else replay[:, i]
            streams, update, ids, index = block(
                streams, update, tokens, place, cache, own, index_loss, counts[2 * i : 2 * i + 2]
            )
            chosen.append(ids)
            indices += [] if index is None else [index]
        index_kl = picks = None
        if indices and isinstance(place, Packed):
            of_query = torch.stack(indices).mean(0)
            index_kl = F.pad(of_query[:-1], (1, 0)).masked_fill(place.position == 0, 0.0)
        elif indices:
            picks = torch.stack(indices, dim=1)
        streams, hidden = self.model.hc_head(streams, update, self.model.norm, counts[-1])
        return Output(hidden, torch.stack(chosen, dim=1), streams, index_kl, picks)


def _check(tokens: Tensor, position: Tensor) -> None:
    if tokens.shape != position.shape:
        raise ValueError(f"cu_seqlens ends at {position.numel()}, but there are {tokens.numel()} tokens")
