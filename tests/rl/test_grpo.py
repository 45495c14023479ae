"""GRPO: advantages, the clipped loss against a loop in float64, and the whole loss through a tiny model."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from amalgam.model import DeepseekV4
from amalgam.rewards.problem import Score
from amalgam.rl.engine import Engine
from amalgam.rl.grpo import group_advantages, loss, policy_loss, rows
from amalgam.rl.packing import collate
from amalgam.rl.trajectory import Trajectory

from .. import tiny

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def trajectory(group: int, reward: float | None, prompt: int = 2, response: int = 3) -> Trajectory:
    n = prompt + response
    return Trajectory(
        request=group,
        group=group,
        prompt_ids=np.arange(prompt, dtype=np.int32),
        response_ids=np.arange(response, dtype=np.int32),
        logprobs=np.linspace(-2, -1, response, dtype=np.float32),
        experts=np.arange(n * 2, dtype=np.int16).reshape(n, 1, 2),
        versions=np.zeros(response, dtype=np.int32),
        finish="stop",
        text="",
        score=None if reward is None else Score(reward, False, {}),
    )


def test_advantage_is_the_reward_minus_the_groups_mean():
    """Not divided by the deviation. Members of a group need not be neighbors, and keep their own advantages."""
    members = [trajectory(*pair) for pair in [(4, 1.0), (9, 0.5), (4, 0.0), (9, 0.0), (4, 0.2), (7, 0.3), (7, 0.3)]]
    kept, dropped = group_advantages(members)
    assert dropped == 1
    expected = {0: 0.6, 2: -0.4, 4: -0.2, 1: 0.25, 3: -0.25}
    found = {next(i for i, m in enumerate(members) if m is t): a for t, a in kept}
    assert found == pytest.approx(expected)


def test_groups_that_agree_are_dropped_and_counted():
    almost = [trajectory(0, 0.1 + 0.2), trajectory(0, 0.3)]  # equal but for rounding
    alone = [trajectory(1, 1.0)]
    assert group_advantages(almost + alone) == ([], 2)
    assert group_advantages([]) == ([], 0)


def test_a_missing_score_is_an_error():
    with pytest.raises(ValueError, match="group 5: 1 trajectories without a score"):
        group_advantages([trajectory(5, 1.0), trajectory(5, None)])


def test_rows_weigh_sequences_alike_whatever_their_lengths():
    members = [trajectory(0, 1.0, 2, 5), trajectory(0, 0.0, 3, 1), trajectory(0, 0.0, 1, 2)]
    made = rows(list(zip(members, [0.5, -0.25, 0.0], strict=True)))
    for t, row, advantage in zip(members, made, [0.5, -0.25, 0.0], strict=True):
        p, r = len(t.prompt_ids), len(t.response_ids)
        assert row["tokens"].tolist() == [*range(p), *range(r)]
        np.testing.assert_allclose(row["weight"], [0] * p + [1 / (r * 3)] * r, rtol=1e-6)
        assert row["weight"].sum() == pytest.approx(1 / 3)
        assert (row["advantage"][p:] == advantage).all()
        np.testing.assert_array_equal(row["old_logprobs"], [0] * p + t.logprobs.tolist())
        assert row["experts"] is t.experts
        assert {row[name].dtype for name in ("weight", "advantage", "old_logprobs")} == {np.dtype(np.float32)}


def naive_policy_loss(logprobs, old, advantage, weight, clip_low, clip_high):
    """The loss, its gradient by logprobs, and the metrics, token by token in float64."""
    total, gradient, clipped, entropy, mismatch = 0.0, [], 0.0, 0.0, 0.0
    for lp, o, a, w in zip(logprobs, old, advantage, weight, strict=True):
        if w == 0:
            gradient.append(0.0)
            continue
        ratio = math.exp(lp - o)
        if a > 0 and ratio > 1 + clip_high:
            total, slope = total - w * (1 + clip_high) * a, 0.0
            clipped += w
        elif a < 0 and ratio < 1 - clip_low:
            total, slope = total - w * (1 - clip_low) * a, 0.0
            clipped += w
        else:
            total, slope = total - w * ratio * a, -w * ratio * a
        gradient.append(slope)
        entropy -= w * lp
        mismatch += w * (ratio - 1 - (lp - o))
    return total, gradient, {"clipped": clipped, "entropy_estimate": entropy, "mismatch": mismatch}


def test_policy_loss_and_its_gradient():
    """Ratios on both sides of both clips with both signs, a ratio of 1, and prompt tokens with wild values."""
    shifts = torch.tensor([0.0, 0.1, -0.1, 0.24, 0.26, -0.22, -0.23, 2.0, -2.0, 0.5, -0.5])
    advantage = torch.cat([torch.full((11,), 0.7), torch.full((11,), -0.4), torch.zeros(3)])
    old = -3 * torch.rand(25)
    logprobs = (old + torch.cat([shifts, shifts, torch.tensor([1.0, -1.0, 0.0])])).requires_grad_()
    weight = torch.rand(25) / 25
    with torch.no_grad():
        weight[[3, 15]] = 0.0
        logprobs[3], old[15] = -200.0, -200.0  # exp of the difference would overflow
    value, metrics = policy_loss(logprobs, old, advantage, weight, **CLIP)
    value.backward()
    fields = [x.detach().double().tolist() for x in (logprobs, old, advantage, weight)]
    expected, gradient, expected_metrics = naive_policy_loss(*fields, **CLIP)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert logprobs.grad is not None
    np.testing.assert_allclose(logprobs.grad, gradient, rtol=1e-5, atol=1e-8)
    found = {name: metric.item() for name, metric in metrics.items()}
    assert found == pytest.approx({"loss": expected, **expected_metrics}, rel=1e-5)
    assert not any(metric.requires_grad for name, metric in metrics.items() if name != "loss")


# ---- through a tiny model


@pytest.fixture(scope="module")
def model() -> DeepseekV4:
    return tiny.model(0, vocab_size=40)


def sampled(model: DeepseekV4, temperature: float) -> list[tuple[Trajectory, float]]:
    """Fresh trajectories of 5 groups with made-up rewards, and their advantages."""
    requests = tiny.asked(tiny.requests(5, 3, 40), temperature=temperature, max_new_tokens=20, seed=3)
    trajectories = Engine(model, [tiny.END]).generate(requests)
    for i, t in enumerate(trajectories):
        t.score = Score((i * i % 7) / 7, False, {})
    kept, _ = group_advantages(trajectories)
    return kept


def on(
    model: DeepseekV4, batch_rows: list, temperature: float = 1.0, **more: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return loss(model, collate(batch_rows, "cpu"), {}, temperature=temperature, **CLIP, **more)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ratio_is_one_on_fresh_samples(model: DeepseekV4, temperature: float):
    """So the loss is minus the mean advantage, nothing is clipped, and sampler and learner agree."""
    kept = sampled(model, temperature)
    with torch.no_grad():
        value, metrics = on(model, rows(kept), temperature)
    assert value.item() == pytest.approx(-np.mean([a for _, a in kept]), abs=1e-6)
    assert abs(metrics["mismatch"].item()) < 1e-6
    assert metrics["clipped"] == 0
    expected = np.mean([-t.logprobs.mean() for t, _ in kept])
    assert metrics["entropy_estimate"].item() == pytest.approx(expected, rel=1e-4)


def test_the_samplers_temperature_is_the_learners(model: DeepseekV4):
    with torch.no_grad():
        _, metrics = on(model, rows(sampled(model, 0.7)), 1.0)
    assert metrics["mismatch"] > 1e-3


@pytest.mark.parametrize("indexer_weight", [0.0, 0.5])
def test_neither_packing_nor_micro_batches_change_loss_or_gradient(indexer_weight: float):
    """The denominator is in the rows. Old log-probs are moved, so that some tokens are clipped."""
    model = tiny.model(0, vocab_size=40)
    if indexer_weight:
        model.unfreeze("indexer")
    rng = np.random.default_rng(0)
    moved = [(replace(t, logprobs=t.logprobs + rng.normal(0, 0.3, len(t.logprobs))), a) for t, a in sampled(model, 1.0)]
    made = rows(moved)
    whole, whole_metrics = on(model, made, indexer_weight=indexer_weight)
    assert whole_metrics["clipped"] > 0.01
    own = whole_metrics.get("indexer_loss", torch.zeros(()))
    assert whole.item() == pytest.approx((whole_metrics["loss"] + indexer_weight * own).item())
    assert (own > 1e-3) == bool(indexer_weight)
    whole.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for parts in ([made[::-1]], [made[:4], made[4:5], made[5:]], [[row] for row in made]):
        model.zero_grad(set_to_none=True)
        totals: dict[str, float] = {}
        for part in parts:
            value, metrics = on(model, part, indexer_weight=indexer_weight)
            value.backward()
            totals = {name: totals.get(name, 0.0) + metric.item() for name, metric in metrics.items()}
        assert totals == pytest.approx({name: m.item() for name, m in whole_metrics.items()}, rel=1e-4, abs=1e-6)
        for name, expected in gradients.items():
            found = dict(model.named_parameters())[name].grad
            difference = (0.0 if found is None else found) - expected
            assert difference.norm() <= 1e-5 * expected.norm() + 1e-8, name


def test_prompts_have_no_part(model: DeepseekV4):
    made = rows(sampled(model, 1.0))
    with torch.no_grad():
        value, metrics = on(model, made)
        for row in made:
            row["old_logprobs"] = np.where(row["weight"] == 0, np.float32(-50), row["old_logprobs"])
            row["advantage"] = np.where(row["weight"] == 0, np.float32(99), row["advantage"])
        assert on(model, made)[0] == value
        assert on(model, made)[1]["mismatch"] == metrics["mismatch"]


def test_recorded_experts_are_replayed(model: DeepseekV4):
    """A gate that would choose others by its correction bias, which the weights of the chosen never see."""
    kept = sampled(model, 1.0)
    moved = tiny.model(0, vocab_size=40)
    with torch.no_grad():
        for name, buffer in moved.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.tensor([9.0, 0.0, 0.0, 9.0]))  # decides ids, never weights
        replayed = on(moved, rows(kept))[1]["mismatch"]
        for t, _ in kept:
            t.experts[:] = -1
        chosen_anew = on(moved, rows(kept))[1]["mismatch"]
    assert replayed < 1e-6 < 1e-3 < chosen_anew
