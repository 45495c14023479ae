"""What the Triton kernels take of a model, so that a model is refused when it is built and not in its first step."""

from collections.abc import Iterator
from typing import Any

import torch

from ..dispatch import VARIABLE
from .attention import HEAD_DIM, SPLIT
from .hyper import STREAMS
from .indexer import HEADS
from .launch import STEP, is_hopper, is_width
from .router import EXPERTS, TOPK

CSA = "compressed_sparse_attention"


def check_model(config: Any, device: torch.device) -> None:
    """ValueError, in one line, for a DeepseekV4Config that the kernels on `device` take in no dtype.

    It names each key that is out of their limits, and what they take. Window, compress rates and numbers of rope
    channels have no limits. Limits of fp32 alone are checked where a kernel starts.
    """
    if wrong := [f"{key}: {value} ({want})" for key, value, fits, want in _limits(config, device) if not fits]:
        raise ValueError(
            f"the Triton kernels do not take this model: {'; '.join(wrong)}. {VARIABLE}=reference computes it, slowly"
        )


def check_fp8(device: torch.device) -> None:
    """ValueError where the kernels multiply no FP8."""
    if device.type == "cuda" and not is_hopper(device):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"precision: products in FP8 run on Hopper, not on {name}. {VARIABLE}=reference computes them")


def _limits(config: Any, device: torch.device) -> Iterator[tuple[str, Any, bool, str]]:
    """By key of the config: its value, whether the kernels take it, and what they take."""
    c, sparse = config, CSA in config.layer_types
    # On a CPU the kernels for any GPU are interpreted, whatever the width.
    widest = c.num_attention_heads % 64 == 0 and (device.type == "cpu" or is_hopper(device))
    yield "head_dim", c.head_dim, is_width(c.head_dim, most=256) or (widest and c.head_dim == 512), HEAD_DIM
    yield "hc_mult", c.hc_mult, c.hc_mult in STREAMS, f"one of {STREAMS}"
    if sparse:
        yield "index_head_dim", c.index_head_dim, is_width(c.index_head_dim, most=128), "a power of two from 16 to 128"
    inputs = "hidden_size q_lora_rank o_lora_rank moe_intermediate_size n_routed_experts vocab_size".split()
    sizes = {key: getattr(c, key) for key in inputs}
    sizes["num_attention_heads * head_dim / o_groups"] = c.num_attention_heads * c.head_dim // c.o_groups
    if sparse:
        sizes["index_n_heads"] = c.index_n_heads
    for key, size in sizes.items():
        yield key, size, size % STEP == 0, f"a multiple of {STEP}"
    yield "n_routed_experts", c.n_routed_experts, c.n_routed_experts <= EXPERTS, f"up to {EXPERTS}"
    yield "num_experts_per_tok", c.num_experts_per_tok, c.num_experts_per_tok <= TOPK, f"up to {TOPK}"
    if sparse:
        yield "index_n_heads", c.index_n_heads, c.index_n_heads <= HEADS, f"up to {HEADS}"
        yield "index_topk", c.index_topk, c.index_topk <= SPLIT, f"up to {SPLIT}"
