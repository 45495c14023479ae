"""The benchmark of low precision, on tiny sizes in Triton's interpreter."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from amalgam.kernels.fused import fp8

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter, on machines without a GPU")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")
    import floors  # pyright: ignore[reportMissingImports]
    import gpu  # pyright: ignore[reportMissingImports]
    import low_precision  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(gpu, "milliseconds", lambda run: (run(), 2.0)[1])
    monkeypatch.setattr(low_precision, "PRODUCTS", {"product": (32, 160)})
    monkeypatch.setattr(low_precision, "ROWS", (3,))
    setting = low_precision.Setting(floors.Ceilings(798, 3000, 5500), "cpu")
    return SimpleNamespace(command=low_precision, setting=setting)


def test_it_measures_what_it_says(bench, capsys):
    few = bench.command.Experts("few", 6, 2, 32, 32, 1, True)
    rows = [*bench.command.products(bench.setting, 5), *bench.command.experts(bench.setting, few)]
    rows += [*bench.command.errors(bench.setting, 5), *bench.command.bits(bench.setting, few)]
    assert [bench.command.missed(row) for row in rows] == [False] * len(rows) and len(rows) == 9
    assert json.dumps(rows, allow_nan=False)
    bench.command.show(rows)
    assert "experts, FP4 and its FP8" in capsys.readouterr().out
    assert bench.command.missed({"bf16": 1.4, "fp8": 1.0, "goal": 1.5})


def test_other_bits_and_wrong_products_show(bench, monkeypatch):
    right = fp8.multiply

    def wrong(x, *others):
        return right(x, *others) * (1 + x.shape[0] / 256)

    monkeypatch.setattr(fp8, "multiply", wrong)
    (row,) = bench.command.errors(bench.setting, 5)
    assert not row["met"]
    assert next(iter(bench.command.bits(bench.setting, bench.command.Experts("few", 12, 4, 64, 32, 2))))["differ"] > 0
