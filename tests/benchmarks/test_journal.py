"""The benchmark of the journal, on a few steps."""

import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import journal  # pyright: ignore[reportMissingImports]
    import results  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("sys.argv", ["journal.py", "--steps", "3", "--folder", str(tmp_path)])
    monkeypatch.setattr(journal, "SHAPES", journal.SHAPES | {"experts, picks": {"picks": (2, 8)}})
    return journal


def test_it_measures_what_it_says(journal, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(journal, "GOAL", 1000.0)
    assert journal.main() == 0
    result = json.loads((tmp_path / "results" / "journal.json").read_text())
    sizes = {(row["recorded"], row["requests"]): row["bytes"] for row in result["rows"]}
    assert len(sizes) == 9 and result["met"]
    assert sizes["bare", 256] - sizes["bare", 64] == 192 * 20
    assert sizes["experts", 256] - sizes["bare", 256] == 256 * (8 + 12 * 4 * 2)
    assert all(row[name] > 0 for row in result["rows"] for name in ("us", "paced_us", "mb_per_second"))
    assert result["recover"]["tokens"] == 2 * 2 * 3 * (1 + 64 + 256) and result["recover"]["mb"] > 0.2
    assert "of a step of 1.5 ms" in capsys.readouterr().out
    assert [each.name for each in tmp_path.iterdir()] == ["results"]


def test_a_missed_goal_shows(journal, monkeypatch):
    monkeypatch.setattr(journal, "GOAL", 0.0)
    assert journal.main() == 1
