"""Low precision in the model: each value that deployment stores in FP4 or FP8 takes part as that rounded value.

Modules say how they keep a value: by `storage`, or, of experts' weights, by a function `stored`; here these are set.

A value on the border between two codes may turn with the last bit of fp32. On a CPU a product's last bit depends on the
batch's shape, so that with `kv: fp8` a few tokens in a hundred have log-probs that differ by up to 0.03 with the pack.
"""

import torch
from transformers import DeepseekV4Config

from ..kernels.fake_quantize import fake_fp4
from ..kernels.formats import FP4_TILE, round_fp4
from ..settings import Precision
from .attention import Attention, Compressor, Indexer
from .deepseek_v4 import DeepseekV4, Experts, as_is
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
    for module in model.modules():
        if isinstance(module, Experts):
            module.stored = experts
        elif isinstance(module, Indexer):
            module.storage = "fp4" if precision.indexer == "fp4" else "full"
            module.score_dtype = torch.bfloat16 if precision.indexer == "fp4" else None
        elif isinstance(module, Attention | Compressor):
            module.storage = "fp8" if precision.kv == "fp8" else "full"
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
