"""Attention of DeepSeek-V4: sliding window, compressed sparse (CSA) and heavily compressed (HCA), paper 2.3.

Module and parameter names are transformers'. Shapes: T tokens, H heads, D head dimension, C a compressor's channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config

from ..kernels.attention import attend, head_mass
from ..kernels.compress import pool
from ..kernels.indexer import highest, index_kl, index_scores, select
from ..kernels.norm import rms_norm
from ..kernels.project import filled, project
from ..kernels.rope import apply_rope
from ..kernels.upcast import upcast
from .cache import LayerCache, kept
from .layout import Chunk, Entries, Finished, Packed


def as_is(x: Tensor) -> Tensor:
    """What is kept of a tensor at full precision: all of it (model/precision.py has the other ways)."""
    return x


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return project(input, self.weight)


def linear(size_in: int, size_out: int) -> Linear:
    return Linear(size_in, size_out, bias=False)


class Compressor(nn.Module):
    """Turns each complete window of `ratio` tokens into one entry of `dim` channels (paper 2.3.1, 2.3.2).

    With `overlap` (CSA) an entry also pools the window before it: a token has 2 `dim` channels, the first half serves
    the next window's entry and the second half its own.
    """

    def __init__(self, config: DeepseekV4Config, dim: int, ratio: int, overlap: bool):
        super().__init__()
        self.ratio, self.dim, self.overlap = ratio, dim, overlap
        channels = dim * (2 if overlap else 1)
        self.kv_proj = linear(config.hidden_size, channels)
        self.gate_proj = linear(config.hidden_size, channels)
        self.position_bias = nn.Parameter(torch.zeros(ratio, channels))
        self.kv_norm = RMSNorm(dim, config.rms_norm_eps)
        self.stored: Callable[[Tensor], Tensor] = as_is  # what is kept of an entry

    @property
    def tokens(self) -> int:
        """How many a cache must keep for the next entry: the unfinished window's, and for CSA the one's before."""
        return self.ratio * (2 if self.overlap else 1)

    def forward(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Values and scores [T, C] of tokens x [T, d] at `position` [T], in fp32: DeepSeek's code casts up here."""
        x = upcast(x)
        scores = project(x, upcast(self.gate_proj.weight)) + self.position_bias[position % self.ratio]
        return project(x, upcast(self.kv_proj.weight)), scores

    def entries(self, values: Tensor, scores: Tensor, layout: Entries) -> Tensor:
        """All entries [N, dim] of a pack."""
        before = (layout.tokens - self.ratio).clamp(min=0)
        previous = values[before], scores[before].masked_fill(layout.first.view(-1, 1, 1), float("-inf"))
        return self._pooled((values[layout.tokens], scores[layout.tokens]), previous, layout.rotation)

    def _pooled(self, own: tuple[Tensor, Tensor], previous: tuple[Tensor, Tensor], rotation: Tensor) -> Tensor:
        values, scores = own
        if self.overlap:
            half = self.dim
            values = torch.cat([previous[0][..., :half], values[..., half:]], dim=1)
            scores = torch.cat([previous[1][..., :half], scores[..., half:]], dim=1)
        return self.stored(apply_rope(self.kv_norm(self._pool(values, scores)), rotation))

    def _pool(self, values: Tensor, scores: Tensor) -> Tensor:
        return pool(values, scores).to(self.kv_proj.weight.dtype)

    def extend(self, x: Tensor, chunk: Chunk, cache: LayerCache, prefix: str, entries: Tensor) -> Finished:
        """Adds a chunk's tokens to `cache`, and to `entries` [B, room, dim] those that are complete with it."""
        done = chunk.finished[self.ratio, self.tokens]
        sources = []
        for name, new in zip(("values", "scores"), self(x, chunk.position), strict=True):
            ring = kept(cache, prefix + name, new, chunk.past.numel(), self.tokens + chunk.slack)
            sources.append(chunk.remember(ring, new))
        if done.number.numel():
            values, scores = sources
            absent = (done.number == 0).view(-1, 1, 1)
            previous = values[done.previous], scores[done.previous].masked_fill(absent, float("-inf"))
            pooled = self._pooled((values[done.own], scores[done.own]), previous, done.rotation)
            entries[done.request, done.number] = pooled
        return done


class IndexerScorer(nn.Module):
    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        self.weights_proj = linear(config.hidden_size, config.index_n_heads)
        self.scale = config.index_head_dim**-0.5 * config.index_n_heads**-0.5

    def forward(self, x: Tensor) -> Tensor:
        return upcast(self.weights_proj(x)) * self.scale


class Indexer(Compressor):
    """The lightning indexer: a compressor of its own for keys, and queries from the shared latent (paper 2.3.1)."""

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
        return self.stored(apply_rope(q, rotation)), self.scorer(x)


class CSACompressor(Compressor):
    def __init__(self, config: DeepseekV4Config, ratio: int):
        super().__init__(config, config.head_dim, ratio, overlap=True)
        self.indexer = Indexer(config, ratio)


