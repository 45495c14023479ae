"""Attention of DeepSeek-V4: sliding window, compressed sparse (CSA) and heavily compressed (HCA), paper 2.3.

Module and parameter names are transformers'. Shapes: T tokens, H heads, D head dimension, C a compressor's channels.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config

from ..kernels.attention import attend, head_mass
from ..kernels.compress import Pooling, Storage, compress, compress_each, stored
from ..kernels.indexer import index_kl, index_scores, select
from ..kernels.low_precision import linear_fp8, linear_qat, rounded_weight
from ..kernels.norm import Norm, norm_each, norm_rope, rms_norm
from ..kernels.places import Seen, Windows
from ..kernels.project import Into, Product, project, project_each, project_groups, project_wide
from ..kernels.rope import apply_rope
from ..kernels.upcast import upcast
from .cache import LayerCache
from .chunks import Chunk
from .layout import Packed
from .pools import Format, Pool, joined
from .stored import StoredFp8, StoredRounded


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    precision: Literal["full", "fp8"] = "full"  # of what it multiplies (model/precision.py)

    def forward(self, input: Tensor) -> Tensor:
        if self.precision == "full":
            return project(input, self.weight)
        if isinstance(self.weight, StoredFp8):
            return linear_fp8(input, self.weight.matrix())
        return linear_qat(input, self.weight)


class Wanted(NamedTuple):
    """What a linear layer gives, as a `Product` says."""

    linear: Linear
    wide: bool = False
    scale: float | None = None
    into: Into | None = None


def linear_each(x: Tensor, wanted: Sequence[Wanted]) -> list[Tensor]:
    """What linear layers give for x [T, d], without gradient: those at full precision together."""
    together = [Product(w.linear.weight, *w[1:]) for w in wanted if w.linear.precision == "full"]
    made = iter(project_each(x, together))
    return [next(made) if w.linear.precision == "full" else w.linear(x) for w in wanted]


def linear(size_in: int, size_out: int) -> Linear:
    return Linear(size_in, size_out, bias=False)


class Compressor(nn.Module):
    """Turns each complete window of `ratio` tokens into one entry of `dim` channels (paper 2.3.1, 2.3.2).

    With `overlap` (CSA) an entry also pools the window before it: a token has 2 `dim` channels, the first half serves
    the next window's entry and the second half its own.
    """

    prefix, pool = "", "entries"  # of its tensors' names in a cache

    def __init__(self, config: DeepseekV4Config, dim: int, ratio: int, overlap: bool):
        super().__init__()
        self.ratio, self.dim, self.overlap = ratio, dim, overlap
        channels = dim * (2 if overlap else 1)
        self.kv_proj = linear(config.hidden_size, channels)
        self.gate_proj = linear(config.hidden_size, channels)
        self.position_bias = nn.Parameter(torch.zeros(ratio, channels))
        self.kv_norm = RMSNorm(dim, config.rms_norm_eps)
        self.storage: Storage = "full"  # how an entry is kept
        self.in_bytes = False  # whether a cache keeps that in bytes, where nothing is lost (pools.py)

    @property
    def tokens(self) -> int:
        """How many a cache must keep for the next entry: the unfinished window's, and for CSA the one's before."""
        return self.ratio * (2 if self.overlap else 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and scores [T, C] of tokens x [T, d], in fp32: DeepSeek's code casts up here."""
        return project_wide(x, self.kv_proj.weight), project_wide(x, self.gate_proj.weight)

    def entries(self, values: Tensor, scores: Tensor, windows: Windows) -> Tensor:
        """The entries [N, dim] of `windows`."""
        dtype, norm = self.kv_proj.weight.dtype, self.kv_norm
        return compress(values, scores, self.position_bias, norm.weight, windows, norm.eps, dtype, self.storage)

    def rings(self, x: Tensor, chunk: Chunk, cache: LayerCache) -> list[Tensor]:
        """Those of values and scores in `cache`, each [slots, tokens + slack, C]."""
        new = x.new_empty(0, self.position_bias.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        size = self.tokens + chunk.slack
        return [chunk.cache.ring(cache, self.prefix + part, new, size) for part in ("values", "scores")]

    def kept(self, chunk: Chunk, cache: LayerCache) -> Pool:
        """The pool in `cache`."""
        weight, rope = self.kv_proj.weight, 2 * chunk.rotation["compress"].shape[1]
        exact = self.storage == "fp4" or weight.dtype == torch.bfloat16
        how = Format(self.dim, weight.dtype, self.storage if self.in_bytes and exact else "full", rope)
        return Pool(chunk.cache.pool(cache, self.pool, how.none(weight), self.ratio), how)

    def pooling(self, values: Tensor, scores: Tensor, pool: Tensor) -> Pooling:
        """How what is complete goes to the rows [N, dim] of `pool`."""
        norm = self.kv_norm
        return Pooling(values, scores, self.position_bias, norm.weight, norm.eps, pool, self.storage)


class IndexerScorer(nn.Module):
    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        self.weights_proj = linear(config.hidden_size, config.index_n_heads)
        self.scale = config.index_head_dim**-0.5 * config.index_n_heads**-0.5

    def forward(self, x: Tensor) -> Tensor:
        return upcast(self.weights_proj(x)) * self.scale


class Indexer(Compressor):
    """The lightning indexer: a compressor of its own for keys, and queries from the shared latent (paper 2.3.1)."""

    prefix, pool = "index_", "index_keys"

    def __init__(self, config: DeepseekV4Config, ratio: int):
        super().__init__(config, config.index_head_dim, ratio, overlap=True)
        self.topk = config.index_topk
        self.heads = config.index_n_heads
        self.q_b_proj = linear(config.q_lora_rank, self.heads * self.dim)
        self.scorer = IndexerScorer(config)
        self.score_dtype: torch.dtype | None = None  # what its scores are rounded to

    def queries(self, x: Tensor, latent: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """[T, Hi, Di] and head weights [T, Hi]."""
        q = self.q_b_proj(latent).unflatten(-1, (self.heads, self.dim))
        return stored(apply_rope(q, rotation), rotation, self.storage), self.scorer(x)


class CSACompressor(Compressor):
    def __init__(self, config: DeepseekV4Config, ratio: int):
        super().__init__(config, config.head_dim, ratio, overlap=True)
        self.indexer = Indexer(config, ratio)


class GroupedLinear(nn.Linear):
    """Block-diagonal projection: [T, G, in] -> [T, G, out / G], one block of the weight [out, in] a group.

    In FP8 its weight alone is rounded: DeepSeek's code dequantizes it when a checkpoint is loaded.
    """

    precision: Literal["full", "fp8"] = "full"

    def __init__(self, size_in: int, size_out: int, groups: int):
        super().__init__(size_in, size_out, bias=False)
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:
        if self.precision == "full":
            return project_groups(input, self.weight)
        if isinstance(self.weight, StoredRounded):
            return project_groups(input, self.weight.numbers[0, 0])
        return project_groups(input, rounded_weight(self.weight))


class Attention(nn.Module):
    """One softmax over the window's rows, the visible compressed rows and a sink; MQA with K = V."""

    def __init__(self, config: DeepseekV4Config, kind: str):
        super().__init__()
        self.heads, self.dim, self.groups = config.num_attention_heads, config.head_dim, config.o_groups
        self.window, self.eps = config.sliding_window, config.rms_norm_eps
        assert config.compress_rates is not None  # transformers fills it
        self.ratio = 0 if kind == "sliding_attention" else config.compress_rates[kind]
        self.rope = "compress" if self.ratio else "main"
        width = self.heads * self.dim
        self.q_a_proj = linear(config.hidden_size, config.q_lora_rank)
        self.q_a_norm = RMSNorm(config.q_lora_rank, self.eps)
        self.q_b_proj = linear(config.q_lora_rank, width)
        self.kv_proj = linear(config.hidden_size, self.dim)
        self.kv_norm = RMSNorm(self.dim, self.eps)
        self.o_a_proj = GroupedLinear(width // self.groups, self.groups * config.o_lora_rank, self.groups)
        self.o_b_proj = linear(self.groups * config.o_lora_rank, config.hidden_size)
        self.sinks = nn.Parameter(torch.zeros(self.heads))
        self.storage: Storage = "full"  # how a row is kept
        self.compressor: Compressor | None = None
        if kind == "compressed_sparse_attention":
            self.compressor = CSACompressor(config, self.ratio)
        elif kind == "heavily_compressed_attention":
            self.compressor = Compressor(config, self.dim, self.ratio, overlap=False)

    def forward(self, x: Tensor, layout: Packed, index_loss: bool = False) -> tuple[Tensor, Tensor | None]:
        """x [T, d] of a pack -> [T, d] and, if asked for and of a CSA layer, each query's `index_kl` fp32 [T]."""
        rotation, seen = layout.rotation[self.rope], layout.seen(self.ratio)
        latent, q, rows = self._project(x, rotation)
        if self.compressor is None:
            return self._output(self._attend(q, rows, None, seen, None, rotation)[0]), None
        windows = layout.entries[self.ratio].windows
        entries = self.compressor.entries(*self.compressor(x), windows=windows)
        indexer = self.compressor.indexer if isinstance(self.compressor, CSACompressor) else None
        chosen = vectors = None
        # Where everything visible is chosen, the scores would decide nothing.
        if indexer is not None and (index_loss or seen.most > indexer.topk):
            with torch.set_grad_enabled(index_loss and torch.is_grad_enabled()):
                keys = indexer.entries(*indexer(x.detach()), windows=windows)
                q_index, weights = indexer.queries(x.detach(), latent.detach(), rotation)
            vectors = q_index, weights, keys
            chosen = select(*vectors, seen, min(indexer.topk, max(seen.most, 1)), indexer.score_dtype)
        out, lse = self._attend(q, rows, entries, seen, chosen, rotation)
        out = self._output(out)
        if not index_loss or vectors is None or chosen is None:
            return out, None
        mass = head_mass(q, rows, entries, self.sinks, seen, chosen, lse)
        return out, index_kl(index_scores(*vectors, seen, chosen), mass)

    def extend(self, x: Tensor, chunk: Chunk, cache: LayerCache) -> tuple[Tensor, Tensor | None]:
        """x [T, d], further tokens of each request -> [T, d], and what an indexer chose, if it had to: int32 [T, K].

        Updates `cache` in place. For few tokens, what has the same input is one launch."""
        rotation, seen = chunk.rotation[self.rope], chunk.seen(self.ratio)
        kinds = [] if self.compressor is None else [self.compressor]
        indexer = None
        if isinstance(self.compressor, CSACompressor):
            kinds.append(self.compressor.indexer)
            if seen.most > self.compressor.indexer.topk:  # else whatever it would choose is all
                indexer = self.compressor.indexer
        rings = [ring for kind in kinds for ring in kind.rings(x, chunk, cache)]
        layers = [layer for kind in kinds for layer in (kind.kv_proj, kind.gate_proj)]
        wanted = [Wanted(self.q_a_proj), Wanted(self.kv_proj)]
        wanted += [Wanted(layer, True, into=chunk.into(ring)) for layer, ring in zip(layers, rings, strict=True)]
        if indexer is not None:
            wanted.append(Wanted(indexer.scorer.weights_proj, scale=indexer.scorer.scale))
        latent, row, *others = linear_each(x, wanted)
        latent, rows = self._kept(latent, row, rotation, chunk, cache)
        pools = self._pools(kinds, rings, others, chunk, cache)
        q, of_index = self._queries(latent, rotation, indexer)
        chosen = None
        if indexer is not None and of_index is not None:
            topk, dtype, weights = indexer.topk, indexer.score_dtype, others[-1]
            parts = pools[1].whole(chunk, self.ratio)
            chosen = joined([select(of_index[at], weights[at], keys, own, topk, dtype) for at, keys, own in parts])
        if not pools:
            return self._output(self._attend(q, rows, None, seen, None, rotation)[0]), None
        parts = pools[0].chosen(chunk, self.ratio, chosen)
        out = [self._attend(q[at], rows, entries, own, some, rotation[at])[0] for at, entries, own, some in parts]
        return self._output(joined(out)), chosen

    def _project(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The latent [T, q_lora_rank], queries [T, H, D] and the row [T, D] that is key and value."""
        latent = self.q_a_norm(self.q_a_proj(x))
        q = norm_rope(self.q_b_proj(latent).unflatten(-1, (self.heads, self.dim)), None, rotation, self.eps)
        row = norm_rope(self.kv_proj(x), self.kv_norm.weight, rotation, self.eps)
        return latent, q, stored(row, rotation, self.storage)

    def _kept(
        self, latent: Tensor, row: Tensor, rotation: Tensor, chunk: Chunk, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        """The latent [T, q_lora_rank], normed, and the rows [R, D] in which a chunk's queries find theirs."""
        ring = chunk.cache.ring(cache, "rows", row, self.window + chunk.slack)
        into = chunk.into(ring)
        last = Norm(row, self.kv_norm.weight, rotation, self.eps, into if self.storage == "full" else None)
        latent, row = norm_each([Norm(latent, self.q_a_norm.weight, None, self.eps), last])
        if self.storage != "full":
            row = stored(row, rotation, self.storage)
            row = row if into is None else into.write(row)
        return latent, chunk.remember(ring, row, self.window - 1)

    def _pools(
        self, kinds: list[Compressor], rings: list[Tensor], new: list[Tensor], chunk: Chunk, cache: LayerCache
    ) -> list[Pool]:
        """The pool of each of a layer's compressors, with what a chunk completes: `new` values and scores of its
        tokens, or what they were written into, in turn, and their rings."""
        if not kinds:
            return []
        found = [chunk.remember(*each, kinds[0].tokens) for each in zip(rings, new, strict=False)]
        done = chunk.finished[self.ratio, kinds[0].tokens]
        pools = [kind.kept(chunk, cache) for kind in kinds]
        rows, where = [pool.rows for pool in pools], done.row
        if apart := any(pool.in_bytes for pool in pools):  # what becomes bytes is made of numbers that stand elsewhere
            where = torch.arange(done.row.numel(), device=done.row.device)
            rows = [kind.kv_proj.weight.new_empty(where.numel(), kind.dim) for kind in kinds]
        parts = zip(kinds, found[::2], found[1::2], rows, strict=True)
        compress_each([kind.pooling(*each) for kind, *each in parts], done.windows, where)
        if apart:
            for pool, made in zip(pools, rows, strict=True):
                pool.write(done.row, made)
        return pools

    def _queries(self, latent: Tensor, rotation: Tensor, indexer: Indexer | None) -> tuple[Tensor, Tensor | None]:
        """Queries [T, H, D], and an indexer's [T, Hi, Di]."""
        layers = [Wanted(self.q_b_proj)] + ([] if indexer is None else [Wanted(indexer.q_b_proj)])
        q, *index = linear_each(latent, layers)
        norms = [Norm(q.unflatten(-1, (self.heads, self.dim)), None, rotation, self.eps)]
        if indexer is None:
            return norm_each(norms)[0], None
        norms.append(Norm(index[0].unflatten(-1, (indexer.heads, indexer.dim)), None, rotation))
        q, of_index = norm_each(norms)
        return q, stored(of_index, rotation, indexer.storage)

    def _attend(
        self, q: Tensor, rows: Tensor, entries: Tensor | None, seen: Seen, chosen: Tensor | None, rotation: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        return attend(q, rows, entries, self.sinks, seen, chosen, rotation)

    def _output(self, out: Tensor) -> Tensor:
        return self.o_b_proj(self.o_a_proj(out.reshape(out.shape[0], self.groups, -1)).flatten(1))
