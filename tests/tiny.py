"""Tiny random models: every kind of layer, every tensor random, and the tiny preset's tokenizer beside them."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import DeepseekV4Config

from amalgam.model import DeepseekV4, initialize, save
from amalgam.model.config import PRESETS
from amalgam.rl.trajectory import Request, SamplingParams

SWA, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
# What the Triton kernels take.
FUSED = {
    "head_dim": 16, "index_head_dim": 16, "index_n_heads": 16, "q_lora_rank": 16, "o_lora_rank": 16,
    "n_routed_experts": 16,
}  # fmt: skip
END = 1  # the end token's id


def config(**changes) -> DeepseekV4Config:
    """30,000 parameters at the preset tokenizer's vocabulary."""
    fields = {
        "vocab_size": 512, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 3,
        "num_attention_heads": 2, "head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 16, "o_groups": 2,
        "o_lora_rank": 8, "sliding_window": 6, "layer_types": [SWA, CSA, HCA], "compress_rates": {CSA: 4, HCA: 7},
        "index_n_heads": 8, "index_head_dim": 8, "index_topk": 3, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "mlp_layer_types": ["hash_moe", "moe", "moe"], "hc_mult": 2, "hc_sinkhorn_iters": 3,
        "num_nextn_predict_layers": 0, "max_position_embeddings": 4096, "initializer_range": 0.15,
        "bos_token_id": 0, "eos_token_id": END,
    }  # fmt: skip
    return DeepseekV4Config(**(fields | changes))


@torch.no_grad()
def model(seed: int, **changes) -> DeepseekV4:
    """Biases, sinks and norms are random too. The end token's logits vary more, so that some responses end."""
    made = initialize(config(**changes), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in itertools.chain(made.named_parameters(), made.named_buffers()):
        if (tensor.dim() == 1 or "position_bias" in name) and "frequencies" not in name:
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    made.lm_head.weight[END] *= 2
    made.origin = PRESETS / "tiny"
    return made


def checkpoint(folder: Path, seed: int, **changes) -> Path:
    save(model(seed, **changes), folder)
    return folder


def asked(requests: list[Request], **params) -> list[Request]:
    """The same, to be sampled so."""
    return [replace(request, params=SamplingParams(**params)) for request in requests]


def requests(groups: int, members: int, vocabulary: int = 512, seed: int = 0) -> list[Request]:
    """Ragged prompts of 1 to 29 tokens, the shortest first; ids are neither small nor in a row."""
    rng = np.random.default_rng(seed)
    lengths = [1, *rng.integers(2, 30, groups - 1)]
    prompts = [rng.integers(2, vocabulary, n).astype(np.int32) for n in lengths]
    return [Request(7 * (g * members + i) + 2**33, g, prompts[g]) for g in range(groups) for i in range(members)]
