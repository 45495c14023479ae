"""Do random small models give transformers' log-probs and gradients in fp32? One unpadded sequence each.

    .venv/bin/python benchmarks/transformers_agreement.py

The exit code is 1 if a bound is broken. README.md says what is random and what is bounded.
"""

import argparse
import copy
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from near_ties import near_ties
from results import machine, print_table, write_result
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.utils import logging

from amalgam.model import DeepseekV4, initialize
from amalgam.model.config import CSA, HCA, SWA

LOGPROB_BOUND, MEAN_BOUND, GRADIENT_BOUND = 1e-4, 1e-6, 1e-4
FLOOR = 1e-3  # of the model's largest element of a gradient: below it, gradients are sums of terms that cancel
LONGEST = 300
Gradients = dict[str, tuple[Any, Any]]  # ours and transformers', by parameter
_SHORT = {SWA: "window", CSA: "CSA", HCA: "HCA"}


@dataclass
class Agreement:
    """One model. Absolute differences of log-probs of the whole vocabulary at every position; gradients relative."""

    seed: int
    layers: list[str]
    yarn: bool
    tokens: int
    cut: bool  # the sequence ends before its first near-tie
    largest: float
    mean: float
    gradient: float  # the largest |difference| of a parameter's gradient, over its largest |element| or FLOOR
    parameter: str  # where
    cancelled: dict[str, tuple[float, float]]  # see `_referee`

    @property
    def holds(self) -> bool:
        return self.largest <= LOGPROB_BOUND and self.mean <= MEAN_BOUND and self.gradient <= GRADIENT_BOUND


def random_config(seed: int) -> DeepseekV4Config:
    """1 to 4 layers of any kinds; everything that may be odd is odd at times."""
    draw = random.Random(seed)
    layers = draw.choices((SWA, CSA, HCA), k=draw.randint(1, 4))
    heads, head_dim = draw.randint(1, 7), draw.choice((8, 12, 16, 18, 24))
    rope_dim = draw.choice([r for r in (2, 4, 6, 8, 16) if r <= head_dim])
    groups = draw.choice([g for g in range(1, heads * head_dim + 1) if heads * head_dim % g == 0 and g <= 6])
    experts = draw.randint(2, 9)
    yarn = {
        "type": "yarn", "factor": draw.choice((2, 4, 16)), "beta_fast": 32, "beta_slow": 1,
        "original_max_position_embeddings": draw.choice((16, 64, 65536)),
    }  # fmt: skip
    fields: dict[str, Any] = {
        "vocab_size": draw.randint(20, 90), "hidden_size": draw.randint(9, 40),
        "moe_intermediate_size": draw.randint(5, 24), "num_hidden_layers": len(layers), "layer_types": layers,
        "compress_rates": {CSA: draw.randint(1, 7), HCA: draw.randint(2, 40)}, "num_attention_heads": heads,
        "head_dim": head_dim, "qk_rope_head_dim": rope_dim, "q_lora_rank": draw.randint(3, 20), "o_groups": groups,
        "o_lora_rank": draw.randint(1, 9), "sliding_window": draw.randint(1, 40),
        "index_n_heads": draw.randint(16, 21), "index_head_dim": rope_dim + draw.randint(0, 12),
        "index_topk": draw.randint(1, 12), "n_routed_experts": experts,
        "num_experts_per_tok": draw.randint(1, min(4, experts)),
        "mlp_layer_types": draw.choices(("hash_moe", "moe"), k=len(layers)),
        "routed_scaling_factor": draw.uniform(0.5, 3), "swiglu_limit": draw.choice((0.3, 1.0, 10.0)),
        "hc_mult": draw.randint(2, 5), "hc_sinkhorn_iters": draw.randint(1, 20),
        "rms_norm_eps": draw.choice((1e-6, 1e-5)), "hc_eps": draw.choice((1e-6, 1e-4)),
        "rope_theta": draw.choice((100.0, 10000.0)), "compress_rope_theta": draw.choice((1000.0, 160000.0)),
        "rope_scaling": yarn if draw.random() < 0.5 else None, "initializer_range": draw.choice((0.05, 0.15)),
        "max_position_embeddings": 4096, "num_nextn_predict_layers": 0,
    }  # fmt: skip
    return DeepseekV4Config(**fields)


@torch.no_grad()
def random_model(config: DeepseekV4Config, seed: int) -> DeepseekV4:
    """Every tensor is random: norms, sinks, biases and the gates of the hyper-connections too."""
    model = initialize(config, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if (tensor.dim() == 1 or "position_bias" in name) and "frequencies" not in name:
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def transformers_twin(model: DeepseekV4) -> DeepseekV4ForCausalLM:
    """transformers' model with the same parameters and buffers, all layers eager."""
    config = DeepseekV4Config(**model.config.to_dict())
    config._attn_implementation = config._experts_implementation = "eager"
    twin = DeepseekV4ForCausalLM(config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def agreement(seed: int) -> Agreement:
    config = random_config(seed)
    model = random_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, LONGEST + 1, (), generator=generator))
    tokens = torch.randint(config.vocab_size, (length,), generator=generator)
    near = near_ties(model, tokens, torch.tensor([0, length])).nonzero()
    if near.numel():
        tokens = tokens[: max(int(near[0]), 1)]
    return compare(model, transformers_twin(model), tokens, seed, cut=bool(near.numel()))


