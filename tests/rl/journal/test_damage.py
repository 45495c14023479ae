"""Journals that are torn, damaged or hostile: cut, or named; never read wrong."""

import json
import os
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amalgam.rl.journal import Journal, JournalError, format, recover
from amalgam.rl.journal.reading import JournalFile
from amalgam.rl.trajectory import Request, SamplingParams

from .made import KINDS, same, written

FEW = settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
I32 = np.int32


@FEW
@given(seed=st.integers(0, 2**32), recorded=st.sampled_from(sorted(KINDS)))
def test_a_tail_is_cut_wherever_it_is_torn(tmp_path, seed, recorded):
    path, states = written(tmp_path, seed, recorded, 8)
    content = path.read_bytes()
    path.unlink()
    cut = tmp_path / f"cut-{seed}" / "cut.journal"
    cut.parent.mkdir(exist_ok=True)
    for size in range(len(content)):
        cut.write_bytes(content[:size])
        whole = max((state for state in states if state[0] <= size), default=(0, []), key=lambda state: state[0])
        found = recover(cut.parent)
        assert same(found, whole[1])
        assert found.torn == ({cut: size - whole[0]} if size > whole[0] else {})


@FEW
@given(seed=st.integers(0, 2**32), recorded=st.sampled_from(sorted(KINDS)))
def test_a_flipped_byte_is_found_or_ends_the_file(tmp_path, seed, recorded):
    path, states = written(tmp_path, seed, recorded, 8)
    content = path.read_bytes()
    path.unlink()
    flipped = tmp_path / f"flipped-{seed}" / "flipped.journal"
    flipped.parent.mkdir(exist_ok=True)
    *_, last, _ = sorted({size for size, _ in states})  # each call is one frame, or none
    rng = np.random.default_rng(seed)
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= int(rng.integers(1, 256))
        flipped.write_bytes(damaged)
        if at >= last:
            found = recover(flipped.parent)
            assert same(found, dict(states)[last]) and found.torn == {flipped: len(content) - last}
        else:
            with pytest.raises(JournalError, match=r"flipped\.journal: (damaged at byte \d+|not a journal)"):
                recover(flipped.parent)


@pytest.mark.parametrize("tail", ["zeros", "random", "a frame's own bytes"])
def test_what_a_power_cut_leaves_at_the_end_is_cut(tmp_path, tail):
    path, states = written(tmp_path, 3, "all", 30)
    content = path.read_bytes()
    garbage = {"zeros": bytes(5000), "random": os.urandom(5000), "a frame's own bytes": content[-100:-1]}[tail]
    path.write_bytes(content + garbage)
    assert same(recover(tmp_path), states[-1][1])
    assert recover(tmp_path).torn == {path: len(garbage)}


def test_a_torn_frame_that_holds_whole_ones_is_a_torn_tail(tmp_path):
    inner, _ = written(tmp_path / "inner", 0, "plain", 20)
    bits = np.unpackbits(np.frombuffer(inner.read_bytes(), np.uint8), bitorder="little").astype(bool)
    with Journal(tmp_path, "outer") as journal:
        journal.begin(Request(1, 0, np.ones(2, I32)))
        before = journal.path.stat().st_size
        journal.begin(Request(2, 0, np.ones(2, I32), SamplingParams(allowed=bits)))
    content = journal.path.read_bytes()
    assert inner.read_bytes() in content
    for size in range(before, len(content), 7):
        journal.path.write_bytes(content[:size])
        assert [each.id for each in recover(tmp_path)] == [1]


def payload(n: int, m: int, *columns: Any) -> bytes:
    return struct.pack("<IIIB", n, m, 0, 0) + b"".join(columns)


def begun(content: dict[str, Any], prompt: int = 0) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<qqIII", 1, 0, prompt, len(text), 0) + text


