"""The rollout pool: order, text, versions, two updates in a row, and workers that die."""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray import cloudpickle
from tokenizers import Tokenizer

from amalgam.model import DeepseekV4
from amalgam.model.checkpoint import load
from amalgam.rl import transport
from amalgam.rl.cluster import usage, wait
from amalgam.rl.engine import Engine
from amalgam.rl.rollout import Rollouts, _shares
from amalgam.rl.trajectory import Request, Trajectory
from amalgam.rl.weights import SyncError

from .. import tiny

# A worker's process cannot import this file: what it runs of it travels by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

LIMITS = {"temperature": 1.0, "max_new_tokens": 60, "seed": 11}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("rollout") / "model", 0)


@pytest.fixture(scope="module")
def workers(ray_session: None) -> Iterator[Rollouts]:
    made = Rollouts(2, deadline=120.0)
    yield made
    made.close()


@pytest.fixture
def pool(workers: Rollouts, checkpoint: Path) -> Rollouts:
    """Two workers with the checkpoint's policy, and no deaths so far."""
    workers.load(checkpoint)
    return workers


def requests() -> list[Request]:
    return tiny.requests(7, 3)


def locally(model: DeepseekV4, version: int) -> list[Trajectory]:
    return Engine(model, [tiny.END]).generate(tiny.asked(requests(), **LIMITS), version)


def assert_same(ours: list[Trajectory], theirs: list[Trajectory]) -> None:
    assert [t.request for t in ours] == [t.request for t in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        assert one.versions.tolist() == other.versions.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(one.experts, other.experts)


def kill(worker: Any) -> None:
    """SIGKILL, and the certainty that it arrived."""
    pid = wait(worker.__ray_call__.remote(lambda _: os.getpid()), "a worker's pid", 60.0)
    os.kill(pid, signal.SIGKILL)


def killed_when_it_works(worker: Any) -> Callable[[], bool]:
    """Kills the worker as soon as it has used the processor for a while longer; the result says whether that came."""
    pid = wait(worker.__ray_call__.remote(lambda _: os.getpid()), "a worker's pid", 60.0)

    def ticks() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def watch() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if ticks() >= start + 10:  # a tenth of a second
                os.kill(pid, signal.SIGKILL)
                done.set()
                return
            time.sleep(0.005)

    start, done = ticks(), threading.Event()
    threading.Thread(target=watch, daemon=True).start()
    return done.is_set


def test_trajectories_come_in_the_requests_order_with_their_text(pool: Rollouts, checkpoint: Path):
    """As from an engine in this process, whichever worker had them."""
    found = pool.generate(requests(), **LIMITS)
    assert_same(found, locally(load(checkpoint), 0))
    assert {t.finish for t in found} == {"stop", "length"}, "the test needs both"
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    for t in found:
        ids = t.response_ids.tolist()
        assert t.text == tokenizer.decode(ids[:-1] if t.finish == "stop" else ids, skip_special_tokens=False)


def test_fewer_requests_than_workers(pool: Rollouts):
    first = requests()[:1]
    (alone,) = pool.generate(first, **LIMITS)
    assert_same([alone], pool.generate(requests(), **LIMITS)[:1])
    assert pool.generate([], **LIMITS) == []


def test_shares_cut_no_group_and_are_nearly_even():
    for count in (1, 2, 3, 5):
        shares = _shares(requests(), count)
        assert [r.id for share in shares for r in share] == [r.id for r in requests()]
        groups = [{r.group for r in share} for share in shares]
        assert sum(map(len, groups)) == 7
        assert max(map(len, shares)) - min(map(len, shares)) <= 2 * 3


def test_weights_of_two_updates_in_a_row_are_what_generate_uses(pool: Rollouts, checkpoint: Path):
    """Parameters and buffers; a load returns to the checkpoint's."""
    texts = [[t.text for t in pool.generate(requests(), **LIMITS)]]
    for version in (1, 2):
        model = tiny.model(version)
        pool.sync(ray.put(transport.publish(model, version)), version)
        found = pool.generate(requests(), **LIMITS)
        assert_same(found, locally(model, version))
        texts.append([t.text for t in found])
    assert texts[0] != texts[1] != texts[2]
    pool.load(checkpoint)
    assert [t.text for t in pool.generate(requests(), **LIMITS)] == texts[0]


def test_the_peak_of_memory_counts_from_the_load(pool: Rollouts, checkpoint: Path):
    call = pool.workers[0].__ray_call__.remote(lambda _: len(bytearray(300 << 20)))
    assert wait(call, "memory to be used", 60.0)
    before = [used.peak_rss_bytes for used in usage(pool.workers)]
    pool.load(checkpoint)
    after = [used.peak_rss_bytes for used in usage(pool.workers)]
    assert after[0] < before[0] - (200 << 20)
    assert abs(after[1] - before[1]) < 100 << 20


def test_another_version_is_refused(pool: Rollouts):
    pool.sync(ray.put(transport.publish(tiny.model(0), 4)), 4)
    call = pool.workers[0].generate.remote(requests(), 1.0, 5, 0, 3)
    with pytest.raises(RuntimeError, match="version 3 of the policy, but this worker has 4"):
        wait(call, "a refusal", 60.0)
    call = pool.workers[1].update.remote(transport.publish(tiny.model(0, hidden_size=48), 5))
    with pytest.raises(SyncError):
        wait(call, "a refusal", 60.0)
    assert pool.generate(requests()[:1], **LIMITS)[0].versions.tolist()[0] == 4


class Dying:
    """A worker that ends while it loads, as one without enough memory would."""

    def load(self, path: str) -> None:
        print("one\nno memory left", file=sys.stderr, flush=True)
        os._exit(1)


def test_dead_workers_are_replaced_until_the_third(pool: Rollouts, monkeypatch: pytest.MonkeyPatch):
    """One killed while it samples; its replacement has the policy that was synced. Then one that cannot be replaced."""
    pool.sync(ray.put(transport.publish(tiny.model(3), 6)), 6)
    many = {**LIMITS, "max_new_tokens": 200}
    long = pool.generate(requests(), **many)
    died = killed_when_it_works(pool.workers[0])
    assert_same(pool.generate(requests(), **many), long)
    assert died()
    assert pool.deaths == 1
    monkeypatch.setattr(pool, "_start", lambda: ray.remote(Dying).options(num_cpus=0).remote())
    kill(pool.workers[1])
    assert [used.cpu_seconds > 0 for used in usage(pool.workers)] == [True, False]
    words = r"its log, /\S+/worker-\w+-\w+-\d+\.err, ended with:\none\nno memory left$"
    with pytest.raises(RuntimeError, match=f"^rollout workers died 3 times in this stage; the last: {words}") as caught:
        pool.generate(requests(), **LIMITS)
    assert caught.value.__cause__ is not None
    assert re.match(words, caught.value.__cause__.__notes__[-1])
