"""Two orders of operations. In fp32 they agree; in bf16 they round in other places.

"deepseek", the default, is what every module of this package does by itself: DeepSeek's inference code. In a model of
dtype bf16 these run in fp32: RMSNorms, RoPE and its tables, hyper-connections (product first, then the norm's factor),
the compressors from their projections to the pooling, attention's scores, softmax and sum, the indexer's scores, the
router, SwiGLU with its clamps and the routing weight (before the down projection), the sum over experts in slot order
with the shared expert, and the head's products of bf16 operands. Ours differs from that code where it keeps fp32 and
the code rounds to bf16 for its kernels' sake: the factor of the per-head norm of the queries, attention's
probabilities before they meet the values, and the scale of the indexer's head weights.

"transformers" repeats transformers' `eager` order, so that a bf16 checkpoint gives the log-probs that others see there:
router, SwiGLU, sums over experts and head in bf16, the routing weight after the down projection, RoPE's tables in bf16,
compressor projections in bf16, attention's scores and probabilities in bf16, streams mixed in bf16. It is slower.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..kernels.attention import keys_of_blocks
from ..kernels.compress import gather, stored
from ..kernels.hyper import Update
from ..kernels.indexer import select
from ..kernels.places import Seen, Windows
from ..kernels.rope import apply_rope
from ..kernels.swiglu import swiglu
from ..kernels.upcast import upcast
from .attention import Attention, Compressor, CSACompressor, Indexer, RMSNorm
from .cache import LayerCache
from .chunks import Chunk
from .deepseek_v4 import DeepseekV4, HyperConnection, HyperHead, MoE, Router, SharedExpert
from .language_model import Output

Numerics = Literal["deepseek", "transformers"]


def with_numerics(model: DeepseekV4, numerics: Numerics) -> DeepseekV4:
    """The same model, with its parameters and their names, computing in that order; there is no way back."""
    if numerics not in ("deepseek", "transformers"):
        raise UserError(f"numerics: {numerics!r}; want deepseek or transformers")
    if numerics == "transformers":
        for module in model.modules():
            if type(module) in _TWINS:
                module.__class__ = _TWINS[type(module)]
    return model


def _rounded(rotation: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.complex(upcast(rotation.real.to(dtype)), upcast(rotation.imag.to(dtype)))


def _normalized(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(upcast(x).square().mean(-1, keepdim=True) + eps).to(x.dtype)


def _updated(streams: Tensor, update: Update | None) -> Tensor:
    """update's post [T, n] and comb [T, n, n] are `_HyperConnection`'s."""
    if update is None:
        return streams
    output, post, comb = update.output, update.post.to(streams.dtype), update.comb.to(streams.dtype)
    return post.unsqueeze(-1) * output.unsqueeze(1) + torch.matmul(comb.transpose(1, 2), streams)


class _RMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        wide = upcast(x)
        return (self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps))).to(x.dtype)


class _Compressor(Compressor):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.kv_proj(x), self.gate_proj(x)

    def entries(self, values: Tensor, scores: Tensor, windows: Windows) -> Tensor:
        values, scores = gather(values, scores, self.position_bias, windows, self.dim)
        pooled = (values * upcast(scores).softmax(1).to(values.dtype)).sum(1)
        rotation = _rounded(windows.rotation, values.dtype)
        return stored(apply_rope(self.kv_norm(pooled), rotation), rotation, self.storage)


class _CSACompressor(_Compressor, CSACompressor):
    pass


class _Indexer(_Compressor, Indexer):
    def queries(self, x: Tensor, latent: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        return super().queries(x, latent, _rounded(rotation, x.dtype))


class _Attention(Attention):
    def _project(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rotation = _rounded(rotation, x.dtype)
        latent = self.q_a_norm(self.q_a_proj(x))
        q = _normalized(self.q_b_proj(latent).unflatten(-1, (self.heads, self.dim)), self.eps)
        return latent, apply_rope(q, rotation), apply_rope(self.kv_norm(self.kv_proj(x)), rotation)

    def extend(self, x: Tensor, chunk: Chunk, cache: LayerCache) -> tuple[Tensor, Tensor | None]:
        """One operation after another."""
        rotation, seen, compressor = chunk.rotation[self.rope], chunk.seen(self.ratio), self.compressor
        latent, q, row = self._project(x, rotation)
        rows = _kept(chunk, cache, "rows", row, self.window, self.window - 1)
        if compressor is None:
            return self._output(self._attend(q, rows, None, seen, None, rotation)[0]), None
        entries, chosen = _extended(compressor, x, chunk, cache, "", "entries"), None
        if isinstance(compressor, CSACompressor):
            indexer = compressor.indexer
            keys = _extended(indexer, x, chunk, cache, "index_", "index_keys")
            if seen.most > indexer.topk:
                queries = indexer.queries(x, latent, rotation)
                chosen = select(*queries, keys, seen, indexer.topk, indexer.score_dtype)
        return self._output(self._attend(q, rows, entries, seen, chosen, rotation)[0]), chosen

    def _attend(
        self, q: Tensor, rows: Tensor, entries: Tensor | None, seen: Seen, chosen: Tensor | None, rotation: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        keys, visible = keys_of_blocks(rows, entries, seen, chosen)
        q = seen.blocks.in_blocks(q)
        n, m, heads, dim = q.shape
        scores = torch.bmm(q.reshape(n, m * heads, dim), keys.transpose(1, 2)).view(n, m, heads, -1) * dim**-0.5
        scores = scores.masked_fill(~visible.unsqueeze(2), float("-inf"))
        scores = torch.cat([scores, self.sinks.view(1, 1, heads, 1).expand(n, m, heads, 1)], dim=-1)
        weights = torch.softmax(scores - scores.amax(-1, keepdim=True), dim=-1)[..., :-1].to(q.dtype)
        out = torch.bmm(weights.reshape(n, m * heads, -1), keys).view(n, m, heads, dim)
        return apply_rope(seen.blocks.from_blocks(out), _rounded(rotation, out.dtype), inverse=True), None


def _extended(of: Compressor, x: Tensor, chunk: Chunk, cache: LayerCache, prefix: str, name: str) -> Tensor:
    """Adds a chunk's tokens to `cache`, and to `name` there the entries complete with them: the pool [N, dim]."""
    parts = zip(("values", "scores"), of(x), strict=True)
    values, scores = (_kept(chunk, cache, prefix + part, new, of.tokens, of.tokens) for part, new in parts)
    done = chunk.finished[of.ratio, of.tokens]
    made = of.entries(values, scores, done.windows)
    return chunk.cache.pool(cache, name, made, of.ratio).index_copy_(0, done.row, made)