ROW = (np.array([1]), np.ones(1, I32), np.zeros(1, np.float32), np.ones(1, I32))
BEGUN = format.begin_frame(Request(1, 0, np.ones(2, I32)))[13:]
HOSTILE = {
    "a request that is not open": (3, payload(1, 0, np.array([2]), *ROW[1:])),
    "fed tokens": (3, payload(0, 1, np.array([1]))),
    "a negative token id or version": (3, payload(1, 0, ROW[0], -ROW[1], *ROW[2:])),
    "a negative token id or version ": (3, payload(1, 0, *ROW[:3], -ROW[3])),
    "bytes are said to follow": (3, payload(2**32 - 1, 2**32 - 1, *ROW)),
    "bytes too many": (3, payload(1, 0, *ROW, *ROW)),
    "is finished": (4, b'{"id": 9, "tokens": 0, "finish": "stop", "error": ""}'),
    "finish 'eaten'": (4, b'{"id": 1, "tokens": 0, "finish": "eaten", "error": ""}'),
    "after -1 tokens": (4, b'{"id": 1, "tokens": -1, "finish": "stop", "error": ""}'),
    "JSON without id": (4, b"[]"),
    "JSON that is too deep": (4, b"[" * 100_000),
    "Expecting value": (4, b"nothing"),
    "a frame of kind 1": (1, b"{}"),
    "a frame of kind 77": (77, b""),
    "bytes are said to follow ": (2, begun({"noise": None, "params": {}}, 2**31)),
    "'seed': no field": (2, begun({"noise": None, "params": {"seed": "a"}})),
    "'stop_ids': no field": (2, begun({"noise": None, "params": {"stop_ids": ["a"]}})),
    "'seek': no field": (2, begun({"noise": None, "params": {"seek": 1}})),
    "noise 'True'": (2, begun({"noise": True, "params": {}})),
    "JSON without noise, params": (2, begun({"params": {}})),
}


@pytest.mark.parametrize("message", HOSTILE)
def test_whole_frames_with_wrong_content_are_named(tmp_path, message):
    with Journal(tmp_path, "hostile") as journal:
        journal.begin(Request(1, 0, np.ones(2, I32)))
        place = journal.path.stat().st_size
    kind, content = HOSTILE[message]
    with journal.path.open("ab") as file:
        file.write(format.frame(kind, [content]))
    with pytest.raises(JournalError, match=rf"hostile\.journal: frame at byte {place}: .*{message.strip()}"):
        recover(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"{}",
        json.dumps({"file": "0" * 16, "experts": [1 << 20, 1 << 20], "picks": None, "sets": False}).encode(),
        json.dumps({"file": "0" * 16, "experts": [3, -1], "picks": None, "sets": False}).encode(),
        json.dumps({"file": "../../../../home", "experts": None, "picks": None, "sets": False}).encode(),
    ],
)
def test_a_wrong_header_is_named(tmp_path, header):
    start = format.file_start("0" * 16, format.Recorded())[:12]
    (tmp_path / "x.journal").write_bytes(start + format.frame(format.HEADER, [header]))
    with pytest.raises(JournalError, match=r"x\.journal: frame at byte 12"):
        recover(tmp_path)


def test_another_format_is_named(tmp_path):
    path, _ = written(tmp_path, 0, "plain", 3)
    content = bytearray(path.read_bytes())
    content[8] += 1
    path.write_bytes(content)
    with pytest.raises(JournalError, match="not a journal of format 1"):
        recover(tmp_path)


def test_random_bytes_in_whole_frames_raise_one_kind_of_error(tmp_path):
    rng = np.random.default_rng(0)
    with Journal(tmp_path, "x", **KINDS["all"]) as journal:
        journal.begin(Request(1, 0, np.ones(2, I32), SamplingParams(stop=("a",))))
    content, wrong = journal.path.read_bytes(), 0
    pieces = [BEGUN, payload(1, 1, *ROW, np.zeros(9, I32)), b'{"id": 1, "tokens": 0, "finish": "stop", "error": ""}']
    for kind in range(2, 5):
        for _ in range(300):
            damaged = bytearray(pieces[kind - 2])
            for at in rng.integers(0, len(damaged), rng.integers(1, 4)):
                damaged[at] = rng.choice([0, 1, 127, 255, int(rng.integers(256))])
            journal.path.write_bytes(content + format.frame(kind, [bytes(damaged)]))
            try:
                recover(tmp_path)
            except JournalError:
                wrong += 1
    assert wrong > 100


def test_finished_requests_leave_no_rows_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("amalgam.rl.journal.reading._PENDING_BYTES", 200)
    path, states = written(tmp_path, 4, "all", 150)
    file = JournalFile(path, keep_finished=False)
    assert len(file.finished) > 5 and not any(life.drawn or life.fed for life in file.finished)
    assert same(recover(tmp_path), states[-1][1])


@pytest.mark.parametrize(
    "fed, message", [(8, "request 8: 0 tokens, decisions of 1"), (9, "a request that is not open")]
)
def test_wrong_decisions_are_named(tmp_path, fed, message):
    with Journal(tmp_path, "x", experts=(3, 2)) as journal:
        journal.begin(Request(8, 0, np.ones(2, I32)))
    with journal.path.open("ab") as file:
        file.write(format.frame(3, [payload(0, 1, np.array([fed]), np.zeros(6, np.int16))]))
    with pytest.raises(JournalError, match=message):
        recover(tmp_path)
