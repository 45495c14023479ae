"""The learner, weight sync and rollouts with a model of transformers' own whose embedding is its head too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from amalgam.model import load
from amalgam.rl.learner import Learner
from amalgam.rl.packing import Row
from amalgam.rl.rollout_worker import RolloutWorker
from amalgam.rl.settings import EngineSettings, Optimization
from amalgam.rl.weights import describe

from .. import other_models

STEPS = 2
SETTINGS: dict[str, Any] = {"lr": 1e-2, "decay": "constant", "warmup_steps": 0, "weight_decay": 0.1, "eps": 1e-3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return other_models.checkpoint(tmp_path_factory.mktemp("tied") / "model", "llama, tied")


def documents() -> list[Row]:
    rng = np.random.default_rng(0)
    lengths = [40, 2, 9, 1, 17]
    tokens = [rng.integers(other_models.VOCABULARY, size=n).astype(np.int32) for n in lengths]
    return [{"tokens": t, "weight": np.full(len(t), 1 / sum(lengths), np.float32)} for t in tokens]


def trained_by_torch(checkpoint: Path) -> dict[str, torch.Tensor]:
    """transformers and torch's AdamW alone, one document at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": SETTINGS["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=SETTINGS["lr"], eps=SETTINGS["eps"], betas=Optimization(lr=1).betas)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for row in documents():
            ids = torch.from_numpy(row["tokens"]).long()[None]
            scores = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])
            (-scores.sum() * float(row["weight"][0])).backward()
        torch.nn.utils.clip_grad_norm_(parameters, Optimization(lr=1).gradient_clipping)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def test_steps_are_torchs_and_reach_a_worker_and_the_disk(ray_session: None, checkpoint: Path, tmp_path: Path):
    """On two ranks that share parameters and optimizer; one rank is tests/pipelines/test_other_models.py's."""
    settings = Optimization(**SETTINGS, ranks=2, zero_stage=3, micro_batch_tokens=45)
    worker: Any = RolloutWorker("cpu", 1)
    worker.load(str(checkpoint), str(tmp_path / "journal"), EngineSettings())
    with Learner(settings, STEPS, checkpoint, deadline=120) as learner:
        losses = [learner.step(documents(), "pipelines.sft:loss")["loss"] for _ in range(STEPS)]
        bundle: Any = ray.get(learner.weights(3))
        learner.save_model(tmp_path / "trained")
    assert losses[1] < losses[0]
    expected = trained_by_torch(checkpoint)
    worker.update(bundle)
    saved: Any = load(tmp_path / "trained")
    for model in (worker.engine.model, saved):
        parameters = dict(model.lm.named_parameters())
        assert parameters.keys() == expected.keys()
        for name, wanted in expected.items():
            torch.testing.assert_close(parameters[name], wanted, rtol=1e-4, atol=1e-5)
        assert model.lm_head.weight is model.lm.model.embed_tokens.weight
    assert len(bundle.manifest) == len(expected), "the head travels as the embedding"
    assert describe(worker.engine.model) == bundle.manifest
