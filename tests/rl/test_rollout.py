"""Rollout workers with the real engine: order, text, versions, what they write down, and workers that die."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from tokenizers import Tokenizer

from amalgam.model import DeepseekV4
from amalgam.model.checkpoint import load
from amalgam.rl import transport
from amalgam.rl.cluster import usage, wait
from amalgam.rl.engine import Engine
from amalgam.rl.rollout import Rollouts
from amalgam.rl.rollout_worker import RolloutWorker
from amalgam.rl.settings import EngineSettings
from amalgam.rl.trajectory import Past, Request, SamplingParams, Trajectory
from amalgam.rl.weights import SyncError

from .. import tiny

SETTINGS = EngineSettings(max_batch=16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("rollout") / "model", 0)


@pytest.fixture(scope="module")
def workers(ray_session: None) -> Iterator[Rollouts]:
    made = Rollouts(2, deadline=120.0)
    yield made
    made.close()


@pytest.fixture
def pool(workers: Rollouts, checkpoint: Path, tmp_path: Path) -> Rollouts:
    """Two workers with the checkpoint's policy, and no deaths so far."""
    workers.load(checkpoint, journal=tmp_path / "journal", settings=SETTINGS)
    return workers


def requests(limit: int = 60) -> list[Request]:
    params = SamplingParams(max_new_tokens=limit, seed=11)
    return [replace(request, params=params) for request in tiny.requests(7, 3)]


def locally(model: DeepseekV4, version: int, limit: int = 60) -> list[Trajectory]:
    return Engine(model, [tiny.END], settings=SETTINGS).generate(requests(limit), version)


