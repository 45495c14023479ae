"""The benchmark of low precision, on tiny sizes in Triton's interpreter."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from amalgam.kernels.fused import fp8

from .. import tiny
from .test_attention import bench  # noqa: F401 - a fixture

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter, on machines without a GPU")


@pytest.fixture
def low(bench, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:  # noqa: F811
    """The benchmark and a tiny setting, in which each run takes 2 ms."""
    import low_precision  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(bench.gpu, "on_device", lambda run: (run(), 2.0)[1])
    monkeypatch.setattr(low_precision, "PRODUCTS", {"product": (32, 160)})
    monkeypatch.setattr(low_precision, "ROWS", (3,))
    shape = low_precision.Experts("few", 2, 32, 32, 1)
    config = tiny.config(**tiny.FUSED, num_hidden_layers=1, layer_types=[tiny.SWA], mlp_layer_types=["moe"])
    config.moe_intermediate_size = 32
    whole = low_precision.Whole(
        bench.floors.Ceilings(798, 3000, 5500), config, config, steps=(9,), documents=5, device="cpu"
    )
    setting = low_precision.Setting(whole, rows=(5,), experts=(shape,), few=shape, routed=(6,), requests=2)
    return SimpleNamespace(command=low_precision, setting=setting, parts=bench.parts, gpu=bench.gpu)


def measure(low: SimpleNamespace, name: str) -> dict[str, dict]:
    part = low.parts.measure(low.command.PARTS[name], low.setting)
    assert "error" not in part and json.dumps(part, allow_nan=False)
    return {row["name"]: row for row in part["rows"]}


def test_it_measures_what_it_says(low, capsys):
    rows = {key: row for name in low.command.PARTS for key, row in measure(low, name).items()}
    assert {name for name, row in rows.items() if not row.get("met", True)} == set() and len(rows) == 17
    assert rows["product"]["faster"] == 1.0 and rows["few: FP4"]["ms"] == 2.0
    sizes = [rows[f"{name}: a token decoded"]["weights_gib"] for name in ("bf16", "FP4, FP8")]
    assert sizes[1] < 0.7 * sizes[0]
    assert "experts: FP4 and its FP8, 5: 0" in capsys.readouterr().out


def test_a_missed_goal_shows(low, monkeypatch):
    times = iter([1.0, 1.4, 1.0, 1.4])
    monkeypatch.setattr(low.gpu, "on_device", lambda run: next(times))
    rows = low.command.experts(replace(low.setting, routed=(10_001,)))
    assert next(rows)["met"] is False and "met" not in next(rows)


def test_other_bits_and_wrong_products_show(low, monkeypatch):
    right = fp8.multiply

    def wrong(x, *others):
        return right(x, *others) * (1 + x.shape[0] / 256)

    monkeypatch.setattr(fp8, "multiply", wrong)
    (row,) = low.command.errors(low.setting)
    assert not row["met"]
    assert next(iter(low.command.bits(low.setting)))["differing"] > 0
