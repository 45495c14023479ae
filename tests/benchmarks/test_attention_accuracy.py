"""The benchmark of attention's accuracy: every case on tiny shapes in Triton's interpreter, and how faults show."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from .. import tiny
from ..kernels import naive
from .test_attention import bench, results, run, setting  # noqa: F401 - fixtures

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter, on machines without a GPU")


@pytest.fixture
def small(bench, setting, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:  # noqa: F811
    """The benchmark's modules and few, small cases: splits hold 4 entries, and a document has up to 9."""
    import attention_accuracy  # pyright: ignore[reportMissingImports]
    import attention_oracles  # pyright: ignore[reportMissingImports]
    import beside_float64  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(torch, "seed", lambda: 0)
    monkeypatch.setattr("amalgam.kernels.fused.attention.SPLIT", 4)
    monkeypatch.setattr(attention_oracles, "SOME", 7)
    sizes = attention_accuracy.Sizes(lengths=(1, 9), times=(2,), dims=(32,), heads=4, chosen=(2,), rows=(1, 5))
    monkeypatch.setattr(attention_accuracy, "SIZES", sizes)
    config = tiny.config(**tiny.FUSED, sliding_window=4, compress_rates={tiny.CSA: 2, tiny.HCA: 5})
    return SimpleNamespace(
        accuracy=attention_accuracy, errors=beside_float64, oracles=attention_oracles,
        setting=replace(setting, config=config), measure=bench.measure,
    )  # fmt: skip


def test_every_operation_meets_its_bounds(small):
    part = small.measure("accuracy", small.setting)
    assert "error" not in part and json.dumps(part, allow_nan=False)
    rows = {(row["name"], row["tokens"]): row for row in part["rows"]}
    assert len(rows) == len(part["rows"])
    assert {name.split(",")[0] for name, _ in rows} == {
        "attention", "decoding", "head mass", "project", "project_wide", "project_groups", "norm_rope", "rms_norm",
        "apply_rope", "compress", "index scores", "select",
    }  # fmt: skip
    assert [name for name, row in rows.items() if not row["met"]] == []
    atomic = rows["attention, CSA, 2 chosen, 4 x 16, RoPE off, atomic, bf16", 10]
    assert atomic["errors"].keys() == {"value", "q", "rows", "sinks", "entries"} and atomic["goal"] == 1e-2
    assert rows["attention, an entry a token, all visible, 4 x 32, RoPE off, fp32", 10]["goal"] == 1e-4
    assert rows["project_wide, HCA compressor, 32 to 16, bf16 to fp32", 5]["goal"] == 1e-4


def test_an_operation_that_is_off_by_2_percent_misses_its_bound(small, monkeypatch):
    norm = small.accuracy.rms_norm
    monkeypatch.setattr(small.accuracy, "rms_norm", lambda *given: 1.02 * norm(*given))
    rows = list(small.accuracy.passes(small.setting))
    assert [row["name"] for row in rows if not row["met"]] == [f"rms_norm, latent, 16, {of}" for of in ("bf16", "fp32")]
    assert all(0.015 < each < 0.025 for row in rows if not row["met"] for each in row["errors"].values())


def test_a_gradient_s_fault_and_what_is_not_written_show(small, bench):  # noqa: F811
    def faulty(given: dict[str, Tensor], grad: Tensor) -> list[Tensor]:
        value = torch.empty_like(given["x"])
        value[1:] = given["x"][1:] ** 2
        return [value, 2 * given["x"] * grad * 1.02]

    errors = small.errors.compare({"x": torch.randn(5)}, faulty, lambda x: x**2, torch.float32)
    assert errors == {"value": None, "x": pytest.approx(0.02, rel=1e-4)}
    (row,) = small.errors.rows("square", 5, torch.float32, errors)
    assert not row["met"] and bench.parts.told(row, "errors") == "value not finite, x 2.0e-02"
    assert small.errors.row("square", 5, {"value": 1e-4}, 1e-4)["met"]


def test_a_missed_bound_is_the_command_s_exit_code(bench, results, monkeypatch, capsys, small):  # noqa: F811
    found = small.errors.row("x", 8, {"value": 0.02}, 0.01)
    monkeypatch.setattr(bench.command, "PARTS", {"accuracy": lambda _: iter([found])})
    assert run(bench, monkeypatch, "--only", "accuracy") == 1
    assert "goals missed: x 8" in capsys.readouterr().out


