"""The rollout service with engines that count: deaths, hangs, room, weights in flight, what can never run."""

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amalgam.rl.cluster import wait
from amalgam.rl.router import MAX_DEATHS
from amalgam.rl.settings import EngineSettings

from .fake_engine import WINDOW, FakeRollouts, length, policy, requests, response

SECONDS = 0.002  # of a step


@pytest.fixture(scope="module")
def workers(ray_session: None) -> Iterator[FakeRollouts]:
    made = FakeRollouts(2, deadline=120.0)
    yield made
    made.close()


@pytest.fixture
def pool(workers: FakeRollouts, tmp_path: Path) -> FakeRollouts:
    """Two workers with room for five requests each."""
    load(workers, tmp_path)
    return workers


def load(pool: FakeRollouts, folder: Path, seconds: float = SECONDS) -> None:
    pool.load(policy(folder / "policy", seconds), journal=folder / "journal", settings=EngineSettings(max_batch=4))


def pid(worker: Any) -> int:
    return wait(worker.__ray_call__.remote(lambda _: os.getpid()), "a worker's pid", 60.0)


def test_all_come_in_order_and_nobody_has_more_than_its_room(pool: FakeRollouts, tmp_path: Path):
    wanted = requests(20, 3)
    found = pool.generate(wanted)
    assert [t.request for t in found] == [r.id for r in wanted]
    assert [t.response_ids.tolist() for t in found] == [response(r) for r in wanted]
    metrics = pool.metrics()
    assert metrics["rollout/tokens_per_second"] > 0
    assert 0 < metrics["rollout/batch"] <= 4
    assert 0 < metrics["rollout/queue"] <= 4
    assert metrics["rollout/preemptions"] >= 20, "each half step, as the fake one says"
    assert 0 < metrics["rollout/time_to_first_token"] < 60
    assert (metrics["rollout/cache_use"], metrics["rollout/deaths"]) == (1.0, 0.0)
    assert pool.metrics()["rollout/tokens_per_second"] == 0
    assert pool.generate([]) == []
    with pytest.raises(ValueError, match="is on its way already"):
        pool.submit([*wanted[:1], *wanted[:1]])
    assert len(list(pool.results())) == 1


def test_killed_workers_requests_go_on_from_their_last_token(pool: FakeRollouts, tmp_path: Path):
    """At three moments; no token is sampled twice, none is lost, and the versions are all there."""
    wanted, killed, found = requests(12, 4, limit=120), 0, []
    pool.submit(wanted)
    before = [pid(worker) for worker in pool.workers]
    for trajectory in pool.results():
        found.append(trajectory)
        if killed < 3 and len(found) > 12 * killed:
            os.kill(pid(pool.workers[killed % 2]), signal.SIGKILL)
            killed += 1
    assert (killed, pool.deaths, pool.metrics()["rollout/deaths"]) == (3, 3, 3.0)
    by_id = {t.request: t.response_ids.tolist() for t in found}
    assert len(found) == len(wanted)
    assert by_id == {r.id: response(r) for r in wanted}
    drawn = (tmp_path / "policy" / "drawn").read_text().splitlines()
    missing = sum(map(length, wanted)) - len(drawn)  # journaled by one that was killed before it wrote there
    assert 0 <= missing <= 3 * 4
    assert len(set(drawn)) == len(drawn), "a token was sampled twice"
    assert all(pid(worker) not in before for worker in pool.workers)
    assert [t.response_ids.tolist() for t in pool.generate(wanted[:9])] == [response(r) for r in wanted[:9]]
    assert len(list((tmp_path / "journal").iterdir())) == 2, "what the dead left is removed"


