"""Quantization-aware training across processes: the learner, the rollout workers and the teachers compute the same."""

from dataclasses import replace

import numpy as np
import pytest
import ray
import torch

from amalgam.distill.teacher import Teachers
from amalgam.model import DeepseekV4
from amalgam.model.attention import Compressor
from amalgam.model.checkpoint import load
from amalgam.rl import transport
from amalgam.rl.engine import Engine
from amalgam.rl.fleet import Fleet
from amalgam.rl.packing import collate
from amalgam.rl.settings import EngineSettings, Optimization
from amalgam.rl.trajectory import Request, SamplingParams, Trajectory
from amalgam.settings import Precision

from .. import tiny

V4 = Precision(experts="fp4", indexer="fp4", kv="fp8")
LIMITS = SamplingParams(max_new_tokens=40, seed=5)


def requests() -> list[Request]:
    return [replace(request, params=LIMITS) for request in tiny.requests(5, 2)]


@torch.no_grad()
def assert_logprobs_are_the_learners(model: DeepseekV4, found: list[Trajectory]) -> None:
    batch = collate([t.row() | {"experts": t.experts} for t in found], "cpu")
    logprobs = model.logprobs(batch["tokens"], batch["cu_seqlens"]).numpy()
    ends = batch["cu_seqlens"].tolist()[1:]
    differences = [abs(t.logprobs - logprobs[e - len(t.response_ids) : e]) for t, e in zip(found, ends, strict=True)]
    # Few may differ more: fp32 rounding of another batch's shape can turn a value on a border between two codes.
    assert np.mean(np.concatenate(differences) > 1e-5) <= 0.05
    assert np.concatenate(differences).max() < 0.1


@pytest.mark.usefixtures("ray_session")
def test_a_fleet_trains_samples_and_teaches_with_its_precision(tmp_path):
    """Two steps of plain AdamW on fp32 masters whose gradients come from the rounded forward; samples after each."""
    path = tiny.checkpoint(tmp_path / "model", 0, moe_intermediate_size=32, index_head_dim=32)
    optimization = Optimization(lr=1e-2, eps=1e-3, gradient_clipping=1e6)
    plain = load(path, precision=V4)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.95))
    for group in optimizer.param_groups:
        group.update(eps=1e-3, weight_decay=0.0)
    with (
        Fleet(precision=V4) as fleet,
        fleet.learner(path, optimization, 2) as learner,
        fleet.rollouts(path, 1, tmp_path / "journal") as rollouts,
        Teachers([path], **fleet.place) as teachers,
    ):
        for version in (1, 2):
            found = rollouts.generate(requests())
            assert_logprobs_are_the_learners(plain, found)
            rows = [{"tokens": t.row()["tokens"], "weight": np.full(len(t), 1e-2, np.float32)} for t in found]
            learner.step(rows, "pipelines.sft:loss")
            batch = collate(rows, "cpu")
            optimizer.zero_grad()
            (-batch["weight"] * plain.logprobs(batch["tokens"], batch["cu_seqlens"])).sum().backward()
            optimizer.step()
            bundle = learner.weights(version)
            received = load(path)
            transport.receive(received, ray.get(bundle))
            for name, tensor in received.state_dict().items():
                torch.testing.assert_close(plain.state_dict()[name], tensor, rtol=1e-4, atol=1e-4, msg=name)
            transport.receive(plain, ray.get(bundle))  # a rounding may turn on the last bit; go on from the same
            rollouts.sync(bundle, version)
        assert_logprobs_are_the_learners(plain, rollouts.generate(requests()))
        document = np.arange(3, 60, dtype=np.int32)
        (states,) = teachers.hidden([document], [0], 100)
    with torch.no_grad():
        tokens, cu = torch.from_numpy(document).long(), torch.tensor([0, 57])
        ours, full = (load(path, precision=p)(tokens, cu).hidden.numpy() for p in (V4, Precision()))
    np.testing.assert_allclose(states, ours, rtol=0, atol=2e-5)
    assert abs(states - full).max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_engine_whose_cache_is_bytes_gives_the_same_responses(tmp_path, dtype: torch.dtype):
    """As with the cache in the model's dtype, in which a page takes more memory; groups are forked, some wait."""
    path, found, pages = tiny.checkpoint(tmp_path / "model", 0, moe_intermediate_size=32, index_head_dim=32), [], []
    for in_bytes in (True, False):
        model = load(path, dtype=dtype, precision=V4, stored=True)
        for module in model.modules():
            if isinstance(module, Compressor):
                module.in_bytes &= in_bytes
        engine = Engine(model, (tiny.END,), settings=EngineSettings(context=112, max_batch=4, picks=True), page=28)
        found.append(engine.generate(requests(), 1))
        pages.append(engine._batch.cache.page_bytes)
    assert pages[0] < pages[1]
    for one, other in zip(*found, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        for name in ("logprobs", "experts", "picks"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
