"""The learner on one and two ranks against plain torch: gradients, updates, state, weights, failures."""

import gc
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import cloudpickle
from safetensors.torch import load_file

from amalgam.errors import UserError
from amalgam.model import DeepseekV4, initialize, load, save
from amalgam.pipelines.sft import loss as sft_loss
from amalgam.rl import learner as learner_module
from amalgam.rl import transport
from amalgam.rl.cluster import wait
from amalgam.rl.learner import Learner
from amalgam.rl.losses import named
from amalgam.rl.optimizer import lr_at
from amalgam.rl.packing import collate
from amalgam.rl.settings import Optimization
from amalgam.rl.weights import SyncError, describe

from .small_learner import ENGINES, STEPS, assert_near, batches, nll, optimization, sent, weights

# The ranks' processes cannot import this file: what they run of it travels by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

ROOT = Path(__file__).parents[2]


def fails_on_the_longest(model, batch, shared):
    if batch["cu_seqlens"].diff().max() > 30:
        raise KeyError("a document too long")
    return nll(model, batch, shared, scale=1.0)


def fails_everywhere(model, batch, shared):
    raise UserError("recipe.yaml:3: a key: no good")


def not_finite(model, batch, shared):
    loss, metrics = nll(model, batch, shared, scale=1.0)
    return loss * float("nan"), metrics


class Plain:
    """What a learner must equal: AdamW on whole batches."""

    def __init__(self, checkpoint: Path, settings: Optimization):
        self.model, self.settings, self.steps = load(checkpoint), settings, 0
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        free = [p for name, p in trained.items() if p.ndim < 2 or "position_bias" in name]
        decayed = [p for p in trained.values() if not any(p is other for other in free)]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
        self.trained = list(trained.values())
        self.optimizer = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps)

    def gradient(self, rows) -> dict[str, torch.Tensor]:
        self.optimizer.zero_grad()
        nll(self.model, collate(rows, "cpu"), {}, scale=1.0)[0].backward()
        return {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}

    def step(self, rows) -> float:
        """The gradient's norm before clipping."""
        self.gradient(rows)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.settings.gradient_clipping)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.steps, self.settings, STEPS)
        self.optimizer.step()
        self.steps += 1
        return float(norm)


@pytest.mark.parametrize(("ranks", "stage"), ENGINES)
def test_gradient_is_plain_torchs(learner, checkpoint, tmp_path, ranks, stage):
    """Read from the first moment after one unclipped step: (1 - beta1) times the gradient."""
    (rows,) = batches(1)
    ours = learner(ranks, stage, gradient_clipping=1e6)
    metrics = ours.step(rows, nll, scale=1.0)
    ours.save_state(tmp_path)
    moments = load_file(tmp_path / "a.safetensors")
    settings = optimization(ranks, stage, gradient_clipping=1e6)
    theirs = Plain(checkpoint, settings).gradient(rows)
    found = {name: moments[f"{name}/exp_avg"] / (1 - settings.betas[0]) for name in theirs}
    assert_near(found, theirs, 3e-6)
    whole = torch.cat([gradient.flatten().double() for gradient in theirs.values()])
    difference = whole - torch.cat([gradient.flatten().double() for gradient in found.values()])
    assert difference.norm() <= 1e-6 * whole.norm()
    assert metrics["grad_norm"] == pytest.approx(float(whole.norm()), rel=1e-6)
    assert metrics["tokens"] == sum(len(row["tokens"]) for row in rows)
    assert metrics["lr"] == pytest.approx(0.5e-3)


@pytest.mark.parametrize(("part", "count"), [("mtp", 20), ("indexer", 6)])
@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 1), (2, 3)])
def test_a_part_with_a_loss_of_its_own_learns_where_it_is_unfrozen(
    learner, checkpoint, tmp_path, ranks, stage, part, count
):
    """Gradients of both losses as above; without, the part does not belong to the learner's state."""
    (rows,) = batches(1)
    weight: dict[str, Any] = {f"{part}_weight": 0.3}
    settings = optimization(ranks, stage, gradient_clipping=1e6)
    ours = learner(ranks, stage)
    ours.save_state(tmp_path / "frozen")
    assert not any(f".{part}." in name for name in load_file(tmp_path / "frozen" / "a.safetensors"))
    ours.load(checkpoint, settings, STEPS, (part,))
    metrics = ours.step(rows, "pipelines.sft:loss", **weight)
    ours.save_state(tmp_path / "trained")
    moments = load_file(tmp_path / "trained" / "a.safetensors")
    model: Any = load(checkpoint)
    model.unfreeze(part)
    total, expected = sft_loss(model, collate(rows, "cpu"), {}, **weight)
    total.backward()
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert sum(f".{part}." in name for name in theirs) >= count
    assert_near({n: moments[f"{n}/exp_avg"] / (1 - settings.betas[0]) for n in theirs}, theirs, 3e-6)
    own = f"{part}_loss"
    assert total.item() == pytest.approx((expected["loss"] + 0.3 * expected[own]).item())
    assert metrics[own] == pytest.approx(expected[own].item(), rel=1e-5)


