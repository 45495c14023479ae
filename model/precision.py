"""Low precision in the model: what is rounded as deployment stores it, and which products are of FP8.

Modules say how they compute by `precision`, or how they keep a value by `storage`; here these are set.

A value on the border between two codes may turn with the last bit of fp32. On a CPU a product's last bit depends on the
batch's shape, so that in low precision a few tokens in a hundred have log-probs that differ by up to 0.03 with it.
"""

import torch
from torch import nn
from transformers import DeepseekV4Config

from ..kernels.dispatch import wants_triton
from ..kernels.formats import FP4_TILE
from ..settings import Precision
from .attention import Attention, Compressor, GroupedLinear, Indexer, Linear
from .deepseek_v4 import DeepseekV4, Experts
from .language_model import LanguageModel
from .stored import Stored, StoredFp4, StoredFp8, StoredRounded

# What V4's checkpoints hold in FP8 (`names.Kind` "dense"), by the names' ends: a compressor's `kv_proj` stays wide.
_LINEAR = ("q_a_proj", "q_b_proj", "self_attn.kv_proj", "o_a_proj", "o_b_proj", ".e_proj", ".h_proj")
_LINEAR += tuple(f"shared_experts.{name}_proj" for name in ("gate", "up", "down"))


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
    """From now on `model` computes with `precision`; ValueError where its config or its device does not allow that, or
    where it does not hold its weights in full any more."""
    if wrong := problem(model.config, precision):
        raise ValueError(wrong)
    if stored_weights(model):
        raise ValueError("the model's weights are stored in low precision; load it again")
    if (precision.experts, precision.linear) != ("full", "full") and wants_triton(model.lm_head.weight.device):
        from ..kernels.fused.limits import check_fp8

        check_fp8(model.lm_head.weight.device)
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            module.precision = precision.experts
        elif isinstance(module, Linear | GroupedLinear):
            module.precision = precision.linear if name.endswith(_LINEAR) else "full"
        elif isinstance(module, Indexer):
            module.storage = "fp4" if precision.indexer == "fp4" else "full"
            module.score_dtype = torch.bfloat16 if precision.indexer == "fp4" else None
        elif isinstance(module, Attention | Compressor):
            module.storage = "fp8" if precision.kv == "fp8" else "full"
    model.precision = precision


def store_weights(model: LanguageModel) -> None:
    """For a model that only runs forward: of each weight in low precision, what deployment stores takes its place.

    The rounding is of the weight's own dtype: a model that was trained in fp32 has to be in fp32 here, and may be cast
    after. Nothing to do at full precision.
    """
    kinds = {"fp8": StoredFp8, "fp4": StoredFp4}
    for module in list(model.modules()):
        if isinstance(module, Experts) and module.precision != "full":
            _replace(module, "gate_up_proj", kinds[module.precision], halves=2)
            _replace(module, "down_proj", kinds[module.precision])
        elif isinstance(module, Linear) and module.precision == "fp8":
            _replace(module, "weight", StoredFp8)
        elif isinstance(module, GroupedLinear) and module.precision == "fp8":
            _replace(module, "weight", StoredRounded)
    if stored_weights(model):
        model.requires_grad_(False)


def stored_weights(model: nn.Module) -> dict[str, Stored]:
    """By their masters' names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Stored)}


def _replace(module: nn.Module, name: str, kind: type[Stored], halves: int = 1) -> None:
    master = getattr(module, name)
    if isinstance(master, nn.Parameter):
        delattr(module, name)
        module.add_module(name, kind(master, halves))
