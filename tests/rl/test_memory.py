"""The peak of memory in a span of a process's life."""

from pathlib import Path

import pytest

from amalgam.rl import memory
from amalgam.rl.memory import Span

MIB = 1 << 20


def use(mib: int) -> None:
    assert len(bytearray(b"x" * (mib * MIB))) == mib * MIB


def test_a_span_has_its_own_peak_also_where_others_begin_and_end_meanwhile():
    first = Span()
    use(200)
    second = Span()
    use(50)
    third = Span()
    peaks = [span.peak() / MIB for span in (first, second, third)]
    assert peaks[0] > peaks[1] + 100
    assert peaks[1] > peaks[2] + 30
    use(200)
    assert second.peak() / MIB > peaks[1] + 100
    assert not first.since_start


def test_a_system_that_sets_no_mark_back_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Not there, not ours to write, or without a mark in the status: as containers' kernels may have it."""
    use(200)
    monkeypatch.setattr(memory, "_RESET", tmp_path / "no" / "clear_refs")
    assert Span().since_start
    monkeypatch.setattr(memory, "_RESET", tmp_path / "clear_refs")
    assert not Span().since_start
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    (tmp_path / "status").write_text("VmRSS:\t 10 kB\n")
    assert Span().since_start
    assert Span().peak() > 200 * MIB