@pytest.mark.parametrize(("ranks", "stage"), ENGINES)
def test_updates_are_plain_adamws(learner, checkpoint, ranks, stage):
    """Clipping, schedule, weight decay. In the second step one rank has no compressed entry, and so another
    graph than the other; in the third there are fewer documents than ranks."""
    (rows,) = batches(1)
    data = [rows, rows[:4], rows[:1]]
    ours, theirs = learner(ranks, stage, gradient_clipping=0.1), Plain(checkpoint, optimization())
    theirs.settings = optimization(gradient_clipping=0.1)
    for rows in data:
        metrics = ours.step(rows, nll, scale=1.0)
        norm = theirs.step(rows)
        assert norm > 0.1
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert_near(weights(ours, checkpoint), theirs.model.state_dict(), 2e-6)


def test_micro_batches_do_not_change_a_gradient(learner):
    (rows,) = batches(1)
    norms = [
        learner(1, 1, micro_batch_tokens=tokens).step(rows, nll, scale=1.0)["grad_norm"] for tokens in (1, 45, 10**6)
    ]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-6)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 1), (2, 3)])
def test_resumed_run_is_bit_equal(learner, tmp_path, ranks, stage):
    data = batches(4)
    straight = learner(ranks, stage)
    for i, rows in enumerate(data):
        straight.step(rows, nll, scale=1.0)
        if i < 3:
            straight.save_state(tmp_path)
    expected = sent(straight).manifest
    for step in (3, 2):  # the folder holds the newest state and the one before
        resumed = learner(ranks, stage)
        assert sent(resumed).manifest != expected
        assert resumed.load_state(tmp_path, None if step == 3 else step) == step
        for rows in data[step:]:
            resumed.step(rows, nll, scale=1.0)
        assert sent(resumed).manifest == expected


def test_state_moves_to_other_ranks_and_stages(learner, checkpoint, tmp_path):
    data = batches(3)
    theirs = Plain(checkpoint, optimization())
    ours = learner(2, 3)
    for rows, engine in zip(data, [(2, 2), (1, 1), (2, 1)], strict=True):
        theirs.step(rows)
        ours.step(rows, nll, scale=1.0)
        ours.save_state(tmp_path)
        saved = sent(ours).manifest
        ours = learner(*engine)
        assert ours.load_state(tmp_path) == theirs.steps
        assert sent(ours).manifest == saved
    assert_near(weights(ours, checkpoint), theirs.model.state_dict(), 2e-6)


def test_states_that_are_not_whole_are_refused(learner, checkpoint, tmp_path):
    ours = learner(1, 1)
    with pytest.raises(UserError, match=r"state\.json: missing"):
        ours.load_state(tmp_path)
    ours.save_state(tmp_path)
    whole = (tmp_path / "a.safetensors").read_bytes()
    altered = bytearray(whole)
    altered[-1000] ^= 1
    for torn in (whole[:-1], whole[: len(whole) // 2], b"", bytes(altered)):
        (tmp_path / "a.safetensors").write_bytes(torn)
        with pytest.raises(UserError, match=r"a\.safetensors: missing, torn or altered; remove"):
            ours.load_state(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(whole)
    assert ours.load_state(tmp_path) == 0
    with pytest.raises(UserError, match=r"no state of step 5; it holds \[0\]"):
        ours.load_state(tmp_path, 5)
    model = load(checkpoint)
    model.config.vocab_size = 60
    save(initialize(model.config, seed=0), tmp_path / "smaller")
    ours.load(tmp_path / "smaller", optimization(), STEPS)
    with pytest.raises(UserError, match=r"shape \[64, 32\], the model has \[60, 32\]"):
        ours.load_state(tmp_path)
    (tmp_path / "state.json").write_text('[{"step": 0, "fi')
    with pytest.raises(UserError, match=r"state\.json: torn"):
        ours.load_state(tmp_path)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 3)])