@pytest.mark.parametrize("ratio, topk", [(0, None), (2, None), (2, 2)])
def test_the_oracle_of_attention_is_that_of_loops(small, ratio, topk):
    place = naive.layout([1, 9, 6], 4, ratio)
    seen, q, rows, sinks = place.seen(ratio), *(torch.randn(*n).double() for n in ((16, 3, 8), (16, 8), (3,)))
    entries = torch.randn(naive.entries_of(place, ratio), 8).double() if ratio else None
    chosen = naive.random_choice(seen, topk) if topk else None
    turn = torch.polar(torch.ones(16, 3), torch.randn(16, 3))
    expected = naive.attend(q, rows, entries, sinks, seen, chosen)
    attend = partial(small.oracles.attend, seen, chosen)
    torch.testing.assert_close(attend(None, q, rows, sinks, entries), expected)
    torch.testing.assert_close(attend(turn, q, rows, sinks, entries), naive.rope_back(expected, turn))
    if chosen is not None and entries is not None:
        found = small.oracles.head_mass(seen, chosen, q, rows, sinks, entries)
        torch.testing.assert_close(found, naive.head_mass(q, rows, entries, sinks, seen, chosen))
        weights = torch.randn(16, 3).double()
        expected = naive.index_scores(q, weights, entries, seen, chosen)
        found = small.oracles.index_scores(seen, chosen, q, weights, entries)
        torch.testing.assert_close(found, expected.masked_fill(chosen < 0, 0.0))


def test_the_oracle_of_attention_reads_rings(small):
    """The last query of a document, whose last 5 rows are also in a ring."""
    seen = naive.layout([9], 4).seen()
    q, rows, sinks = torch.randn(9, 2, 8).double(), torch.randn(9, 8).double(), torch.randn(2).double()
    ring = torch.randn(11, 8).double()
    for position in range(4, 9):
        ring[6 + position % 5] = rows[position]
    last = replace(seen.of(slice(8, 9)), row_first=torch.tensor([6], dtype=torch.int32), slots=5)
    found = small.oracles.attend(last, None, None, q[8:], ring, sinks)
    torch.testing.assert_close(found, naive.attend(q, rows, None, sinks, seen, None)[8:])


@pytest.mark.parametrize("ratio, channels", [(4, 32), (5, 16)])
def test_the_oracle_of_compression_is_that_of_loops(small, ratio, channels):
    place = naive.layout([9, 2, 3 * ratio], 4, ratio)
    total = int(place.start.numel())
    values, scores = torch.randn(2, total, channels).double()
    bias, weight = torch.randn(ratio, channels).double(), torch.randn(16).double()
    found = small.oracles.compress(place.entries[ratio].windows, 1e-6, values, scores, bias, weight)
    torch.testing.assert_close(found, naive.compress(values, scores, bias, weight, place, ratio))


def test_wrong_choices_are_counted(small):
    """Scores of 8 entries fall, but for 6 and 7, which are nearly equal; two of up to four complete ones are chosen."""
    seen = naive.layout([8, 8], 4, 2).seen(2)
    q, weights = torch.ones(16, 1, 1), torch.ones(16, 1)
    keys = torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 2.0 + 1e-6]).unsqueeze(1)
    right = torch.tensor([[-1, -1], [0, -1], [0, -1], *[[0, 1]] * 5] * 2, dtype=torch.int32)

    def wrong(*faults: tuple[int, list[int]]) -> int:
        found = right.clone()
        for query, choice in faults:
            found[query] = torch.tensor(choice, dtype=torch.int32)
        return small.accuracy.wrong_choices(found, seen, 2, q, weights, keys)

    assert wrong() == 0
    for fault in ([0, 2], [1, 0], [0, 0], [0, -1], [-1, 0], [0, 4], [0, 99]):
        assert wrong((7, fault)) == 1, fault
    assert wrong((0, [0, -1])) == 1 and wrong((1, [1, -1]), (2, [0, 1])) == 2
    keys[1], keys[2] = 6.0, 6.0 + 1e-6  # too near to 1's score
    assert wrong((7, [0, 2]), (6, [0, 2])) == 0
