"""Low precision in the model: each value that deployment stores in FP4 or FP8 takes part as that rounded value.

Modules have an attribute `stored`, which maps a tensor to what is kept of it; here it is set.

A value on the border between two codes may turn with the last bit of fp32. On a CPU a product's last bit depends on the
batch's shape, so that with `kv: fp8` a few tokens in a hundred have log-probs that differ by up to 0.03 with the pack.
"""

from functools import partial

import torch
from torch import Tensor
from transformers import DeepseekV4Config

from ..kernels.cache_formats import ENTRY_TILE
from ..kernels.fake_quantize import fake_fp4, fake_fp8
from ..kernels.formats import FP4_TILE, round_fp4
from ..kernels.hadamard import hadamard
from ..settings import Precision
from .attention import Attention, Compressor, Indexer, as_is
from .deepseek_v4 import DeepseekV4, Experts
from .language_model import LanguageModel


def problem(config: DeepseekV4Config, precision: Precision) -> str | None:
    """Why a model of this config cannot have that precision; None where it can."""
    if precision.experts == "fp4":
        for key in ("hidden_size", "moe_intermediate_size"):
            if (size := getattr(config, key)) % FP4_TILE[1]:
                return f"{key}: {size} is no multiple of {FP4_TILE[1]}, which precision.experts: fp4 needs"
    if precision.indexer == "fp4" and (size := config.index_head_dim) & (size - 1):
        return f"index_head_dim: {size} is no power of two, which precision.indexer: fp4 needs"
    return None


def set_precision(model: DeepseekV4, precision: Precision) -> None:
    """From now on `model` computes with `precision`; ValueError where its config does not allow that."""
    if wrong := problem(model.config, precision):
        raise ValueError(wrong)
    experts = fake_fp4 if precision.experts == "fp4" else as_is
    index = _index_vectors if precision.indexer == "fp4" else as_is
    rows = partial(_rows, rope_dim=model.config.qk_rope_head_dim) if precision.kv == "fp8" else as_is
    for module in model.modules():
        if isinstance(module, Experts):
            module.stored = experts
        elif isinstance(module, Indexer):
            module.stored = index
            module.score_dtype = torch.bfloat16 if precision.indexer == "fp4" else None
        elif isinstance(module, Attention | Compressor):
            module.stored = rows
    model.precision = precision


@torch.no_grad()
def round_experts(model: LanguageModel) -> None:
    """For a model that only runs forward: its experts' weights become the FP4 values, so that no step rounds them.

    Nothing to do at full precision. After new weights were copied into the model it has to be called again.
    """
    if model.precision.experts == "fp4":
        for module in model.modules():
            if isinstance(module, Experts):
                for weight in module.parameters():
                    weight.copy_(round_fp4(weight))
                module.stored = as_is


def _index_vectors(x: Tensor) -> Tensor:
    return fake_fp4(hadamard(x))


def _rows(x: Tensor, rope_dim: int) -> Tensor:
    plain, rope = x.split([x.shape[-1] - rope_dim, rope_dim], dim=-1)
    return torch.cat([fake_fp8(plain, ENTRY_TILE), rope], dim=-1)