def compare(model: DeepseekV4, twin: DeepseekV4ForCausalLM, tokens: Tensor, seed: int, cut: bool) -> Agreement:
    ours = torch.log_softmax(model.logits(model(tokens, torch.tensor([0, len(tokens)])).hidden), -1)
    theirs = torch.log_softmax(twin(tokens.unsqueeze(0)).logits[0], -1)
    difference = (ours - theirs).detach().abs()
    for logprobs in (ours, theirs):
        _loss(logprobs, seed).backward()
    gradients = {name: (p.grad, other.grad) for (name, p), other in _pairs(model, twin)}
    largest_gradient = max(_size(theirs) for _, theirs in gradients.values())
    gradient, parameter = max((_relative(*pair, FLOOR * largest_gradient), name) for name, pair in gradients.items())
    cancelled = [name for name, pair in gradients.items() if _relative(*pair, 0.0) > GRADIENT_BOUND]
    refereed = _referee(model, tokens, seed, {name: gradients[name] for name in cancelled}, largest_gradient)
    config = model.config
    yarn = config.rope_parameters["compress"]["rope_type"] == "yarn"  # pyright: ignore
    layers = [_SHORT[kind] for kind in config.layer_types or ()]
    largest, mean = float(difference.max()), float(difference.mean())
    return Agreement(seed, layers, yarn, len(tokens), cut, largest, mean, gradient, parameter, refereed)


def _loss(logprobs: Tensor, seed: int) -> Tensor:
    """Every token's whole distribution enters it."""
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(seed))
    return (logprobs * weights).mean()


def _pairs(model: DeepseekV4, twin: DeepseekV4ForCausalLM) -> Iterator[tuple[tuple[str, Tensor], Tensor]]:
    others = dict(twin.named_parameters())
    return (((name, p), others[name]) for name, p in model.named_parameters())


def _size(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float(gradient.abs().max())


def _relative(ours: Tensor | None, theirs: Tensor | None, floor: float) -> float:
    if ours is None or theirs is None:  # the indexer's, which the loss does not reach
        return 0.0 if ours is theirs else float("inf")
    difference = _size(ours - theirs)
    return difference / max(_size(theirs), floor) if difference else 0.0


def _referee(
    model: DeepseekV4, tokens: Tensor, seed: int, gradients: Gradients, largest: float
) -> dict[str, tuple[float, float]]:
    """Errors of both sides against our model in float64, over the model's largest gradient, by parameter."""
    if not gradients:
        return {}
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    hidden = exact(tokens, torch.tensor([0, len(tokens)])).hidden
    _loss(torch.log_softmax(exact.logits(hidden), -1), seed).backward()
    found = dict(exact.named_parameters())
    return {
        name: (_size(ours - found[name].grad) / largest, _size(theirs - found[name].grad) / largest)
        for name, (ours, theirs) in gradients.items()
    }


def rows(found: list[Agreement]) -> list[list[str]]:
    """The table: all models, then those of a kind."""
    kinds = {
        "all": lambda _: True,
        **{f"{kind} first": lambda a, kind=kind: a.layers[0] == kind for kind in _SHORT.values()},
        **{f"{kind} last": lambda a, kind=kind: a.layers[-1] == kind for kind in _SHORT.values()},
        **{f"{kind} alone": lambda a, kind=kind: set(a.layers) == {kind} for kind in _SHORT.values()},
        "all three kinds": lambda a: len(set(a.layers)) == 3,
        "YaRN": lambda a: a.yarn,
        "plain RoPE": lambda a: not a.yarn,
    }
    table = []
    for kind, belongs in kinds.items():
        members = [each for each in found if belongs(each)]
        if members:
            mean = sum(each.mean * each.tokens for each in members) / sum(each.tokens for each in members)
            largest, gradient = (max(getattr(each, key) for each in members) for key in ("largest", "gradient"))
            tokens = sum(each.tokens for each in members)
            table.append([kind, str(len(members)), str(tokens), f"{largest:.1e}", f"{mean:.1e}", f"{gradient:.1e}"])
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=240)
    count = parser.parse_args().models
    where = machine()
    logging.set_verbosity_error()
    found = [agreement(seed) for seed in range(count)]
    print_table(["models with", "models", "tokens", "largest", "mean", "gradient"], rows(found))
    broken = [each for each in found if not each.holds]
    for each in broken:
        print(f"BROKEN: {each}")
    bounds = {"largest": LOGPROB_BOUND, "mean": MEAN_BOUND, "gradient": GRADIENT_BOUND}
    print(f"{sum(each.cut for each in found)} sequences end before a near-tie; bounds {bounds}; {len(broken)} broken")
    if refereed := [pair for each in found for pair in each.cancelled.values()]:
        ours, theirs = (max(errors) for errors in zip(*refereed, strict=True))
        print(f"{len(refereed)} gradients differ by more than {GRADIENT_BOUND} of themselves, all below FLOOR. Against "
              f"float64, over the model's largest: ours {ours:.0e}, transformers' {theirs:.0e}")  # fmt: skip
    results = [{**asdict(each), "holds": each.holds} for each in found]
    print(write_result("transformers_agreement", {"machine": where, "bounds": bounds, "results": results}))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