def test_weights_reach_another_model_twice(learner, checkpoint, tmp_path, ranks, stage):
    """What is frozen does not travel, and is checked all the same."""
    ours, worker = learner(ranks, stage), load(checkpoint)
    assert not sent(ours).data, "nothing has changed"
    versions, bundle = [], sent(ours)
    for rows in batches(2):
        ours.step(rows, nll, scale=1.0)
        bundle = sent(ours)
        trained = {name for name, p in worker.named_parameters() if p.requires_grad}
        assert {bundle.manifest[i].name for i in bundle.moved} == trained
        transport.receive(worker, bundle)
        assert describe(worker) == bundle.manifest
        versions.append(bundle.manifest)
    assert versions[0] != versions[1]
    ours.save_model(tmp_path / "saved")
    assert describe(load(tmp_path / "saved")) == versions[1]
    table = "model.layers.0.mlp.gate.tid2eid"
    assert torch.equal(worker.state_dict()[table], load(checkpoint).state_dict()[table])
    worker.state_dict()[table][3] += 1
    with pytest.raises(SyncError, match=f"^{table}: checksum differs .* it was not sent"):
        transport.receive(worker, bundle)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 2)])
def test_a_learner_that_was_offloaded_goes_on_bit_equal(learner, ranks, stage):
    manifests = []
    for away in (False, True):
        ours = learner(ranks, stage)
        for rows in batches(2):
            ours.step(rows, nll, scale=1.0)
            if away:
                published = sent(ours)
                assert ours.offload() > ranks * 4 * 40_000
                again: Any = ray.get(ours.weights(published.version))
                assert [d.tobytes() for d in again.data] == [d.tobytes() for d in published.data]
                assert (again.manifest, again.moved) == (published.manifest, published.moved)
                with pytest.raises(RuntimeError, match="reload it first"):
                    ours.weights(published.version + 1)
                ours.reload()
        manifests.append(sent(ours).manifest)
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 2), (2, 3)])
def test_evaluation_adds_up_and_changes_nothing(learner, checkpoint, ranks, stage):
    (rows,) = batches(1)
    ours = learner(ranks, stage)
    before = sent(ours).manifest
    found = ours.evaluate(rows, nll, scale=1.0)
    with torch.no_grad():
        _, expected = nll(load(checkpoint), collate(rows, "cpu"), {}, scale=1.0)
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-6)
    assert sent(ours).manifest == before


@pytest.mark.parametrize("ranks", [1, 2])
def test_settings_and_shared_arrays_reach_the_loss(learner, ranks):
    """What is shared stays for every step until the next load."""
    (rows,) = batches(1)

    def norms(shared: float | None, scale: float) -> list[float]:
        ours = learner(ranks, 1, lr=1e-30)
        if shared is not None:
            ours.share({"one": np.array(shared, np.float32)})
        return [ours.step(rows, nll, scale=scale)["grad_norm"] for _ in range(2)]

    plain = norms(None, 1.0)
    assert plain == pytest.approx([plain[0]] * 2, rel=1e-5)
    for shared, scale, factor in ((3.0, 1.0, 3), (1.0, 3.0, 3), (None, 1.0, 1)):
        assert norms(shared, scale) == pytest.approx([factor * plain[0]] * 2, rel=1e-5)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 2), (2, 3)])
def test_failed_steps_leave_no_trace(learner, ranks, stage):
    """A loss's error comes as itself, a gradient that is not finite is one; neither changes what follows."""
    (rows,) = batches(1)
    ours = learner(ranks, stage)
    ours.step(rows, nll, scale=1.0)
    expected = sent(ours).manifest
    ours = learner(ranks, stage)
    before = sent(ours).manifest
    with pytest.raises(UserError, match=r"^recipe\.yaml:3: a key: no good$"):
        ours.step(rows, fails_everywhere)
    with pytest.raises(FloatingPointError, match="step 0: the gradient is not finite"):
        ours.step(rows, not_finite)
    assert sent(ours).manifest == before
    ours.step(rows, nll, scale=1.0)
    assert sent(ours).manifest == expected


def test_a_learner_that_cannot_load_leaves_no_process(checkpoint, monkeypatch):
    closed = []

    def refuse(*_):
        raise UserError("model.safetensors: cut short")

    monkeypatch.setattr(Learner, "_start", lambda self, ranks: self.workers.extend(range(ranks)))
    monkeypatch.setattr(Learner, "_all", refuse)
    monkeypatch.setattr(Learner, "close", lambda self: (closed.extend(self.workers), self.workers.clear()))
    with pytest.raises(UserError, match="cut short"):
        Learner(optimization(2), STEPS, checkpoint)
    assert closed == [0, 1]


