"""Every tensor of a DeepSeek-V4 checkpoint: its official name and transformers' name for it, its shape, its kind.

Both namings hold the same numbers. transformers stacks a layer's experts: `gate_up_proj` [E, 2I, d] is w1 then w3 of
each expert, `down_proj` [E, d, I] is w2. A quantized matrix has a tensor of scales beside it: `X.scale` for the
official `X.weight`; to transformers' names `_scale_inv` is appended, as transformers does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from transformers import DeepseekV4Config

from .config import CSA, HCA, SWA

# How V4 stores a tensor (config.json and the published files): BF16; norms, BF16 or FP32; FP32; int64; FP8; FP4 or FP8.
Kind = Literal["wide", "norm", "fp32", "ids", "dense", "expert"]
Row = tuple[str, str, Kind, tuple[int, ...]]  # official name, transformers' name, kind, shape


@dataclass(frozen=True, slots=True)
class Spec:
    """One official tensor. With transformers' names it is the `part`th of the `parts` equal pieces of `stacked`."""

    name: str
    stacked: str
    kind: Kind
    shape: tuple[int, ...]  # of the numbers, [out, in]
    experts: int = 0  # E if transformers stacks it, else 0
    part: int = 0
    parts: int = 1

    @property
    def scale(self) -> str:
        """The official name of its scales."""
        return self.name.removesuffix("weight") + "scale"

    @property
    def stacked_scale(self) -> str:
        return self.stacked + "_scale_inv"

    def stored_shape(self, dtype: str) -> tuple[int, ...]:
        """FP4 (I8) holds two numbers in a byte."""
        return (self.shape[0], self.shape[1] // 2) if dtype == "I8" else self.shape

    def scale_shape(self, dtype: str) -> tuple[int, int]:
        """One for 32 columns of a row of FP4, or for a tile of 128 x 128 of FP8."""
        rows, columns = self.shape
        return (rows, columns // 32) if dtype == "I8" else (-(-rows // 128), -(-columns // 128))

    def stacked_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the transformers tensor whose pieces have `shape`."""
        return (self.experts, self.parts // self.experts * shape[0], shape[1]) if self.experts else shape


def specs(config: DeepseekV4Config) -> Iterator[Spec]:
    """All tensors that a checkpoint of this model may hold, the MTP block's (`mtp.`) too; scales are not listed."""
    c = config
    d, vocabulary = c.hidden_size, c.vocab_size
    layer_types, mlp_types = c.layer_types or [], c.mlp_layer_types or []
    yield Spec("embed.weight", "model.embed_tokens.weight", "wide", (vocabulary, d))
    for i in range(c.num_hidden_layers):
        rows = [*_attention(c, layer_types[i]), *_block(c), _router(c, mlp_types[i] == "hash_moe")]
        yield from _layer(c, f"layers.{i}.", f"model.layers.{i}.", rows)
    for i in range(c.num_nextn_predict_layers):
        rows = [*_attention(c, SWA), *_block(c), _router(c, False), *_head(c), *_mtp(c)]
        yield from _layer(c, f"mtp.{i}.", f"model.mtp.{i}.", rows)
    for name, theirs, kind, shape in _head(c):
        yield Spec(name, "model." + theirs, kind, shape)
    yield Spec("head.weight", "lm_head.weight", "wide", (vocabulary, d))


def other_names(spec: Spec) -> list[str]:
    """Further names that a tensor is read under: those that transformers' own `save_pretrained` gives it.

    A model made in memory keeps most official names, with `model.` before them; one that was loaded from transformers'
    names keeps those. Either way a "kv_norm" loses its "kv_".
    """
    official = "model." + spec.name
    names = (official, official.replace(".attn.kv_norm.", ".attn.norm."), spec.stacked.replace(".kv_norm.", ".norm."))
    return [name for name in names if name != spec.stacked]


def _layer(c: DeepseekV4Config, official: str, theirs: str, rows: list[Row]) -> Iterator[Spec]:
    for name, other, kind, shape in rows:
        yield Spec(official + name, theirs + other, kind, shape)
    d, inner, count = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts
    for e in range(count):
        expert, stack = f"{official}ffn.experts.{e}.", f"{theirs}mlp.experts."
        yield Spec(f"{expert}w1.weight", f"{stack}gate_up_proj", "expert", (inner, d), count, 2 * e, 2 * count)
        yield Spec(f"{expert}w2.weight", f"{stack}down_proj", "expert", (d, inner), count, e, count)
        yield Spec(f"{expert}w3.weight", f"{stack}gate_up_proj", "expert", (inner, d), count, 2 * e + 1, 2 * count)


def _attention(c: DeepseekV4Config, layer_type: str) -> Iterator[Row]:
    d, heads, dim, latent = c.hidden_size, c.num_attention_heads, c.head_dim, c.q_lora_rank
    groups, inner, rates = c.o_groups, c.o_lora_rank, c.compress_rates or {}
    yield "attn.wq_a.weight", "self_attn.q_a_proj.weight", "dense", (latent, d)
    yield "attn.q_norm.weight", "self_attn.q_a_norm.weight", "norm", (latent,)
    yield "attn.wq_b.weight", "self_attn.q_b_proj.weight", "dense", (heads * dim, latent)
    yield "attn.wkv.weight", "self_attn.kv_proj.weight", "dense", (dim, d)
    yield "attn.kv_norm.weight", "self_attn.kv_norm.weight", "norm", (dim,)
    yield "attn.wo_a.weight", "self_attn.o_a_proj.weight", "dense", (groups * inner, heads * dim // groups)
    yield "attn.wo_b.weight", "self_attn.o_b_proj.weight", "dense", (d, groups * inner)
    yield "attn.attn_sink", "self_attn.sinks", "fp32", (heads,)
    if layer_type in (CSA, HCA):
        ratio, overlap = rates[layer_type], layer_type == CSA
        yield from _compressor("attn.compressor.", "self_attn.compressor.", d, dim, ratio, overlap)
    if layer_type == CSA:
        heads, dim, theirs = c.index_n_heads, c.index_head_dim, "self_attn.compressor.indexer."
        yield "attn.indexer.wq_b.weight", theirs + "q_b_proj.weight", "dense", (heads * dim, latent)
        yield "attn.indexer.weights_proj.weight", theirs + "scorer.weights_proj.weight", "wide", (heads, d)
        yield from _compressor("attn.indexer.compressor.", theirs, d, dim, rates[CSA], overlap=True)


def _compressor(official: str, theirs: str, d: int, dim: int, ratio: int, overlap: bool) -> Iterator[Row]:
    channels = dim * (2 if overlap else 1)
    yield official + "wkv.weight", theirs + "kv_proj.weight", "wide", (channels, d)
    yield official + "wgate.weight", theirs + "gate_proj.weight", "wide", (channels, d)
    yield official + "ape", theirs + "position_bias", "fp32", (ratio, channels)
    yield official + "norm.weight", theirs + "kv_norm.weight", "norm", (dim,)


def _block(c: DeepseekV4Config) -> Iterator[Row]:
    """Norms, hyper-connections and the shared expert."""
    d, inner, n = c.hidden_size, c.moe_intermediate_size, c.hc_mult
    mixes = (2 + n) * n
    yield "attn_norm.weight", "input_layernorm.weight", "norm", (d,)
    yield "ffn_norm.weight", "post_attention_layernorm.weight", "norm", (d,)
    for site in ("attn", "ffn"):
        yield f"hc_{site}_fn", f"{site}_hc.fn", "fp32", (mixes, n * d)
        yield f"hc_{site}_base", f"{site}_hc.base", "fp32", (mixes,)
        yield f"hc_{site}_scale", f"{site}_hc.scale", "fp32", (3,)
    for name, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        shape = (d, inner) if name == "w2" else (inner, d)
        yield f"ffn.shared_experts.{name}.weight", f"mlp.shared_experts.{theirs}.weight", "dense", shape
    yield "ffn.gate.weight", "mlp.gate.weight", "wide", (c.n_routed_experts, d)


def _router(c: DeepseekV4Config, hashed: bool) -> Row:
    if hashed:
        return "ffn.gate.tid2eid", "mlp.gate.tid2eid", "ids", (c.vocab_size, c.num_experts_per_tok)
    return "ffn.gate.bias", "mlp.gate.e_score_correction_bias", "fp32", (c.n_routed_experts,)


def _head(c: DeepseekV4Config) -> Iterator[Row]:
    """The final norm and the collapse of the streams, of the model and of an MTP block."""
    n, d = c.hc_mult, c.hidden_size
    yield "norm.weight", "norm.weight", "norm", (d,)
    yield "hc_head_fn", "hc_head.hc_fn", "fp32", (n, n * d)
    yield "hc_head_base", "hc_head.hc_base", "fp32", (n,)
    yield "hc_head_scale", "hc_head.hc_scale", "fp32", (1,)


def _mtp(c: DeepseekV4Config) -> Iterator[Row]:
    d = c.hidden_size
    for name in ("e_proj", "h_proj"):
        yield f"{name}.weight", f"{name}.weight", "dense", (d, d)
    for name in ("enorm", "hnorm"):
        yield f"{name}.weight", f"{name}.weight", "norm", (d,)
