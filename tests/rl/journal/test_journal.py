"""A journal's requests come back whole: after kill -9, from several writers, while one writes, and when they move."""

import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from amalgam.rl.journal import Journal, JournalError, recover
from amalgam.rl.trajectory import Past, Request

from .made import KINDS, Twin, request, same, written

I32 = np.int32


@pytest.mark.parametrize("recorded", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_every_request_comes_back_whole(tmp_path, seed, recorded):
    path, states = written(tmp_path, seed, recorded, 120)
    found = recover(tmp_path)
    assert same(found, states[-1][1]) and len(found) > 5
    assert found.torn == {}
    moved = Twin(tmp_path / "other", "next", seed, **KINDS[recorded])  # what came back can be written again
    for each in found:
        moved.begin(each)
    moved.step()
    assert same(recover(tmp_path / "other"), moved.found())


def test_the_format_has_every_field_of_a_request():
    """Who adds one adds it to the format, and to the requests that these tests make."""
    names = [{each.name for each in fields(kind)} for kind in (Request, Past)]
    assert names[0] == {"id", "group", "prompt_ids", "params", "past", "noise"}
    assert names[1] == {"response_ids", "logprobs", "versions", "experts", "picks", "sets"}


def test_a_folder_that_is_not_there_has_no_requests(tmp_path):
    assert recover(tmp_path / "none") == []


DYING = """
import os, random, signal, time
from pathlib import Path
import numpy as np
from amalgam.rl.journal import Journal
from amalgam.rl.trajectory import Request

folder, rounds = Path({folder!r}), {rounds}
for k in range(rounds):
    if child := os.fork():
        time.sleep(random.uniform(0.005, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        continue
    journal, ids = Journal(folder, f"round-{{k}}", experts=(12, 4)), np.arange(100 * k, 100 * k + 64)
    for i in ids.tolist():
        journal.begin(Request(i, 0, np.full(3, i, np.int32)))
    for step in range(1_000_000):
        tokens = (ids * 1000 + step).astype(np.int32)
        journal.append(ids, tokens, -tokens.astype(np.float32), tokens, fed=ids,
                       experts=np.broadcast_to((tokens % 251).astype(np.int16)[:, None, None], (64, 12, 4)).copy())
        os.write(1, f"{{k}} {{step + 1}}\\n".encode())
"""


def test_after_kill_9_all_that_was_acknowledged_is_there(tmp_path):
    code = DYING.format(folder=str(tmp_path), rounds=12)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    acknowledged = dict.fromkeys(range(12), 0)
    for line in done.stdout.splitlines():
        k, steps = map(int, line.split())
        acknowledged[k] = steps
    assert sum(acknowledged.values()) > 100
    found = {each.id: each for each in recover(tmp_path)}
    for k, steps in acknowledged.items():
        for i in range(100 * k, 100 * k + 64) if steps else ():
            past = found[i].past
            assert past is not None and past.experts is not None
            assert steps <= len(past.response_ids) <= steps + 1
            expected = i * 1000 + np.arange(len(past.response_ids))
            assert (past.response_ids == expected).all() and (past.logprobs == -expected.astype(np.float32)).all()
            assert (past.experts == (expected % 251)[:, None, None]).all()


def test_two_writers_in_one_folder(tmp_path):
    twins = [Twin(tmp_path, f"worker-{i}", i, **KINDS["all"]) for i in range(2)]
    for _ in range(60):
        for twin in twins:
            twin.anything()
    expected = [each for twin in twins for each in twin.found()]
    assert same(recover(tmp_path), sorted(expected, key=lambda each: each.id))
    with pytest.raises(JournalError, match=r"worker-1\.journal: File exists"):
        Journal(tmp_path, "worker-1")


def test_reading_while_it_is_written(tmp_path):
    journal, ended = Journal(tmp_path, "live", experts=(12, 4)), threading.Event()
    ids = np.arange(40)
    for i in ids.tolist():
        journal.begin(Request(i, 0, np.zeros(4, I32)))

    def write() -> None:
        for step in range(400):
            rows = np.full(40, step, I32)
            experts = np.full((40, 12, 4), step, np.int16)
            journal.append(ids, rows, rows.astype(np.float32), rows, fed=ids, experts=experts)
        ended.set()

    thread = threading.Thread(target=write)
    thread.start()
    counts = []
    while not counts or counts[-1] < 400:
        over = ended.is_set()
        found = recover(tmp_path)
        (count,) = {0 if each.past is None else len(each.past.response_ids) for each in found}
        counts.append(count)
        assert all(each.past is None or (each.past.response_ids == np.arange(count)).all() for each in found)
        assert not over or count == 400
    thread.join(10)
    assert counts == sorted(counts)


def test_a_million_tokens_are_read_in_seconds(tmp_path):
    journal, rng = Journal(tmp_path, "long", experts=(4, 2), flush_seconds=60), np.random.default_rng(0)
    ids = rng.permutation(10**6)[:128]
    for i in ids.tolist():
        journal.begin(Request(i, 0, np.zeros(4, I32)))
    tokens = rng.integers(0, 1 << 31, (8192, 128)).astype(I32)
    experts = np.zeros((128, 4, 2), np.int16)
    for rows in tokens:
        journal.append(ids, rows, rows.astype(np.float32), rows, fed=ids, experts=experts)
    began = time.process_time()
    found = recover(tmp_path)
    assert time.process_time() - began < 10
    for each in found:
        assert each.past is not None
        assert (each.past.response_ids == tokens[:, ids.tolist().index(each.id)]).all()


class TestMoves:
    """A request in several files is one request, and goes on from its longest history."""

    @pytest.fixture
    def first(self, tmp_path: Path) -> Twin:
        twin = Twin(tmp_path, "z-first", 1, **KINDS["all"])
        for i in range(3):
            twin.begin(request(twin.rng, i))
        for _ in range(5):
            twin.step()
        return twin

    def test_to_another_worker(self, tmp_path, first):
        second = Twin(tmp_path, "a-second", 2, **KINDS["all"])
        assert same(recover(tmp_path), first.found())
        second.begin(recover(tmp_path)[1])
        assert same(recover(tmp_path), first.found())
        second.step()
        assert same(recover(tmp_path), [first.found()[0], *second.found(), first.found()[2]])

    def test_and_back(self, tmp_path, first):
        second = Twin(tmp_path, "a-second", 2, **KINDS["all"])
        second.begin(recover(tmp_path)[0])
        second.step()
        first.begin(recover(tmp_path)[0])
        first.step([0])
        assert same(recover(tmp_path), first.found())
        assert len(first.open[0].tokens) > len(second.open[0].tokens)

    def test_what_another_finished_does_not_come_again(self, tmp_path, first):
        second = Twin(tmp_path, "a-second", 2, **KINDS["all"])
        second.begin(recover(tmp_path)[2])
        second.step()
        second.finish(2)
        first.step()  # it does not know yet
        first.step()
        assert same(recover(tmp_path), first.found()[:2])

    def test_an_id_of_another_request(self, tmp_path, first):
        first.finish(0)
        second = Twin(tmp_path, "a-second", 2, **KINDS["all"])
        second.begin(request(second.rng, 0))
        second.step()
        assert same(recover(tmp_path), [*second.found(), *first.found()])
        first.begin(request(first.rng, 0))  # and in the file that has finished one
        first.step([0])
        assert len(recover(tmp_path)) == 4

    def test_in_one_file_the_last_begin_counts(self, tmp_path, first):
        first.begin(first.open[1].request)
        assert same(recover(tmp_path), first.found())
        assert recover(tmp_path)[1].past is None

    def test_a_long_past(self, tmp_path):
        rng, n = np.random.default_rng(0), 2500
        past = Past(
            rng.integers(0, 99, n).astype(I32), rng.random(n, np.float32), rng.integers(0, 9, n).astype(I32),
            rng.integers(0, 99, (n, 3, 2)).astype(np.int16), rng.integers(0, 99, (n, 2, 5)).astype(I32),
            [np.arange(i % 3, dtype=I32) for i in range(n)],
        )  # fmt: skip
        assert past.experts is not None and past.picks is not None
        past.experts[2400:] = past.picks[2400:] = -1
        with Journal(tmp_path, "long", **KINDS["all"]) as journal:
            asked = request(rng, 5, past)
            journal.begin(asked)
            assert same(recover(tmp_path), [asked])
            journal.append(
                np.array([5]), np.array([7], I32), np.zeros(1, np.float32), np.zeros(1, I32), sets=[np.zeros(1, I32)],
                fed=np.array([5]), experts=np.full((1, 3, 2), 8, np.int16), picks=np.full((1, 2, 5), 9, I32),
            )  # fmt: skip
        (found,) = recover(tmp_path)
        assert found.past is not None and found.past.experts is not None and found.past.picks is not None
        assert found.past.response_ids[-1] == 7
        assert (found.past.experts[2400] == 8).all() and (found.past.experts[2401:] == -1).all()
        assert (found.past.picks[2400] == 9).all() and (found.past.picks[2401:] == -1).all()