def alive(worker) -> list[int]:
    from deepspeed.runtime.engine import DeepSpeedEngine

    gc.collect()
    kinds = [type(thing) for thing in gc.get_objects()]
    return [kinds.count(DeepSpeedEngine), kinds.count(DeepseekV4)]


@pytest.mark.parametrize(("ranks", "stages"), [(1, (1, 1)), (2, (1, 2, 3))])
def test_an_engine_goes_when_the_next_comes(learner, ranks, stages):
    (rows,) = batches(1)
    for stage in stages:
        learner(ranks, stage).step(rows, nll, scale=1.0)
    worker = learner(ranks, stages[0]).workers[0]
    assert wait(worker.__ray_call__.remote(alive), "counting", 60) == [1, 1]


def test_workers_do_not_see_the_repositorys_root(learner):
    """A folder named `kernels` there would shadow Hugging Face's."""
    worker = learner(1, 1).workers[0]
    paths = wait(worker.__ray_call__.remote(lambda _: [os.path.realpath(p) for p in sys.path]), "paths", 60)
    assert str(ROOT) not in paths


def test_waiting_ends_and_says_for_what(learner):
    worker = learner(1, 1).workers[0]
    forever = worker.__ray_call__.remote(lambda _: __import__("time").sleep(0.5))
    with pytest.raises(TimeoutError, match=r"^the sleeper to wake: not done after 0\.01 s$"):
        wait(forever, "the sleeper to wake", 0.01)


def test_losses_are_named_inside_the_package_only():
    from amalgam.rl import grpo

    assert named("rl.grpo:loss") is grpo.loss
    for outside in ("os:system", ".os:system", "..os:system"):
        with pytest.raises(ImportError):
            named(outside)


def test_schedule():
    def at(steps: int, **more) -> list[float]:
        return [round(lr_at(i, optimization(lr=1.0, min_lr_ratio=0.5, **more), 6), 4) for i in range(steps)]

    assert at(8, decay="constant") == [0.5, 1, 1, 1, 1, 1, 1, 1]
    assert at(8, decay="linear") == [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.5]
    assert at(8, decay="cosine") == [0.5, 1, 1, 0.9268, 0.75, 0.5732, 0.5, 0.5]
    assert at(2, decay="linear", warmup_steps=0) == [1, 0.9167]


def test_a_rank_that_fails_alone_does_not_leave_the_other_waiting(learner, monkeypatch):
    monkeypatch.setattr(learner_module, "_STRAGGLER_SECONDS", 0.5)
    (rows,) = batches(1)
    ours = learner(2, 1)
    with pytest.raises(KeyError, match="a document too long"):
        ours.step(rows, fails_on_the_longest)
    with pytest.raises(RuntimeError, match="it is closed"):
        ours.step(rows, nll, scale=1.0)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 1), (2, 3)])
def test_the_balance_rule_counts_the_whole_batch_and_resumes(learner, checkpoint, tmp_path, ranks, stage):
    """In the second step one rank has no document of its own. The state holds the biases where they change."""
    (rows,) = batches(1)
    ours = learner(ranks, stage, balance_speed=0.01)
    expected = {n: b.clone() for n, b in load(checkpoint).named_buffers() if "layers" in n and n.endswith("_bias")}
    for data in (rows, rows[:1]):
        model = load(checkpoint)
        transport.receive(model, sent(ours))
        batch = collate(data, "cpu")
        ids = model(batch["tokens"], batch["cu_seqlens"]).experts
        counts = [torch.bincount(ids[:, layer].flatten(), minlength=4).float() for layer in range(3)]
        for name, load_ in zip(expected, counts[1:], strict=True):
            expected[name] += 0.01 * torch.sign(load_.mean() - load_)
        metrics = ours.step(data, nll, scale=1.0)
        assert metrics["load_max"] == pytest.approx(sum(float(c.max() / c.mean()) for c in counts) / 3)
        assert metrics["load_idle"] == pytest.approx(sum(float((c == 0).float().mean()) for c in counts) / 3)
    ours.save_state(tmp_path)
    found = weights(ours, checkpoint)
    assert len(expected) == 2
    for name, bias in expected.items():
        torch.testing.assert_close(found[name], bias, rtol=0, atol=1e-7)
    again = learner(ranks, stage, balance_speed=0.01)
    again.load_state(tmp_path)
    resumed = weights(again, checkpoint)
    assert all(torch.equal(resumed[name], found[name]) for name in found)
