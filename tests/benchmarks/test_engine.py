"""The engine's benchmark: every part on a small model and on this CPU, whose times mean nothing."""

from pathlib import Path

import pytest

from amalgam.rl.settings import EngineSettings

from .. import tiny

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import engine  # pyright: ignore[reportMissingImports]

    return engine


@pytest.fixture
def setting(engine):
    config = tiny.config(hidden_size=64, moe_intermediate_size=32, index_head_dim=32)
    return engine.Setting(
        engine.Ceilings(1, 1, 1), config, requests=(1, 3), steps=4, context=90, prompts=(5, 40), group=(3, 20, 4),
        device="cpu", engine=EngineSettings(memory=2**26),
    )  # fmt: skip


def test_every_part_measures(engine, setting):
    found = {name: list(part(setting)) for name, part in engine.PARTS.items()}
    assert all(row["ms"] > 0 for rows in found.values() for row in rows)
    assert [row["name"] for row in found["decode"]] == ["requests that decode", "transformers' generate"] * 2
    assert [row["tokens"] for row in found["prefill"]] == [40, 40]
    assert found["group"][1]["faster"] > 0
    weights = {row["name"]: row["weights_gib"] for row in found["precision"]}
    assert weights["bf16 experts"] > weights["FP8 experts"] > weights["FP4 experts"]


def test_a_step_s_tokens_are_counted(engine, setting):
    """Of three requests in each of four steps one token; with the step behind, which a GPU has, the same."""
    model = engine.made(setting)
    for lag in (False, True):
        served = engine.Engine(model, (), settings=EngineSettings(max_batch=3, context=30, memory=2**26), lag=lag)
        seconds, tokens = engine.step_time(served, engine.random_requests(setting, 3, 5, 20), 4)
        assert tokens == 3 and seconds > 0 and not served.busy
