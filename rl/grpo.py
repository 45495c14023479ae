"""Group relative policy optimization: advantages within a group, and the clipped loss (DeepSeek-V3.2, eq. 5).

What it leaves out, for now: a KL term against a reference, the off-policy mask, sampling masks.
"""

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from ..model.language_model import LanguageModel
from .packing import Row
from .training_graph import recordable
from .trajectory import Trajectory


def group_advantages(trajectories: list[Trajectory]) -> tuple[list[tuple[Trajectory, float]], int]:
    """(trajectory, reward minus its group's mean) of every group whose rewards differ, and the number of other groups.

    No division by the deviation, as in V3.2. Equal rewards teach nothing: such groups are dropped, and counted.
    """
    groups: dict[int, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        groups[trajectory.group].append(trajectory)
    kept: list[tuple[Trajectory, float]] = []
    dropped = 0
    for members in groups.values():
        rewards = np.array([t.score.value for t in members if t.score is not None])
        if len(rewards) != len(members):
            raise ValueError(f"group {members[0].group}: {len(members) - len(rewards)} trajectories without a score")
        if np.ptp(rewards) < 1e-6:
            dropped += 1
        else:
            kept += zip(members, rewards - rewards.mean(), strict=True)
    return kept, dropped


def rows(advantages: list[tuple[Trajectory, float]]) -> list[Row]:
    """A learner's row for each trajectory; "weight" makes the loss the mean over sequences of their token means."""
    result = []
    for trajectory, advantage in advantages:
        row = trajectory.row()
        response = row.pop("response")
        prompt = np.zeros(len(trajectory.prompt_ids), dtype=np.float32)
        row["weight"] = response / (response.sum() * len(advantages))
        row["advantage"] = np.full_like(response, advantage)
        row["old_logprobs"] = np.concatenate([prompt, trajectory.logprobs])
        row["experts"] = trajectory.experts
        result.append(row)
    return result


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantage: Tensor, weight: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """-sum over tokens of weight * min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A); tensors [T] fp32.

    ratio = exp(logprobs - old_logprobs), old ones as the sampler recorded them. Tokens of weight 0 (prompts) take no
    part. The metrics are sums with the same weights: "clipped" (the clip decides), "entropy_estimate" (-log p of the
    sampled tokens) and "mismatch" (k3 estimate of KL(sampler || learner)).
    """
    difference = (logprobs - old_logprobs).masked_fill(weight == 0, 0.0)
    ratio = difference.exp()
    plain, limited = ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    loss = -(weight * torch.minimum(plain, limited)).sum()
    with torch.no_grad():
        metrics = {
            "loss": loss,
            "clipped": (weight * (limited < plain)).sum(),
            "entropy_estimate": -(weight * logprobs).sum(),
            "mismatch": (weight * (ratio - 1 - difference)).sum(),
        }
    return loss, metrics


@recordable
def loss(
    model: LanguageModel,
    batch: dict[str, Tensor],
    shared: dict[str, Tensor],
    *,
    clip_low: float,
    clip_high: float,
    temperature: float,
    indexer_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` on a packed batch of `rows`, with the sampler's experts replayed (their weights are recomputed),
    plus `indexer_weight` times the indexers' loss ("indexer_loss"), if above 0."""
    tokens, cu_seqlens, replay = batch["tokens"], batch["cu_seqlens"], batch["experts"].long()
    output = model(tokens, cu_seqlens, replay=replay, index_loss=indexer_weight > 0)
    logprobs = model.logprobs_of(output, tokens, cu_seqlens, temperature)
    fields = (batch["old_logprobs"], batch["advantage"], batch["weight"])
    value, metrics = policy_loss(logprobs, *fields, clip_low=clip_low, clip_high=clip_high)
    if indexer_weight:
        metrics["indexer_loss"] = (batch["weight"] * output.index_kl).sum()
        value = value + indexer_weight * metrics["indexer_loss"]
    return value, metrics
