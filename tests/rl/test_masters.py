"""bf16 weights beside fp32 masters, in the learner's processes: against plain torch on masters of one's own."""

import shutil
import sys
from typing import Any

import pytest
import torch
from ray import cloudpickle
from safetensors.torch import load_file

from amalgam.errors import UserError
from amalgam.model import load
from amalgam.model.config import PRESETS
from amalgam.rl import transport
from amalgam.rl.masters import Masters
from amalgam.rl.optimizer import lr_at
from amalgam.rl.packing import collate, plan
from amalgam.rl.rollout_worker import RolloutWorker
from amalgam.rl.settings import EngineSettings
from amalgam.rl.weights import describe
from amalgam.settings import Precision

from .. import other_models
from .small_learner import STEPS, assert_near, batches, nll, optimization, sent

# The ranks' processes cannot import this file: what they run of it travels by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

BF16 = Precision(compute="bfloat16")


def summed_gradients(model: Any, rows: list, tokens: int, ranks: int) -> dict[str, torch.Tensor]:
    """Of the learner's micro-batches, each in bf16, added in fp32."""
    sums = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in model.named_parameters() if p.requires_grad}
    for batch in (batch for own in plan([len(row["tokens"]) for row in rows], tokens, ranks) for batch in own if batch):
        model.zero_grad()
        nll(model, collate([rows[i] for i in batch], "cpu"), {}, scale=1.0)[0].backward()
        for name, total in sums.items():
            grad = model.get_parameter(name).grad
            total += 0 if grad is None else grad.float()
    return sums


@pytest.mark.parametrize(("ranks", "stage", "tokens"), [(1, 1, 45), (1, 1, 10**6), (2, 0, 45), (2, 1, 45), (2, 2, 45)])
def test_masters_are_stepped_and_weights_follow(learner, checkpoint, tmp_path, ranks, stage, tokens):
    ours = learner(ranks, stage, BF16, micro_batch_tokens=tokens, gradient_clipping=0.1)
    settings = optimization(gradient_clipping=0.1)
    model = load(checkpoint, torch.bfloat16)
    masters = {n: torch.nn.Parameter(p.detach()) for n, p in load(checkpoint).named_parameters()}
    masters = {n: masters[n] for n, p in model.named_parameters() if p.requires_grad}
    decayed = {n: p.ndim >= 2 and "position_bias" not in n for n, p in masters.items()}
    groups = [
        {"params": [p for n, p in masters.items() if decayed[n] is wanted], "weight_decay": wanted * 0.1}
        for wanted in (True, False)
    ]
    theirs = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps)
    for step, rows in enumerate(batches(2)):
        for name, total in summed_gradients(model, rows, tokens, ranks).items():
            masters[name].grad = total
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), 0.1)
        assert norm > 0.1
        for group in theirs.param_groups:
            group["lr"] = lr_at(step, settings, STEPS)
        theirs.step()
        with torch.no_grad():
            for name, master in masters.items():
                model.get_parameter(name).copy_(master)
        assert ours.step(rows, nll, scale=1.0)["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        ours.save_state(tmp_path / str(step))
        found = load_file(tmp_path / str(step) / "a.safetensors")
        assert_near({n: found[f"{n}/weight"] for n in masters}, dict(masters), 1e-5)
        transport.receive(model, sent(ours))  # a last bit of a master may turn one of a weight; go on from the same
        for name, master in masters.items():
            master.data.copy_(found[f"{name}/weight"])
            weight = model.get_parameter(name)
            assert torch.equal(weight, master.to(weight.dtype))


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 1)])
def test_a_resumed_run_is_bit_equal(learner, checkpoint, tmp_path, ranks, stage):
    """A state holds masters to the bit, those of the checkpoint's file at first."""
    data = batches(2)
    straight = learner(ranks, stage, BF16)
    straight.save_state(tmp_path / "start")
    start = load_file(tmp_path / "start" / "a.safetensors")
    trained = {n: p for n, p in load(checkpoint).named_parameters() if p.requires_grad}
    assert all(torch.equal(start[f"{n}/weight"], p) for n, p in trained.items())
    assert any(not torch.equal(p.bfloat16().float(), p) for p in trained.values())
    straight.step(data[0], nll, scale=1.0)
    straight.save_state(tmp_path)
    straight.step(data[1], nll, scale=1.0)
    expected = sent(straight).manifest
    resumed = learner(ranks, stage, BF16)
    assert resumed.load_state(tmp_path) == 1
    resumed.step(data[1], nll, scale=1.0)
    assert sent(resumed).manifest == expected


def test_worker_and_checkpoint_get_the_learners_weights(learner, tmp_path):
    """The same dtypes and bits, and so the same log-probs of the same pack."""
    ours = learner(1, 1, BF16, micro_batch_tokens=10**6)
    worker = RolloutWorker("cpu", 1, BF16)
    ours.save_model(tmp_path / "start")
    shutil.copy(PRESETS / "tiny" / "tokenizer.json", tmp_path / "start")
    (tmp_path / "start" / "generation_config.json").write_text('{"eos_token_id": 1}')
    worker.load(str(tmp_path / "start"), str(tmp_path / "journal"), EngineSettings())
    (rows,) = batches(1)
    ours.step(rows, nll, scale=1.0)
    bundle = sent(ours)
    worker.update(bundle)
    ours.save_model(tmp_path / "trained")
    saved = load(tmp_path / "trained", precision=BF16)
    for model in (worker.engine.model, saved):
        assert describe(model) == bundle.manifest
        with torch.no_grad():
            metrics = nll(model, collate(rows, "cpu"), {}, scale=1.0)[1]
        assert ours.evaluate(rows, nll, scale=1.0) == {name: float(value) for name, value in metrics.items()}
    kept = {name: entry.dtype for name, entry in ((entry.name, entry) for entry in bundle.manifest)}
    assert kept["lm_head.weight"] == "bfloat16"
    assert kept["model.layers.0.attn_hc.fn"] == kept["model.norm.weight"] == "float32"


@torch.no_grad()
def test_masters_of_another_model_whose_head_is_its_embedding(tmp_path):
    path = other_models.checkpoint(tmp_path / "model", "llama, tied")
    model: Any = load(path, precision=BF16)
    values = dict(load(path).named_parameters())
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    masters = Masters(dict(model.named_parameters()), values)
    for name, master in masters.by_name.items():
        assert master.dtype == torch.float32 and torch.equal(master, values[name])
        master.mul_(1.01)
    masters.write()
    assert model.lm_head.weight is model.lm.model.embed_tokens.weight
    for name, (p, place) in before.items():
        assert torch.equal(p, masters.by_name[name].bfloat16()) and p.data_ptr() == place


def test_shards_of_narrow_weights_are_refused(learner):
    message = "optimizer.zero_stage: 3 shards float32 weights, and precision.compute is bfloat16; give 2, or precision"
    with pytest.raises(UserError, match=message):
        learner(2, 3, BF16)
