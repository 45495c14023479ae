"""Attention of DeepSeek-V4: sliding window, compressed sparse (CSA) and heavily compressed (HCA), paper 2.3.

Module and parameter names are transformers'. Shapes: T tokens, H heads, D head dimension, C a compressor's channels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV4Config

from ..kernels.attention import attend
from ..kernels.compress import pool
from ..kernels.indexer import select
from ..kernels.norm import rms_norm
from ..kernels.rope import apply_rope
from .cache import LayerCache, per_request, ring
from .layout import Entries, Finished, Packed, Step


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


def linear(size_in: int, size_out: int) -> nn.Linear:
    return nn.Linear(size_in, size_out, bias=False)


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
    def slots(self) -> int:
        """Tokens that decoding must keep: the unfinished window, and for CSA the one before."""
        return self.ratio * (2 if self.overlap else 1)

    def forward(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Values and scores [T, C] of tokens x [T, d] at `position` [T], in fp32: DeepSeek's code casts up here."""
        x = x.float()
        scores = F.linear(x, self.gate_proj.weight.float()) + self.position_bias[position % self.ratio]
        return F.linear(x, self.kv_proj.weight.float()), scores

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

    def remember(self, values: Tensor, scores: Tensor, layout: Packed, cache: LayerCache, prefix: str) -> None:
        cache[prefix + "values"] = ring(values, layout, self.slots, 0.0)
        cache[prefix + "scores"] = ring(scores, layout, self.slots, float("-inf"))

    def decode(self, x: Tensor, step: Step, cache: LayerCache, prefix: str, entries: Tensor) -> None:
        """Adds one token of each request, and to `entries` [B, room, dim] the entries that are complete with it."""
        values, scores = self(x, step.position)
        kept_values, kept_scores = cache[prefix + "values"], cache[prefix + "scores"]
        requests = torch.arange(x.shape[0], device=x.device)
        slot = step.position % self.slots
        kept_values[requests, slot] = values
        kept_scores[requests, slot] = scores
        done = step.finished[self.ratio]
        if done.rows.numel():
            window = torch.arange(self.ratio, device=x.device)
            own = (done.number * self.ratio).unsqueeze(1) % self.slots + window
            other = (own + self.ratio) % self.slots
            rows = done.rows.unsqueeze(1)
            pooled = self._pooled(
                (kept_values[rows, own], kept_scores[rows, own]),
                (kept_values[rows, other], kept_scores[rows, other]),
                done.rotation,
            )
            entries[done.rows, done.number] = pooled


class IndexerScorer(nn.Module):
    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        self.weights_proj = linear(config.hidden_size, config.index_n_heads)
        self.scale = config.index_head_dim**-0.5 * config.index_n_heads**-0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.weights_proj(x).float() * self.scale


class Indexer(Compressor):
    """The lightning indexer: a compressor of its own for keys, and queries from the shared latent (paper 2.3.1)."""

    def __init__(self, config: DeepseekV4Config, ratio: int):
        super().__init__(config, config.index_head_dim, ratio, overlap=True)
        self.topk = config.index_topk
        self.heads = config.index_n_heads
        self.q_b_proj = linear(config.q_lora_rank, self.heads * self.dim)
        self.scorer = IndexerScorer(config)
        self.score_dtype = torch.float32

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
        return torch.bmm(input.transpose(0, 1), blocks.transpose(1, 2)).transpose(0, 1)