def impatient(pool: FakeRollouts, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """The deadline until the first death: another worker may take its time to start."""
    died, usual = pool._died, pool._deadline

    def patient(*args: Any) -> None:
        pool._deadline = usual
        died(*args)

    monkeypatch.setattr(pool, "_died", patient)
    pool._deadline = seconds


def test_an_engine_that_hangs_is_named_and_replaced(
    pool: FakeRollouts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    impatient(pool, monkeypatch, 1.5)
    (tmp_path / "policy" / "hang").write_text("30")
    wanted = requests(2, 4, limit=200)  # all are taken before
    assert [t.response_ids.tolist() for t in pool.generate(wanted)] == [response(r) for r in wanted]
    assert pool.deaths == 1
    assert re.search(r"the engine of rollout worker \d to end its step 31: not done after", caplog.text)


def test_a_worker_that_does_not_answer_is_named_and_replaced(
    pool: FakeRollouts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The process itself stands still."""
    os.kill(pid(pool.workers[1]), signal.SIGSTOP)
    impatient(pool, monkeypatch, 1.5)
    wanted = requests(8, 2)
    assert [t.response_ids.tolist() for t in pool.generate(wanted)] == [response(r) for r in wanted]
    assert pool.deaths == 1
    assert "rollout worker 1 to take 4 requests: not done after 1.5 s" in caplog.text


def test_new_weights_reach_requests_in_flight(pool: FakeRollouts):
    """Each token keeps the version that sampled it; a worker that starts meanwhile has the last one."""
    wanted = requests(4, 4, limit=200)
    pool.submit(wanted)
    found = [next(pool.results())]
    os.kill(pid(pool.workers[0]), signal.SIGKILL)
    pool.sync(3, 3)
    found += pool.results()
    assert {t.request: t.response_ids.tolist() for t in found} == {r.id: response(r) for r in wanted}
    versions = [t.versions.tolist() for t in found]
    assert all(v == sorted(v) for v in versions)
    assert {0, 3} == {each for v in versions for each in v}
    assert any(len(set(v)) == 2 for v in versions)
    assert len(pool.receivers) >= 1


def test_a_worker_that_starts_later_asks_for_a_handle_of_its_own(pool: FakeRollouts):
    """Where the weights went to those that served alone."""
    asked = []
    pool.sync(4, 4, later=lambda: asked.append(1) or 4)
    assert asked == []
    wanted = requests(8, 4, limit=200)
    pool.submit(wanted)
    os.kill(pid(pool.workers[0]), signal.SIGKILL)
    found = list(pool.results())
    while any(place.starts for place in pool._places):
        pool._turn(1.0)
    assert asked == [1]
    assert {v for t in [*found, *pool.generate(requests(8, 2))] for v in t.versions.tolist()} == {4}


@pytest.mark.parametrize("dead", [1, 2])
def test_workers_that_die_while_offloaded_take_no_memory_before_the_others(pool: FakeRollouts, dead: int):
    """And then have the last version; one that starts when memory is handed over has to be there first."""
    wanted = requests(8, 3)
    expected = [response(r) for r in wanted]
    os.kill(pid(pool.workers[1]), signal.SIGKILL)
    assert [t.response_ids.tolist() for t in pool.generate(wanted)] == expected
    pool.offload()
    assert (pool.deaths, held(pool)) == (1, [set(), set()])
    pool.offload()  # once
    for worker in pool.workers[:dead]:
        os.kill(pid(worker), signal.SIGKILL)
    pool.reload()
    pool.sync(5, 5, later=lambda: 5)
    assert (pool.deaths, len(pool.receivers)) == (1 + dead, 2 - dead)
    assert held(pool) == [None] * dead + [{"weights"}] * (2 - dead)
    pool.restore()
    found = pool.generate(wanted)
    assert [t.response_ids.tolist() for t in found] == expected
    assert {v for t in found for v in t.versions.tolist()} == {5}
    pool.submit(wanted)
    with pytest.raises(RuntimeError, match="^24 requests have not ended: their workers' memory is in use"):
        pool.offload()
    assert len(list(pool.results())) == len(wanted)
    pool.offload()
    assert held(pool) == [set(), set()]


def held(pool: FakeRollouts) -> list[Any]:
    """What of each worker's is on the device; None: it has loaded nothing."""
    what: Any = lambda worker: worker.engine and worker.engine.held  # noqa: E731
    return [wait(worker.__ray_call__.remote(what), "what a worker holds", 60.0) for worker in pool.workers]


def test_cancelled_and_impossible_requests_end_by_themselves(pool: FakeRollouts):
    """Some with a worker, some still here, some with a worker that dies; the others are as they would be."""
    wanted = requests(20, 4, limit=150)
    wanted[5].prompt_ids = np.zeros(WINDOW + 1, np.int32)
    pool.submit(wanted)
    first = next(pool.results())
    cancelled = [r.id for r in wanted if r.id not in (first.request, wanted[5].id)][::2]
    pool.cancel(cancelled)
    os.kill(pid(pool.workers[1]), signal.SIGKILL)
    found = {t.request: t for t in (first, *pool.results())}
    assert len(found) == len(wanted)
    assert (found[wanted[5].id].finish, found[wanted[5].id].error) == (
        "failed",
        f"a prompt of {WINDOW + 1} tokens, the window has {WINDOW}",
    )
    for each in wanted:
        tokens, whole = found[each.id].response_ids.tolist(), response(each)
        assert tokens == whole[: len(tokens)]
        if each.id not in cancelled and each is not wanted[5]:
            assert (tokens, found[each.id].finish) == (whole, "stop")
    ends = [found[each].finish for each in cancelled]
    assert ends.count("cancelled") > len(ends) // 2, "those that were not about to end anyway"


def test_a_journal_that_cannot_be_written_is_told_once(
    pool: FakeRollouts, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "policy" / "lost").touch()
    wanted = requests(1, 4)
    assert [t.response_ids.tolist() for t in pool.generate(wanted)] == [response(r) for r in wanted]
    pool.generate(wanted)
    assert caplog.text.count("cannot be written") == 1


def test_a_request_never_begins_anew_unseen(pool: FakeRollouts, tmp_path: Path):
    """Where the journal of a worker that died is not to be seen."""
    pool.submit(requests(1, 4, limit=1000))
    pool._turn(1.0)
    (at,) = [place.index for place in pool._places if pool._router.holds(place.worker)]
    os.kill(pid(pool.workers[at]), signal.SIGKILL)
    shutil.rmtree(tmp_path / "journal")
    with pytest.raises(
        RuntimeError, match=f"worker-{at}-\\d+: the journal of a worker that died is not there; is that a"
    ):
        list(pool.results())


def test_deaths_with_nothing_sampled_between_end_the_run(pool: FakeRollouts, tmp_path: Path):
    (tmp_path / "policy" / "config.json").write_text('{"fails": true, "seconds": 0}')
    os.kill(pid(pool.workers[0]), signal.SIGKILL)
    words = r"its log, /\S+/worker-\w+-\w+-\d+\.err, ended with:\none\nno memory left$"
    how_often = f"rollout worker 0 died {MAX_DEATHS} times in a row, with nothing sampled between"
    with pytest.raises(RuntimeError, match=f"(?s)^{how_often}; the last: {words}"):
        pool.generate(requests(40, 4, limit=1000))
    pool.cancel([r.id for r in requests(40, 4)])
