"""How large a model is: parameters, counted on the meta device, and the bytes of a request's cache."""

from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from transformers import DeepseekV4Config

from .config import SWA
from .deepseek_v4 import Block, DeepseekV4


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
    names = {name: p.numel() for name, p in model.named_parameters() if not name.startswith("mtp.")}
    main = sum(names.values())
    routed = sum(count for name, count in names.items() if ".mlp.experts." in name)
    chosen = routed * config.num_experts_per_tok // config.n_routed_experts
    active = main - names["model.embed_tokens.weight"] - routed + chosen
    return Parameters(main, active, _mtp(config) * config.num_nextn_predict_layers)


def _mtp(config: DeepseekV4Config) -> int:
    """One window-only block with learned routing, e_proj and h_proj, three norms, and a final collapse of its own."""
    one = {"num_hidden_layers": 1, "layer_types": [SWA], "mlp_layer_types": ["moe"]}
    alone = DeepseekV4Config(**(config.to_dict() | one))
    with torch.device("meta"):
        block: nn.Module = Block(alone, 0)
    n, d = config.hc_mult, config.hidden_size
    extra = [(d, d), (d, d), (d,), (d,), (d,), (n, n * d), (n,), (1,)]
    return sum(p.numel() for p in block.parameters()) + sum(map(prod, extra))
