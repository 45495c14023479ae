"""V4's attention blocks alone: each layer adds the attention of its normed input to that input."""

from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4Config

from amalgam.model import DeepseekV4
from amalgam.model.cache import Cache
from amalgam.model.chunks import Chunk, chunk
from amalgam.model.config import CSA, HCA, SWA, config_of
from amalgam.model.layout import packed
from amalgam.model.step import step

KINDS = (SWA, CSA, HCA)


def flash_config(layers: int) -> DeepseekV4Config:
    """V4-Flash's attention in layers of all three kinds in turn; of the rest as little as there can be."""
    least = {
        "vocab_size": 16, "num_hidden_layers": layers, "layer_types": [KINDS[i % 3] for i in range(layers)],
        "mlp_layer_types": ["moe"] * layers, "n_routed_experts": 16, "num_experts_per_tok": 1,
        "moe_intermediate_size": 16, "num_nextn_predict_layers": 0, "hc_mult": 1,
    }  # fmt: skip
    fields: dict[str, Any] = config_of("flash").to_dict() | least
    return DeepseekV4Config(**fields)


@torch.no_grad()
def random_stack(config: DeepseekV4Config, dtype: torch.dtype, device: str, seed: int) -> DeepseekV4:
    """Every tensor is random; products keep the size of what they multiply."""
    with torch.device(device):
        model = DeepseekV4(config).to(device, dtype).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in parameters(model).items():
        wide = p.dim() == 2 and "position_bias" not in name
        p.normal_(0.0, p.shape[1] ** -0.5 if wide else 0.3, generator=generator)
        if name.endswith("norm.weight"):
            p.add_(1.0)
    return model


def parameters(model: DeepseekV4) -> dict[str, torch.nn.Parameter]:
    """Those of the stack, by name."""
    every = model.model.layers.named_parameters()
    return {name: p for name, p in every if ".self_attn." in name or ".input_layernorm." in name}


def _blocks(model: DeepseekV4) -> Any:
    return model.model.layers


def through(model: DeepseekV4, x: Tensor, chunk: Chunk, cache: Cache) -> Tensor:
    """Further tokens x [T, d] through the attention of every layer; updates `cache`."""
    for block, kept in zip(_blocks(model), cache.layers, strict=True):
        x = x + block.self_attn.extend(block.input_layernorm(x), chunk, kept)[0]
    cache.advance(None, chunk.lengths, chunk.most)
    return x


def train(model: DeepseekV4, x: Tensor, cu_seqlens: Tensor, index_loss: bool = False) -> tuple[Tensor, list[Tensor]]:
    """A pack x [T, d] of whole documents, cu_seqlens [B + 1], through them; and the indexers' losses, if asked for."""
    ratios, losses = {ratio for ratio, _ in model.compressors}, []
    layout = packed(cu_seqlens, model.config.sliding_window, ratios, model.frequencies())
    for block in _blocks(model):
        y, loss = block.self_attn(block.input_layernorm(x), layout, index_loss)
        x, losses = x + y, losses + [each for each in [loss] if each is not None]
    return x, losses


@torch.no_grad()
def extend(model: DeepseekV4, x: Tensor, cu_seqlens: Tensor, cache: Cache) -> Tensor:
    """Further tokens x [T, d] of the cache's B requests, cu_seqlens [B + 1]."""
    return through(model, x, chunk(cu_seqlens, None, cache, **model.places()), cache)


@torch.no_grad()
def decode(model: DeepseekV4, x: Tensor, cache: Cache) -> Tensor:
    """The next token of each request, x [B, d]."""
    return through(model, x, step(None, cache, **model.places()), cache)