class Attention(nn.Module):
    """One softmax over the window's rows, the visible compressed rows and a sink; MQA with K = V."""

    def __init__(self, config: DeepseekV4Config, layer: int):
        super().__init__()
        self.heads, self.dim, self.groups = config.num_attention_heads, config.head_dim, config.o_groups
        self.window, self.eps = config.sliding_window, config.rms_norm_eps
        assert config.layer_types is not None and config.compress_rates is not None  # transformers fills them
        kind = config.layer_types[layer]
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

    def forward(self, x: Tensor, layout: Packed, cache: LayerCache | None, room: int) -> Tensor:
        """x [T, d] of a pack -> [T, d]; fills `cache` for B requests, with room for `room` tokens each, if given."""
        rotation = layout.rotation[self.rope]
        latent, q, kv = self._project(x, rotation)
        rows, visible = layout.window_rows(kv), layout.visible
        if cache is not None:
            cache["rows"] = ring(kv, layout, self.window, 0.0)
        if self.compressor is not None:
            entries = layout.entries[self.ratio]
            values, scores = self.compressor(x, layout.position)
            compressed = self.compressor.entries(values, scores, entries)
            chosen = self._chosen(x, latent, layout, entries, cache, room)
            rows = torch.cat([rows, compressed[entries.block]], dim=1) if entries.block.numel() else rows
            visible = torch.cat([visible, chosen], dim=2)
            if cache is not None:
                self.compressor.remember(values, scores, layout, cache, "")
                own = per_request(compressed, entries.start, room // self.ratio)
                cache["rows"] = torch.cat([cache["rows"], own], dim=1)
        out = self._attend(layout.in_blocks(q), rows, visible)
        return self._output(out.flatten(0, 1)[: x.shape[0]], rotation)

    def decode(self, x: Tensor, step: Step, cache: LayerCache) -> Tensor:
        """x [B, d], one token of each request -> [B, d]; updates `cache` in place."""
        rotation = step.rotation[self.rope]
        latent, q, kv = self._project(x, rotation)
        rows, visible = cache["rows"], step.window
        rows[torch.arange(x.shape[0], device=x.device), step.position % self.window] = kv
        if self.compressor is not None:
            done = step.finished[self.ratio]
            self.compressor.decode(x, step, cache, "", rows[:, self.window :])
            chosen = self._chosen_in_cache(x, latent, rotation, step, done, cache)
            visible = torch.cat([visible, chosen], dim=1)
        rows = rows[:, : visible.shape[1]]
        out = self._attend(q.unsqueeze(1), rows, visible.unsqueeze(1))
        return self._output(out.squeeze(1), rotation)

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

    @torch.no_grad()
    def _chosen(
        self, x: Tensor, latent: Tensor, layout: Packed, entries: Entries, cache: LayerCache | None, room: int
    ) -> Tensor:
        """bool [Q, W, E]: all visible entries (HCA), or the indexer's choice among them (CSA)."""
        if not isinstance(self.compressor, CSACompressor):
            return entries.visible
        indexer = self.compressor.indexer
        if cache is None and entries.most <= indexer.topk:
            return entries.visible  # everything visible is chosen: the scores would decide nothing
        values, scores = indexer(x, layout.position)
        keys = indexer.entries(values, scores, entries)
        if cache is not None:
            indexer.remember(values, scores, layout, cache, "index_")
            cache["index_keys"] = per_request(keys, entries.start, room // self.ratio)
        if entries.most <= indexer.topk:
            return entries.visible
        q, weights = indexer.queries(x, latent, layout.rotation[self.rope])
        q, weights = layout.in_blocks(q), layout.in_blocks(weights)
        return select(q, weights, keys[entries.block], entries.visible, indexer.topk, indexer.score_dtype)

    @torch.no_grad()
    def _chosen_in_cache(
        self, x: Tensor, latent: Tensor, rotation: Tensor, step: Step, done: Finished, cache: LayerCache
    ) -> Tensor:
        """bool [B, E], as `_chosen`, for one token of each request."""
        if not isinstance(self.compressor, CSACompressor):
            return done.visible
        indexer = self.compressor.indexer
        indexer.decode(x, step, cache, "index_", cache["index_keys"])
        count = done.visible.shape[1]
        if count <= indexer.topk:
            return done.visible
        q, weights = indexer.queries(x, latent, rotation)
        keys, visible = cache["index_keys"][:, :count], done.visible.unsqueeze(1)
        q, weights = q.unsqueeze(1), weights.unsqueeze(1)
        return select(q, weights, keys, visible, indexer.topk, indexer.score_dtype).squeeze(1)
