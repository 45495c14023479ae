"""How large a model is: parameters, counted on the meta device, and the bytes of a request's cache."""

from dataclasses import dataclass

import torch
from transformers import DeepseekV4Config

from ..kernels.cache_formats import cache_entry_bytes, index_key_bytes
from .attention import Attention, Compressor, CSACompressor
from .deepseek_v4 import DeepseekV4


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; buffers (hash tables, correction biases) are not among them."""

    main: int  # the model without its MTP block
    active: int  # of the main model, what one token meets, without the embedding table
    mtp: int  # the MTP block; embedding and head are the main model's


def parameter_counts(config: DeepseekV4Config) -> Parameters:
    """Counted from the modules themselves, without memory for their tensors. Flash: 284.33 B, active 13.3 B."""
    with torch.device("meta"):
        model = DeepseekV4(config)
    counts = {name: p.numel() for name, p in model.named_parameters()}
    mtp = sum(count for name, count in counts.items() if name.startswith("model.mtp."))
    main = sum(counts.values()) - mtp
    routed = sum(n for name, n in counts.items() if name.startswith("model.layers.") and ".mlp.experts." in name)
    chosen = routed * config.num_experts_per_tok // config.n_routed_experts
    return Parameters(main, main - counts["model.embed_tokens.weight"] - routed + chosen, mtp)


@dataclass(frozen=True)
class CacheBytes:
    """Bytes that one request keeps, of the main model (an MTP block has one more window). No page is rounded up."""

    window: int  # rows of the sliding windows: FP8 with bf16 rope channels, as all rows that attention reads
    csa: int  # compressed rows
    hca: int
    index_keys: int  # FP4
    waiting: int  # values and scores, fp32, of tokens that a compressor still needs

    @property
    def total(self) -> int:
        return self.window + self.csa + self.hca + self.index_keys + self.waiting


def cache_bytes(config: DeepseekV4Config, tokens: int) -> CacheBytes:
    """What the main model's layers keep of a request of `tokens` tokens, in V4's layouts: 584 bytes a row, 68 a key.
    Our cache keeps entries and keys so (pools.py), and window rows in the model's dtype.

    At 1,048,576 tokens 3.4 GiB for Flash, 4.9 GiB for Pro.
    """
    parts = dict.fromkeys(CacheBytes.__dataclass_fields__, 0)
    row = cache_entry_bytes(config.head_dim, config.qk_rope_head_dim)
    for attention in _described(config).model.layers.modules():
        if not isinstance(attention, Attention):
            continue
        parts["window"] += attention.window * row
        if (compressor := attention.compressor) is None:
            continue
        entries = tokens // attention.ratio
        parts["waiting"] += _waiting(compressor)
        if isinstance(compressor, CSACompressor):
            parts["csa"] += entries * row
            parts["index_keys"] += entries * index_key_bytes(compressor.indexer.dim)
            parts["waiting"] += _waiting(compressor.indexer)
        else:
            parts["hca"] += entries * row
    return CacheBytes(**parts)


def _waiting(compressor: Compressor) -> int:
    """An unfinished window's rows, and with overlap those of the window before it."""
    rows = compressor.ratio * (2 if compressor.overlap else 1)
    return rows * compressor.kv_proj.out_features * 2 * torch.float32.itemsize


def _described(config: DeepseekV4Config) -> DeepseekV4:
    with torch.device("meta"):
        return DeepseekV4(config)
