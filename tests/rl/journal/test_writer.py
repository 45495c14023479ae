"""The journal's writer: what it refuses, what it does when the disk fails, and when it flushes."""

import errno
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amalgam.rl.journal import Journal, JournalError, recover
from amalgam.rl.trajectory import Past, Request, SamplingParams

from .made import KINDS, Twin, same, trajectory

I32, F32 = np.int32, np.float32
ONE = (np.array([1]), np.ones(1, I32), np.zeros(1, F32), np.ones(1, I32))
FED: dict[str, Any] = {
    "fed": np.array([1]),
    "experts": np.ones((1, 3, 2), np.int16),
    "picks": np.ones((1, 2, 5), I32),
    "sets": [np.ones(2, I32)],
}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal(tmp_path, "j", **KINDS["all"])
    made.begin(Request(1, 0, np.ones(2, I32)))
    return made


def with_one(i: int, value: Any) -> list[Any]:
    return [*ONE[:i], value, *ONE[i + 1 :]]


WRONG: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "request 2 is not open": (with_one(0, np.array([2])), FED),
    "request 0 is not open": (with_one(0, np.array([0])), FED),
    "ids: int32": (with_one(0, np.ones(1, I32)), FED),
    "tokens: int64": (with_one(1, np.ones(1, np.int64)), FED),
    r"tokens: int32 \(2,\)": (with_one(1, np.ones(2, I32)), FED),
    "tokens: list": (with_one(1, [1]), FED),
    "a number is negative": (with_one(1, -np.ones(1, I32)), FED),
    "logprobs: float64": (with_one(2, np.zeros(1)), FED),
    "versions: int32": (with_one(3, np.ones((1, 1), I32)), FED),
    "sets: one for each": (list(ONE), FED | {"sets": None}),
    "sets: one for each new token": (list(ONE), FED | {"sets": []}),
    "sets: int64": (list(ONE), FED | {"sets": [np.ones(2, np.int64)]}),
    "request 5 is not open": (list(ONE), FED | {"fed": np.array([5])}),
    "fed: int32": (list(ONE), FED | {"fed": np.ones(1, I32)}),
    "experts: an array": (list(ONE), FED | {"experts": None}),
    r"experts: int16 \(1, 2, 3\)": (list(ONE), FED | {"experts": np.ones((1, 2, 3), np.int16)}),
    "experts: int64": (list(ONE), FED | {"experts": np.ones((1, 3, 2), np.int64)}),
    r"picks: int32 \(1, 2, 6\)": (list(ONE), FED | {"picks": np.ones((1, 2, 6), I32)}),
    "contiguous": (list(ONE), FED | {"picks": np.ones((1, 5, 2), I32).transpose(0, 2, 1)}),
    "a number below -1": (list(ONE), FED | {"picks": np.full((1, 2, 5), -2, I32)}),
    "decisions of a token that it does not have": (
        list(ONE),
        FED | {"fed": np.array([1, 1]), "experts": np.ones((2, 3, 2), np.int16), "picks": np.ones((2, 2, 5), I32)},
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named_and_nothing_is_written(tmp_path, journal, message):
    before, (columns, more) = journal.path.read_bytes(), WRONG[message]
    with pytest.raises(ValueError, match=message):
        journal.append(*columns, **more)
    assert journal.path.read_bytes() == before
    journal.append(*ONE, **FED)  # and it is as good as before
    assert recover(tmp_path)[0].past is not None


def test_wrong_requests_and_names_are_refused(tmp_path, journal):
    before = journal.path.read_bytes()
    for prompt in (np.ones(2, np.int64), -np.ones(2, I32), np.ones((2, 2), I32)):
        with pytest.raises(ValueError, match="prompt_ids"):
            journal.begin(Request(3, 0, prompt))
    with pytest.raises(ValueError, match="64 bits"):
        journal.begin(Request(2**63, 0, np.ones(2, I32)))
    with pytest.raises(ValueError, match="allowed: int64"):
        journal.begin(Request(3, 0, np.ones(2, I32), SamplingParams(allowed=np.ones(4, np.int64))))
    for past in (Past(*ONE[1:]), Past(*ONE[1:], sets=[np.zeros(2, np.int64)])):
        with pytest.raises(ValueError, match="sets"):
            journal.begin(Request(3, 0, np.ones(2, I32), past=past))
    with pytest.raises(ValueError, match="past: request 3 has 1 tokens, and experts of 2"):
        journal.begin(Request(3, 0, np.ones(2, I32), past=Past(*ONE[1:], experts=np.ones((2, 3, 2), np.int16))))
    with pytest.raises(ValueError, match="request 3 is not open"):
        journal.finish(trajectory(Request(3, 0, np.ones(2, I32)), [], "stop"))
    with pytest.raises(ValueError, match="request 1: a response of 2 tokens, of which 0"):
        journal.finish(trajectory(Request(1, 0, np.ones(2, I32)), [1, 2], "stop"))
    assert journal.path.read_bytes() == before
    plain = Journal(tmp_path, "plain")
    plain.begin(Request(1, 0, np.ones(2, I32)))
    with pytest.raises(ValueError, match="records neither"):
        plain.append(*ONE, fed=np.array([1]))
    for name in ("", "a/b", "..", ".hidden"):
        with pytest.raises(ValueError, match="name"):
            Journal(tmp_path, name)


def test_picks_of_a_short_context_need_few_bytes(tmp_path):
    sizes = []
    for name, entries in (("a", 3), ("b", 512)):
        journal = Journal(tmp_path, name, picks=(21, 512))
        journal.begin(Request(1, 0, np.ones(2, I32)))
        journal.append(*ONE)
        before, picks = journal.path.stat().st_size, np.full((1, 21, 512), -1, I32)
        picks[..., :entries] = 4
        journal.append(*(each[:0] for each in ONE), fed=np.array([1]), picks=picks)
        sizes.append(journal.path.stat().st_size - before)
    assert sizes[1] - sizes[0] == 509 * 21 * 2 and sizes[0] < 200


def test_short_writes_are_completed(tmp_path, monkeypatch):
    write, rng = os.write, np.random.default_rng(0)
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[: rng.integers(1, 8)]))
    twin = Twin(tmp_path, "short", 0, **KINDS["all"])
    for _ in range(40):
        twin.anything()
    assert same(recover(tmp_path), twin.found())


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EIO, None])
def test_a_write_that_fails_ends_the_journal(tmp_path, monkeypatch, reason):
    twin = Twin(tmp_path, "full", 0, **KINDS["all"])
    for _ in range(20):
        twin.anything()
    expected, write, sizes = twin.found(), os.write, []

    def fails(file: int, data: memoryview) -> int:
        sizes.append(len(data))
        if len(sizes) == 1:
            return write(file, data[: len(data) // 2])
        if reason is None:
            return 0
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "write", fails)
    why = os.strerror(reason) if reason else "nothing more can be written"
    with pytest.raises(JournalError, match=rf"full\.journal: {why}; the journal is closed"):
        twin.step()
    monkeypatch.setattr(os, "write", write)
    calls = twin.step, lambda: twin.finish(expected[0].id), lambda: twin.begin(expected[0]), twin.journal.close
    for call in calls:
        with pytest.raises(JournalError, match=why):
            call()
    assert same(recover(tmp_path), expected) and recover(tmp_path).torn


FULL = """
import resource
from pathlib import Path
import numpy as np
from amalgam.rl.journal import Journal, JournalError, recover
from amalgam.rl.trajectory import Request

resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
folder, ids, done = Path({folder!r}), np.arange(16), 0
journal = Journal(folder, "full")
for i in ids.tolist():
    journal.begin(Request(i, 0, np.ones(4, np.int32)))
try:
    while True:
        rows = np.full(16, done, np.int32)
        journal.append(ids, rows, rows.astype(np.float32), rows)
        done += 1
except JournalError as error:
    print(error)
found = recover(folder)
print(done, *{{len(each.past.response_ids) for each in found}}, len(found), list(found.torn.values())[0] > 0)
"""


def test_a_full_disk_is_named_and_what_is_written_stays(tmp_path):
    command = [sys.executable, "-c", FULL.format(folder=str(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    error, counts = done.stdout.splitlines()
    assert error == f"{tmp_path / 'full.journal'}: {os.strerror(errno.EFBIG)}; the journal is closed"
    steps, found, requests, torn = counts.split()
    assert steps == found and int(steps) > 10 and (requests, torn) == ("16", "True")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(JournalError, match=r"file/j\.journal: (File exists|Not a directory)"):
        Journal(tmp_path / "file", "j")


def test_an_fsync_that_fails_ends_the_journal(tmp_path, monkeypatch):
    journal = Journal(tmp_path, "j", flush_seconds=0.001)
    journal.begin(Request(1, 0, np.ones(2, I32)))

    def fails(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    deadline = time.monotonic() + 20
    with pytest.raises(JournalError, match=r"j\.journal: fsync: Input/output error; the journal is closed"):
        while time.monotonic() < deadline:
            journal.append(*ONE)
    with pytest.raises(JournalError, match="fsync"):
        journal.close()


def test_what_is_written_is_flushed_soon_and_only_then(tmp_path, monkeypatch):
    sizes, fsync = [], os.fsync

    def counted(file: int) -> None:
        state = os.fstat(file)
        if stat.S_ISREG(state.st_mode):
            sizes.append(state.st_size)
        fsync(file)

    monkeypatch.setattr(os, "fsync", counted)
    journal = Journal(tmp_path, "j", flush_seconds=0.005)
    journal.begin(Request(1, 0, np.ones(2, I32)))
    for _ in range(3):
        journal.append(*ONE)
        deadline = time.monotonic() + 20
        while not sizes or sizes[-1] < journal.path.stat().st_size:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    count = len(sizes)
    time.sleep(0.03)
    assert len(sizes) == count  # nothing new, no fsync
    journal.close()
    slow = Journal(tmp_path, "slow", flush_seconds=1000)
    count = len(sizes)
    slow.begin(Request(1, 0, np.ones(2, I32)))
    assert len(sizes) == count
    slow.close()
    assert sizes[count:] == [slow.path.stat().st_size]


def test_a_closed_journal_says_so(tmp_path, journal):
    journal.close()
    journal.close()
    with pytest.raises(JournalError, match=r"j\.journal: is closed"):
        journal.append(*ONE, **FED)
