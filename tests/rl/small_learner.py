"""A small model, its data, a learner of it, and what tests ask the learner for."""

import sys
from pathlib import Path

import numpy as np
import ray
import torch
from ray import cloudpickle
from transformers import DeepseekV4Config

from amalgam.model import load
from amalgam.rl import transport
from amalgam.rl.learner import Learner
from amalgam.rl.settings import Optimization

# The ranks' processes cannot import this file: what they run of it travels by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

STEPS = 8
ENGINES = [(1, 1), (2, 0), (2, 1), (2, 2), (2, 3)]  # ranks, ZeRO stage


def small_config() -> DeepseekV4Config:
    """0.04 M parameters, with every kind of layer."""
    return DeepseekV4Config(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        mlp_layer_types=["hash_moe", "moe", "moe"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        num_attention_heads=2,
        head_dim=16,
        partial_rotary_factor=0.5,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=8,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        sliding_window=8,
        hc_mult=2,
        hc_sinkhorn_iters=4,
    )


def nll(model, batch, shared, *, scale):
    logprobs = model.logprobs(batch["tokens"], batch["cu_seqlens"])
    metrics = {"nll": -logprobs.sum(), "tokens": batch["weight"].new_tensor(len(logprobs))}
    return -(logprobs * batch["weight"]).sum() * scale * shared.get("one", 1.0), metrics


def optimization(ranks: int = 1, stage: int = 1, **more) -> Optimization:
    """A large epsilon makes AdamW's first updates smooth; with a tiny one, each is its gradient's sign."""
    fixed = {"lr": 1e-3, "warmup_steps": 2, "decay": "cosine", "weight_decay": 0.1, "eps": 1e-3}
    return Optimization(**{**fixed, "ranks": ranks, "zero_stage": stage, "micro_batch_tokens": 45, **more})


def batches(count: int) -> list[list[dict[str, np.ndarray]]]:
    """Ragged documents, some too short for a compressed entry."""
    rng = np.random.default_rng(0)
    result = []
    for _ in range(count):
        lengths = [40, 2, 3, 2, *rng.integers(2, 30, 5).tolist()]
        weight = 1 / sum(lengths)
        result.append(
            [
                {"tokens": rng.integers(0, 64, n).astype(np.int32), "weight": np.full(n, weight, np.float32)}
                for n in lengths
            ]
        )
    return result


def sent(learner: Learner) -> transport.InStore:
    bundle = ray.get(learner.weights(7))
    assert isinstance(bundle, transport.InStore)
    assert bundle.version == 7
    return bundle


def weights(learner: Learner, checkpoint: Path) -> dict[str, torch.Tensor]:
    model = load(checkpoint)
    transport.receive(model, sent(learner))
    return model.state_dict()


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    """Within `tolerance` of the largest entry of each tensor."""
    for name, tensor in theirs.items():
        worst = (ours[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-3)
        assert worst <= tolerance, f"{name}: {worst:.1e}"
