"""Muon under DeepSpeed against float64: with one and two ranks, at every stage of ZeRO; and the exchange of shards."""

import sys
import threading
import zlib
from pathlib import Path

import pytest
import torch
from ray import cloudpickle
from safetensors.torch import load_file
from torch import Tensor

from amalgam.errors import UserError
from amalgam.model import load
from amalgam.rl import shards
from amalgam.rl.shards import Shards

from .small_learner import ENGINES, batches, nll, optimization, sent

cloudpickle.register_pickle_by_value(sys.modules[__name__])

LR, DECAY, CLIP = 0.1, 0.1, 0.5
SETTINGS = {"name": "muon", "lr": LR, "weight_decay": DECAY, "gradient_clipping": CLIP, "warmup_steps": 0}
SETTINGS |= {"decay": "constant", "micro_batch_tokens": 60}


def random_gradients(model, batch, shared, *, seed):
    """A loss whose gradients are replaced: real ones of so few tokens have no rank to speak of."""

    def replace(name: str, gradient: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + model.seed)
        return torch.randn(gradient.shape, generator=generator)

    if not hasattr(model, "seed"):
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.register_hook(lambda gradient, name=name: replace(name, gradient))
    model.seed = seed
    return nll(model, batch, shared, scale=1.0)


def matrices(name: str, x: Tensor) -> list[Tensor]:
    """Views of the small model's matrices; none of what is AdamW's."""
    if x.ndim < 2 or "position_bias" in name or name in ("model.embed_tokens.weight", "lm_head.weight"):
        return []
    if x.ndim == 3:
        return [part for each in x for part in (each.chunk(2) if "gate_up" in name else [each])]
    if name.endswith("_hc.fn"):
        return list(x.split([2, 2, 4]))
    csa = "layers.1.self_attn.compressor" in name and ("kv_proj" in name or "gate_proj" in name)
    return list(x.chunk(2 if csa or "o_a_proj" in name else 1))


def orthogonal(x: Tensor) -> Tensor:
    """Newton-Schulz of one matrix as polynomials of its singular values, in float64."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(8):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    for _ in range(2):
        s = 2 * s - 1.5 * s**3 + 0.5 * s**5
    return (u * s) @ v


def saved(learner, folder: Path) -> dict[str, Tensor]:
    step = learner.save_state(folder)
    return {name: x.double() for name, x in load_file(folder / f"{'ab'[step % 2]}.safetensors").items()}


def assert_steps(before: dict[str, Tensor], after: dict[str, Tensor], step: int) -> None:
    """From one state to the next, in float64, with the gradient that the moments tell."""
    names, squares = {name.rpartition("/")[0] for name in before}, 0.0
    for name in names:
        old, new = before[f"{name}/weight"], after[f"{name}/weight"]
        if parts := matrices(name, old):
            held = after[f"{name}/momentum"]
            gradient = held - 0.95 * before[f"{name}/momentum"]
            found = (old * (1 - LR * DECAY) - new) / LR
            for ahead, update in zip(matrices(name, gradient + 0.95 * held), matrices(name, found), strict=True):
                expected = orthogonal(ahead) * 0.18 * max(ahead.shape) ** 0.5
                assert (update - expected).norm() <= 1e-4 * expected.norm(), name
                size = torch.linalg.svdvals(update) / (0.18 * max(ahead.shape) ** 0.5)
                assert (size - 1).abs().max() < 0.01, name  # SGD's would lie as far apart as the gradient's
            assert sum(part.numel() for part in parts) == old.numel()
        else:
            first, second = after[f"{name}/exp_avg"], after[f"{name}/exp_avg_sq"]
            gradient = (first - 0.9 * before[f"{name}/exp_avg"]) / 0.1
            torch.testing.assert_close(second, 0.95 * before[f"{name}/exp_avg_sq"] + 0.05 * gradient.square())
            size = first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-3)
            decayed = old * (1 - LR * DECAY) if old.ndim == 2 and "position_bias" not in name else old
            torch.testing.assert_close(new, decayed - LR * size, rtol=0, atol=1e-5)
        squares += gradient.square().sum().item()
    assert squares**0.5 == pytest.approx(CLIP, rel=1e-4)


@pytest.mark.parametrize(("ranks", "stage"), ENGINES)
def test_updates_are_those_of_whole_matrices(learner, checkpoint, tmp_path, ranks, stage):
    (rows,) = batches(1)
    ours = learner(ranks, stage, **SETTINGS)
    states = [saved(ours, tmp_path)]
    for seed in (1, 2):
        assert ours.step(rows, random_gradients, seed=seed)["grad_norm"] > CLIP
        states.append(saved(ours, tmp_path))
        assert_steps(*states[-2:], step=seed)
    muons = {name.removesuffix("/momentum") for name in states[0] if name.endswith("/momentum")}
    assert muons == {n for n, p in load(checkpoint).named_parameters() if p.requires_grad and matrices(n, p)}
