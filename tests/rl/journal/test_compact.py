"""Compaction: every finished request in one row, journals removed when nobody needs them, and killed at any point."""

import fcntl
import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from amalgam.rl.journal import Journal, JournalError, compact, recover
from amalgam.rl.trajectory import Request

from .made import KINDS, Known, Twin, request, same


def rows(out: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(out.glob("*.parquet")):
        shapes = {name.decode(): json.loads(value) for name, value in (pq.read_schema(path).metadata or {}).items()}
        for row in pq.read_table(path).to_pylist():
            for name, dtype in (("experts", np.int16), ("picks", np.int32)):
                if name in row:
                    row[name] = np.frombuffer(row[name], dtype).reshape(-1, *shapes[name])
            found.append(row)
    return sorted(found, key=lambda row: row["request"])


def agree(found: list[dict[str, Any]], twins: list[Twin], finished: list[tuple[Twin, Known]]) -> bool:
    expected = sorted(finished, key=lambda pair: pair[1].request.id)
    assert [row["request"] for row in found] == [known.request.id for _, known in expected]
    for row, (twin, known) in zip(found, expected, strict=True):
        past = twin.request(known).past
        assert row["group"] == known.request.group and row["prompt_ids"] == known.request.prompt_ids.tolist()
        assert (row["response_ids"], row["versions"]) == (known.tokens, known.versions)
        assert np.array_equal(np.array(row["logprobs"], np.float32), np.array(known.logprobs, np.float32))
        assert row["finish"] == known.finish and row["error"] == ("why" if known.finish == "failed" else "")
        for name in ("experts", "picks", "sets"):
            value = None if past is None else getattr(past, name)
            if name in twin.recorded and value is not None:
                assert len(row[name]) == len(value)
                assert all(np.array_equal(a, b) for a, b in zip(row[name], value, strict=True))
    return True


def finished(*twins: Twin) -> list[tuple[Twin, Known]]:
    return [(twin, known) for twin in twins for known in twin.finished]


@pytest.mark.parametrize("recorded", KINDS)
def test_finished_requests_become_rows(tmp_path, recorded):
    twins = [Twin(tmp_path, f"w{i}", i, **KINDS[recorded]) for i in range(2)]
    for _ in range(80):
        for twin in twins:
            twin.anything()
    cut = next(known for known in twins[0].open.values() if len(known.tokens) > 2)
    twins[0].finish(cut.request.id, 2)  # the engine found a stop string a token late
    written = compact(tmp_path, tmp_path / "out")
    assert [path.name[:3] for path in written] == ["w0-", "w1-"]
    assert len(finished(*twins)) > 5 and agree(rows(tmp_path / "out"), twins, finished(*twins))
    columns = [name for name in ("experts", "picks", "sets") if name in KINDS[recorded]]
    assert pq.read_schema(written[0]).names[8:] == columns
    unfinished = sorted([each for twin in twins for each in twin.found()], key=lambda each: each.id)
    assert same(recover(tmp_path), unfinished)


def test_journals_go_when_they_are_closed_and_all_is_finished(tmp_path):
    twins = [Twin(tmp_path, f"w{i}", i, **KINDS["all"]) for i in range(3)]
    for twin in twins:
        for _ in range(20):
            twin.anything()
    for twin in twins[:2]:
        for each in list(twin.open):
            twin.finish(each)
    (tmp_path / "torn.journal").write_bytes(b"\x93AML")  # of a worker that died, or is about to begin
    for closed in (0, 2, 1):
        left = {path.name for path in tmp_path.glob("w?.journal")}
        compact(tmp_path, tmp_path / "out")
        gone = left - {path.name for path in tmp_path.glob("w?.journal")}
        assert gone == ({"w0.journal"} if closed == 2 else set())
        twins[closed].journal.close()
    compact(tmp_path, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"w2.journal", "torn.journal", "out"}
    assert agree(rows(tmp_path / "out"), twins, finished(*twins))
    again = Twin(tmp_path, "w0", 9, **KINDS["all"])  # the same name, once it is free, takes nobody's place
    again.begin(request(again.rng, 2**62 + 1))
    again.finish(2**62 + 1)
    compact(tmp_path, tmp_path / "out")
    assert agree(rows(tmp_path / "out"), [*twins, again], finished(*twins, again))


def moved(folder: Path) -> list[Twin]:
    """Two dead workers who each finished what the other had begun; a third has one of the first's, and goes on."""
    twins = [Twin(folder, name, i, **KINDS["all"]) for i, name in enumerate("bac")]
    for i, twin in enumerate(twins[:2]):
        for id in (10 * i, 10 * i + 1, 10 * i + 2):
            twin.begin(request(twin.rng, id))
        twin.step()
    for there, ids in ((1, (0, 1)), (0, (10,)), (2, (2,))):
        for each in recover(folder):
            if each.id in ids:
                twins[there].begin(each)
                twins[there].step([each.id])
    for twin, ids in ((twins[1], (0, 1, 11, 12)), (twins[0], (10,))):
        for each in ids:
            twin.finish(each)
    for twin in twins[:2]:
        twin.journal.close()
    return twins


def test_the_word_that_a_request_is_finished_stays_while_it_is_needed(tmp_path):
    twins = moved(tmp_path)
    before = recover(tmp_path)
    assert [each.id for each in before] == [2] and same(before, twins[2].found())
    compact(tmp_path, tmp_path / "out")
    # b has 0, 1 and 2 unfinished: 2 is not finished anywhere, so b stays, and so does a, which finished 0 and 1
    assert {path.name for path in tmp_path.glob("*.journal")} == {"a.journal", "b.journal", "c.journal"}
    assert same(recover(tmp_path), before)
    twins[2].finish(2)
    compact(tmp_path, tmp_path / "out")
    assert {path.name for path in tmp_path.glob("*.journal")} == {"c.journal"}
    assert recover(tmp_path) == [] and agree(rows(tmp_path / "out"), twins, finished(*twins))


def test_what_two_workers_finished_is_one_row(tmp_path):
    first, second = (Twin(tmp_path, name, i) for i, name in enumerate("ab"))
    first.begin(request(first.rng, 5))
    first.step()
    second.begin(recover(tmp_path)[0])
    for twin in (second, first):
        twin.finish(5)
        compact(tmp_path, tmp_path / "out")
        assert [row["request"] for row in rows(tmp_path / "out")] == [5]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("last_finished", [False, True])
def test_killed_at_any_point_it_leaves_the_same_rows(tmp_path, monkeypatch, last_finished):
    point, left = 0, -1
    while left < 0:
        point += 1
        folder = tmp_path / str(point)
        twins = moved(folder)
        if last_finished:
            twins[2].finish(2)
        unfinished, left = recover(folder), point
        with monkeypatch.context() as patch:

            def dying(call: Any) -> Any:
                def until(*args: Any, **more: Any) -> Any:
                    nonlocal left
                    if threading.current_thread() is threading.main_thread():  # not one that flushes
                        left -= 1
                        if left == -1:
                            raise Killed
                    return call(*args, **more)

                return until

            for owner, name in ((os, "rename"), (os, "fsync"), (Path, "rename"), (Path, "unlink"), (os, "open")):
                patch.setattr(owner, name, dying(getattr(owner, name)))
            patch.setattr(pq.ParquetWriter, "write_table", dying(pq.ParquetWriter.write_table))
            with suppress(Killed):
                compact(folder, folder / "out")
        assert same(recover(folder), unfinished)
        found = rows(folder / "out")
        assert len({row["request"] for row in found}) == len(found)
        compact(folder, folder / "out")
        assert same(recover(folder), unfinished)
        assert agree(rows(folder / "out"), twins, finished(*twins))
        assert len(list(folder.glob("*.journal"))) == (1 if last_finished else 3)
        assert not list(folder.glob("*.json"))
    assert point > 10  # the last of which it survived


def test_readers_meanwhile_are_not_misled(tmp_path, monkeypatch):
    """A file that goes while another is read: the reading begins again."""
    twins = moved(tmp_path)
    twins[2].finish(2)
    twins[2].journal.close()
    open_file, begun = Path.open, []

    def opened(path: Path, *args: Any, **more: Any) -> Any:
        if path.name == "b.journal" and not begun:
            begun.append(path)
            compact(tmp_path, tmp_path / "out")  # after a was read, before b is
        return open_file(path, *args, **more)

    monkeypatch.setattr(Path, "open", opened)
    assert recover(tmp_path) == [] and begun and not list(tmp_path.glob("*.journal"))


def test_one_compaction_at_a_time(tmp_path):
    (tmp_path / "out").mkdir()
    other = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(JournalError, match="another compaction"):
        compact(tmp_path, tmp_path / "out")
    os.close(other)
    assert compact(tmp_path, tmp_path / "out") == []


def test_a_damaged_journal_changes_nothing(tmp_path):
    twins = moved(tmp_path)
    path = twins[1].journal.path
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    with pytest.raises(JournalError, match=r"a\.journal: damaged"):
        compact(tmp_path, tmp_path / "out")
    assert len(list(tmp_path.glob("*.journal"))) == 3 and not list((tmp_path / "out").iterdir())


def test_many_requests_take_seconds(tmp_path):
    ids, rng = np.arange(2000), np.random.default_rng(0)
    twin = Twin(tmp_path, "many", 0)
    journal: Journal = twin.journal
    for i in ids.tolist():
        twin.begin(Request(i, 0, rng.integers(0, 9, 50).astype(np.int32)))
    for _ in range(100):
        columns = rng.integers(0, 9, (2, 2000)).astype(np.int32)
        journal.append(ids, columns[0], np.zeros(2000, np.float32), columns[1])
    for i in ids.tolist():
        twin.finish(i)
    began = time.process_time()
    compact(tmp_path, tmp_path / "out")
    assert time.process_time() - began < 10
    assert len(rows(tmp_path / "out")) == 2000
