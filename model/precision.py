"""Low precision in the model: what is rounded as deployment stores it, and which products are of FP8.

Modules say how they compute by `precision`, or how they keep a value by `storage`; here these are set.

A value on the border between two codes may turn with the last bit of fp32. On a CPU a product's last bit depends on the
batch's shape, so that in low precision a few tokens in a hundred have log-probs that differ by up to 0.03 with it.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
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


def check_device(precision: Precision, device: torch.device) -> None:
    """ValueError where the kernels that would run on `device` do not multiply FP8, and `precision` asks for it."""
    if (precision.experts, precision.linear) != ("full", "full") and wants_triton(device):
        from ..kernels.fused.limits import check_fp8

        check_fp8(device)


def set_precision(model: DeepseekV4, precision: Precision) -> None:
    """From now on `model` computes with `precision`; ValueError where its config or its device does not allow that, or
    where it does not hold its weights in full any more."""
    if wrong := problem(model.config, precision):
        raise ValueError(wrong)
    if stored_weights(model):
        raise ValueError("the model's weights are stored in low precision; load it again")
    check_device(precision, model.lm_head.weight.device)
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
    """For a model that only runs forward: of each weight in low precision, what deployment stores takes its place, and
    of what its decoding cache holds in pages, the bytes (pools.py).

    The rounding is of the weight's own dtype: a model that was trained in fp32 has to be in fp32 here, and may be cast
    after. Nothing to do at full precision, or where it was done.
    """
    state = model.state_dict()
    for _ in store_each(model, ((name, state.pop(name)) for name in list(state))):
        pass


def store_each(model: nn.Module, masters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a state dict, one after another; of a weight in low precision, those of what takes its place."""
    kinds: dict[str, type[Stored]] = {"fp8": StoredFp8, "fp4": StoredFp4}
    for module in model.modules():
        if isinstance(module, Compressor):
            module.in_bytes = True
    for name, tensor in masters:
        owner, _, attribute = name.rpartition(".")
        module, kind = model.get_submodule(owner), None
        if isinstance(module, Experts):
            kind = kinds.get(module.precision)
        elif isinstance(module, Linear | GroupedLinear) and module.precision == "fp8":
            kind = StoredFp8 if isinstance(module, Linear) else StoredRounded
        if kind is None:
            yield name, tensor
            continue
        stored = kind(tensor, halves=2 if attribute == "gate_up_proj" else 1)
        delattr(module, attribute)
        module.add_module(attribute, stored)
        model.requires_grad_(False)
        for part, buffer in stored.named_buffers():
            yield f"{name}.{part}", buffer


def stored_weights(model: nn.Module) -> dict[str, Stored]:
    """By their masters' names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Stored)}
