"""What training.py measures: sizes, and the model of 729 million parameters."""

from dataclasses import dataclass
from typing import Any

import torch
from floors import Ceilings
from torch import Tensor
from transformers import DeepseekV4Config

from amalgam.model.config import CSA, HCA, SWA, config_of


@dataclass(frozen=True)
class Experts:
    name: str
    experts: int
    hidden: int
    inner: int
    topk: int


@dataclass(frozen=True)
class Setting:
    ceilings: Ceilings
    flash: DeepseekV4Config  # widths of what is measured alone
    model: DeepseekV4Config  # of the whole step
    losses: int = 4096  # tokens
    experts: tuple[Experts, ...] = (
        Experts("E128 H2048 I768 K8", 128, 2048, 768, 8),
        Experts("Flash", 256, 4096, 2048, 6),
    )
    routed: int = 16_384  # tokens that go to these
    streams: tuple[int, ...] = (8_192, 65_536)
    matrices: tuple[int, int, int] = (256, 2048, 4096)
    steps: tuple[int, ...] = (4_096, 8_192, 32_768)
    documents: int = 2_048  # tokens of one, at most, in a step
    eager: tuple[int, ...] = (4_096, 8_192)  # tokens of transformers' step and layer
    layer: tuple[int, ...] = (8_192, 131_072)
    bits: tuple[int, int] = (64, 4_500)  # documents, tokens of the longest
    curve: tuple[int, int] = (200, 1_024)  # steps, tokens of each
    device: str = "cuda"

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def weight(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """A product over its last dimension keeps the spread of what it multiplies."""
        return self.random(*shape, dtype=dtype) * shape[-1] ** -0.5


def model_config() -> DeepseekV4Config:
    """729 million parameters: 12 layers, the first two with a window alone, then CSA and HCA in turn."""
    fields: dict[str, Any] = {
        "vocab_size": 32_768, "hidden_size": 1024, "moe_intermediate_size": 512, "num_hidden_layers": 12,
        "layer_types": [SWA, SWA, *[CSA, HCA] * 5], "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 9,
        "num_attention_heads": 16, "head_dim": 128, "qk_rope_head_dim": 64, "q_lora_rank": 256, "o_groups": 4,
        "o_lora_rank": 256, "sliding_window": 128, "index_n_heads": 16, "index_head_dim": 64, "index_topk": 512,
        "n_routed_experts": 32, "num_experts_per_tok": 4, "num_nextn_predict_layers": 0,
    }  # fmt: skip
    return DeepseekV4Config(**fields)


def layer_config(flash: DeepseekV4Config, experts: int = 32) -> DeepseekV4Config:
    """One layer of each kind at Flash's width, with few experts."""
    fields: dict[str, Any] = flash.to_dict() | {
        "num_hidden_layers": 3, "layer_types": [SWA, CSA, HCA], "mlp_layer_types": ["moe"] * 3,
        "n_routed_experts": experts, "num_nextn_predict_layers": 0,
    }  # fmt: skip
    return DeepseekV4Config(**fields)


def whole(ceilings: Ceilings) -> Setting:
    return Setting(ceilings, config_of("flash"), model_config())