def assert_same(ours: list[Trajectory], theirs: list[Trajectory]) -> None:
    assert [t.request for t in ours] == [t.request for t in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        assert one.versions.tolist() == other.versions.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(one.experts, other.experts)


def pid(worker: Any) -> int:
    return wait(worker.__ray_call__.remote(lambda _: os.getpid()), "a worker's pid", 60.0)


def test_trajectories_come_in_the_requests_order_with_their_text(pool: Rollouts, checkpoint: Path):
    """As from an engine in this process, whichever worker had them."""
    found = pool.generate(requests())
    assert_same(found, locally(load(checkpoint), 0))
    assert {t.finish for t in found} == {"stop", "length"}, "the test needs both"
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    for t in found:
        ids = t.response_ids.tolist()
        assert t.text == tokenizer.decode(ids[:-1] if t.finish == "stop" else ids, skip_special_tokens=False)


def test_memory_that_was_handed_over_comes_back(pool: Rollouts):
    """Weights with `reload`, the cache with `restore`; the same tokens then, whatever happened meanwhile."""
    expected = pool.generate(requests())
    for _ in range(2):
        pool.offload()
        assert held(pool) == [(0, False)] * 2
        pool.reload()
        assert all(weights > 0 and not cache for weights, cache in held(pool))
        pool.restore()
        assert all(weights > 0 and cache for weights, cache in held(pool))
        assert_same(pool.generate(requests()), expected)


def held(pool: Rollouts) -> list[tuple[int, bool]]:
    """Of each worker: bytes of weights, and whether it has a cache."""

    def look(worker: Any) -> tuple[int, bool]:
        sizes = [p.untyped_storage().nbytes() for p in worker.engine.model.parameters()]
        return sum(sizes), worker.engine._batch is not None

    return [wait(worker.__ray_call__.remote(look), "what a worker holds", 60.0) for worker in pool.workers]


def test_fewer_requests_than_workers(pool: Rollouts):
    first = requests()[:1]
    (alone,) = pool.generate(first)
    assert_same([alone], pool.generate(requests())[:1])
    assert pool.generate([]) == []


def test_weights_of_two_updates_in_a_row_are_what_generate_uses(pool: Rollouts, checkpoint: Path):
    """Parameters and buffers; a load returns to the checkpoint's."""
    texts = [[t.text for t in pool.generate(requests())]]
    for version in (1, 2):
        model = tiny.model(version)
        pool.sync(ray.put(transport.publish(model, version)), version)
        found = pool.generate(requests())
        assert_same(found, locally(model, version))
        texts.append([t.text for t in found])
    assert texts[0] != texts[1] != texts[2]
    pool.load(checkpoint)
    assert [t.text for t in pool.generate(requests())] == texts[0]


def test_the_peak_of_memory_counts_from_the_load(pool: Rollouts, checkpoint: Path):
    call = pool.workers[0].__ray_call__.remote(lambda _: len(bytearray(300 << 20)))
    assert wait(call, "memory to be used", 60.0)
    before = [used.peak_rss_bytes for used in usage(pool.workers)]
    pool.load(checkpoint)
    after = [used.peak_rss_bytes for used in usage(pool.workers)]
    assert after[0] < before[0] - (200 << 20)
    assert abs(after[1] - before[1]) < 100 << 20


def test_weights_of_another_model_are_refused(pool: Rollouts):
    call = pool.workers[1].update.remote(transport.publish(tiny.model(0, hidden_size=48), 5))
    with pytest.raises(SyncError):
        wait(call, "a refusal", 60.0)
    assert pool.generate(requests()[:1])[0].versions.tolist()[0] == 0


def test_a_dead_workers_requests_go_on_from_their_last_token(pool: Rollouts):
    """With the policy that was synced. Experts are known but of a prompt whose response was whole already."""
    model = tiny.model(3)
    pool.sync(ray.put(transport.publish(model, 6)), 6)
    wanted = requests(200)
    expected = locally(model, 6, 200)
    pool.submit(wanted)
    first = next(pool.results())
    os.kill(pid(pool.workers[0]), signal.SIGKILL)
    found = {t.request: t for t in (first, *pool.results())}
    assert pool.deaths == 1
    assert len(found) == len(wanted)
    for one in expected:
        ours = found[one.request]
        assert ours.response_ids.tolist() == one.response_ids.tolist()
        assert ours.versions.tolist() == one.versions.tolist()
        assert (ours.finish, ours.text != "") == (one.finish, True)
        np.testing.assert_allclose(ours.logprobs, one.logprobs, rtol=0, atol=1e-5)
        known = ours.experts[..., 0] >= 0
        np.testing.assert_array_equal(ours.experts[known], one.experts[known])
        assert known[:-1].all() or not known[: len(ours.prompt_ids)].any()


@pytest.mark.parametrize("limit", [1, 40])
def test_a_request_whose_past_is_whole_ends_without_a_token(
    ray_session: None, checkpoint: Path, tmp_path: Path, limit: int
):
    """As one that was finished, and not yet delivered, when its worker died: nothing is known of its prompt."""
    (whole,) = locally(load(checkpoint), 0, limit)[5:6]
    past = Past(whole.response_ids, whole.logprobs, whole.versions, whole.experts[len(whole.prompt_ids) :])
    worker = RolloutWorker("cpu", 1, deadline=60.0)
    worker.load(str(checkpoint), str(tmp_path / "journal"), SETTINGS)
    worker.submit([replace(requests(limit)[5], past=past)])
    report = worker.poll(60.0)
    (found,) = report.finished
    assert report.tokens == 0
    assert (found.response_ids.tolist(), found.finish) == (whole.response_ids.tolist(), whole.finish)
    assert found.experts.shape == whole.experts.shape
    known = found.experts >= 0
    assert known.all((1, 2)).sum() == len(whole.response_ids) - 1
    np.testing.assert_array_equal(found.experts[known], whole.experts[known])


def test_a_worker_that_dies_between_two_calls_is_replaced(pool: Rollouts):
    expected = pool.generate(requests())
    os.kill(pid(pool.workers[1]), signal.SIGKILL)
    assert [used.cpu_seconds > 0 for used in usage(pool.workers)] == [True, False]
    assert_same(pool.generate(requests()), expected)
    assert pool.deaths == 1