def _kept(chunk: Chunk, cache: LayerCache, name: str, new: Tensor, size: int, last: int) -> Tensor:
    """The rows that `Chunk.remember` gives, of a ring of `size` and the slack."""
    ring = chunk.cache.ring(cache, name, new, size + chunk.slack)
    into = chunk.into(ring)
    return chunk.remember(ring, new if into is None else into.write(new), last)


class _HyperConnection(HyperConnection):
    def forward(
        self, streams: Tensor, update: Update | None, norm: RMSNorm, counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """post [T, n] and comb [T, n, n] are this class's own."""
        c, n = self.config, self.config.hc_mult
        streams = _updated(streams, update)
        logits = F.linear(_normalized(upcast(streams.flatten(1)), c.rms_norm_eps), self.fn)
        pre, post, comb = logits.split([n, n, n * n], dim=-1)
        bias_pre, bias_post, bias_comb = self.base.split([n, n, n * n])
        pre = torch.sigmoid(pre * self.scale[0] + bias_pre) + c.hc_eps
        post = 2 * torch.sigmoid(post * self.scale[1] + bias_post)
        comb = torch.softmax((comb * self.scale[2] + bias_comb).unflatten(1, (n, n)), dim=-1) + c.hc_eps
        comb = comb / (comb.sum(1, keepdim=True) + c.hc_eps)
        for _ in range(c.hc_sinkhorn_iters - 1):
            comb = comb / (comb.sum(2, keepdim=True) + c.hc_eps)
            comb = comb / (comb.sum(1, keepdim=True) + c.hc_eps)
        return streams, norm((pre.unsqueeze(-1) * streams).sum(1).to(streams.dtype)), post, comb


class _HyperHead(HyperHead):
    def forward(
        self, streams: Tensor, update: Update | None, norm: RMSNorm, counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        c, streams = self.config, _updated(streams, update)
        logits = F.linear(_normalized(upcast(streams.flatten(1)), c.rms_norm_eps), self.hc_fn)
        pre = torch.sigmoid(logits * self.hc_scale + self.hc_base) + c.hc_eps
        return streams, norm((pre.unsqueeze(-1) * streams).sum(1).to(streams.dtype))


class _Router(Router):
    def forward(self, x: Tensor, tokens: Tensor, replay: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = F.softplus(F.linear(x, self.weight)).sqrt()
        if self.hashed:
            ids = self.tid2eid[tokens]
        else:
            ids = torch.topk(scores + self.e_score_correction_bias, self.topk, sorted=False).indices
            if replay is not None:
                ids = torch.where((replay < 0).any(-1, keepdim=True), ids, replay)
        picked = scores.gather(1, ids)
        return ids, picked / (picked.sum(-1, keepdim=True) + 1e-20) * self.scaling


class _SharedExpert(SharedExpert):
    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x).clamp(-self.limit, self.limit)
        return self.down_proj(F.silu(self.gate_proj(x).clamp(max=self.limit)) * up)


class _MoE(MoE):
    def forward(self, x: Tensor, tokens: Tensor, replay: Tensor | None) -> tuple[Tensor, Tensor]:
        ids, weights = self.gate(x, tokens, replay)
        routed = torch.zeros_like(x)
        for e in ids.unique().tolist():
            slots, rows = torch.where(ids.t() == e)
            hidden = swiglu(F.linear(x[rows], self.experts.gate_up_proj[e]), self.limit)
            output = F.linear(hidden, self.experts.down_proj[e]) * weights[rows, slots].unsqueeze(-1)
            routed = routed.index_add(0, rows, output)
        return routed + self.shared_experts(x), ids


class _DeepseekV4(DeepseekV4):
    numerics = "transformers"

    def logits(self, hidden: Tensor) -> Tensor:
        return upcast(self.lm_head(hidden))

    def logprobs_of(self, output: Output, tokens: Tensor, cu_seqlens: Tensor, temperature: float = 1.0) -> Tensor:
        scores = torch.log_softmax(self.logits(output.hidden[:-1]) / temperature, -1)
        picked = F.pad(scores.gather(1, tokens[1:].unsqueeze(1)).squeeze(1), (1, 0))
        return picked.index_fill(0, cu_seqlens[:-1].long(), 0.0)


_TWINS: dict[type[nn.Module], type[nn.Module]] = {twin.__bases__[-1]: twin for twin in (
    _RMSNorm, _Compressor, _CSACompressor, _Indexer, _Attention, _HyperConnection, _HyperHead, _Router, _SharedExpert,
    _MoE, _DeepseekV4,
)}  # fmt: skip