class GroupedLinear(nn.Linear):
    """Block-diagonal projection: [T, G, in] -> [T, G, out / G], one block of the weight [out, in] a group."""

    def __init__(self, size_in: int, size_out: int, groups: int):
        super().__init__(size_in, size_out, bias=False)
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:
        blocks = self.weight.unflatten(0, (self.groups, -1))
        out = torch.bmm(filled(input).transpose(0, 1), blocks.transpose(1, 2)).transpose(0, 1)
        return out[: input.shape[0]]


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
        self.stored: Callable[[Tensor], Tensor] = as_is  # what is kept of a row
        self.compressor: Compressor | None = None
        if kind == "compressed_sparse_attention":
            self.compressor = CSACompressor(config, self.ratio)
        elif kind == "heavily_compressed_attention":
            self.compressor = Compressor(config, self.dim, self.ratio, overlap=False)

    def forward(self, x: Tensor, layout: Packed, index_loss: bool = False) -> tuple[Tensor, Tensor | None]:
        """x [T, d] of a pack -> [T, d] and, if asked for and of a CSA layer, each query's `index_kl` fp32 [T]."""
        rotation = layout.rotation[self.rope]
        latent, q, kv = self._project(x, rotation)
        q, rows, visible = layout.in_blocks(q), layout.window_rows(kv), layout.visible
        chosen = logits = None
        if self.compressor is not None:
            entries = layout.entries[self.ratio]
            values, scores = self.compressor(x, layout.position)
            compressed = self.compressor.entries(values, scores, entries)
            chosen, logits = self._chosen(x, latent, layout, entries, index_loss)
            rows = torch.cat([rows, compressed[entries.block]], dim=1) if entries.block.numel() else rows
            visible = torch.cat([visible, chosen], dim=2)
        out = self._output(self._attend(q, rows, visible).flatten(0, 1)[: x.shape[0]], rotation)
        if chosen is None or logits is None:
            return out, None
        mass = head_mass(q, rows, visible, self.sinks)[..., layout.visible.shape[2] :]
        return out, index_kl(logits, chosen, mass).flatten()[: x.shape[0]]

    def extend(self, x: Tensor, chunk: Chunk, cache: LayerCache) -> Tensor:
        """x [T, d], further tokens of each request -> [T, d]; updates `cache` in place."""
        rotation = chunk.rotation[self.rope]
        latent, q, kv = self._project(x, rotation)
        slots = self.window + chunk.slack
        room = chunk.room // self.ratio if self.ratio else 0
        kept_rows = kept(cache, "rows", kv, chunk.past.numel(), slots + room)
        ring, entries = kept_rows.split([slots, room], dim=1)
        rows, visible = chunk.remember(ring, kv)[chunk.rows], chunk.visible
        if self.compressor is not None:
            done = self.compressor.extend(x, chunk, cache, "", entries)
            rows = torch.cat([rows, chunk.of_blocks(entries, done.visible.shape[2])], dim=1)
            visible = torch.cat([visible, self._chosen_in_cache(x, latent, chunk, done, cache)], dim=2)
        out = self._attend(chunk.in_blocks(q), rows, visible)
        return self._output(chunk.from_blocks(out), rotation)

    def _project(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The latent [T, q_lora_rank], queries [T, H, D] and the row [T, D] that is key and value."""
        latent = self.q_a_norm(self.q_a_proj(x))
        q = rms_norm(self.q_b_proj(latent).unflatten(-1, (self.heads, self.dim)), None, self.eps)
        return latent, apply_rope(q, rotation), self.stored(apply_rope(self.kv_norm(self.kv_proj(x)), rotation))

    def _attend(self, q: Tensor, rows: Tensor, visible: Tensor) -> Tensor:
        return attend(q, rows, visible, self.sinks)

    def _output(self, out: Tensor, rotation: Tensor) -> Tensor:
        out = apply_rope(out, rotation, inverse=True)
        return self.o_b_proj(self.o_a_proj(out.reshape(out.shape[0], self.groups, -1)).flatten(1))

    def _chosen(
        self, x: Tensor, latent: Tensor, layout: Packed, entries: Entries, index_loss: bool
    ) -> tuple[Tensor, Tensor | None]:
        """bool [Q, W, E]: all visible entries (HCA), or the indexer's choice among them (CSA).

        Of a CSA layer with `index_loss` also the scores fp32 [Q, W, E], whose gradient is the indexer's alone.
        """
        if not isinstance(self.compressor, CSACompressor):
            return entries.visible, None
        indexer = self.compressor.indexer
        if index_loss:
            scores = index_scores(*self._index_vectors(indexer, x.detach(), latent.detach(), layout, entries))
            return highest(scores, entries.visible, indexer.topk, indexer.score_dtype), scores
        if entries.most <= indexer.topk:
            return entries.visible, None  # where everything visible is chosen, the scores would decide nothing
        with torch.no_grad():
            vectors = self._index_vectors(indexer, x, latent, layout, entries)
            return select(*vectors, entries.visible, indexer.topk, indexer.score_dtype), None

    def _index_vectors(
        self, indexer: Indexer, x: Tensor, latent: Tensor, layout: Packed, entries: Entries
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [Q, W, Hi, Di], head weights [Q, W, Hi] and keys [Q, E, Di]."""
        values, scores = indexer(x, layout.position)
        keys = indexer.entries(values, scores, entries)
        q, weights = indexer.queries(x, latent, layout.rotation[self.rope])
        return layout.in_blocks(q), layout.in_blocks(weights), keys[entries.block]

    @torch.no_grad()
    def _chosen_in_cache(self, x: Tensor, latent: Tensor, chunk: Chunk, done: Finished, cache: LayerCache) -> Tensor:
        """bool [Q, M, E], as `_chosen`, for a chunk."""
        if not isinstance(self.compressor, CSACompressor):
            return done.visible
        indexer, count = self.compressor.indexer, done.visible.shape[2]
        keys = kept(cache, "index_keys", x.new_zeros(0, indexer.dim), chunk.past.numel(), chunk.room // self.ratio)
        indexer.extend(x, chunk, cache, "index_", keys)
        if count <= indexer.topk:
            return done.visible
        q, weights = indexer.queries(x, latent, chunk.rotation[self.rope])
        q, weights = chunk.in_blocks(q), chunk.in_blocks(weights)
        return select(q, weights, chunk.of_blocks(keys, count), done.visible, indexer.topk, indexer.score_dtype)
