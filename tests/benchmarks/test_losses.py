"""The benchmark of losses over the vocabulary, on tiny sizes in Triton's interpreter."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from amalgam.kernels.fused import losses as fused

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter, on machines without a GPU")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The command, and a setting in which each run takes 26 ms and 0.25 GiB."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")
    import attention_floors  # pyright: ignore[reportMissingImports]
    import gpu  # pyright: ignore[reportMissingImports]
    import losses  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(gpu, "milliseconds", lambda run: (run(), 26.0)[1])
    monkeypatch.setattr(gpu, "extra_bytes", lambda run: 2**28)
    monkeypatch.setattr(losses, "FEW", 3)
    ceilings = attention_floors.Ceilings(798, 3000, 5500)
    return SimpleNamespace(command=losses, setting=losses.Setting(ceilings, 5, 32, 80, "cpu"))


def test_it_measures_what_it_says(bench, capsys):
    rows = [*bench.command.measured(bench.setting), *bench.command.errors(bench.setting)]
    found = {row["name"]: row for row in rows if "ms" in row}
    assert {"torch: cross-entropy", "torch: reverse KL", "reverse KL, 4 teachers"} < found.keys()
    assert found["log-prob"]["met"] is False and found["reverse KL, 1 teacher"]["met"] is True
    assert found["log-prob"]["extra_gib"] == pytest.approx(0.25, abs=1e-4)
    checked = [row for row in rows if "errors" in row]
    assert len(checked) == 8 and all(row["met"] for row in checked)
    assert json.dumps(rows, allow_nan=False)
    bench.command.show(rows)
    assert "25 ms, 0.3 GiB: MISSED" in capsys.readouterr().out


def test_the_floor_is_four_products(bench):
    setting = bench.command.Setting(bench.setting.ceilings)
    one = bench.command.product(setting.tokens, setting.hidden, setting.vocabulary).floor(setting.ceilings)
    assert one == pytest.approx(5.44, abs=0.01)


def test_a_wrong_gradient_shows(bench, monkeypatch):
    right = fused._multiply_into

    def wrong(out, a, b, beta):
        right(out, a, b, beta)
        out.mul_(1.0 if beta else 1.05)  # the head's

    monkeypatch.setattr(fused, "_multiply_into", wrong)
    row = next(iter(bench.command.errors(bench.setting)))
    assert not row["met"] and row["errors"]["head"] > 0.03 and row["errors"]["hidden"] < 0.01
