"""A dozen of the benchmark's random models; and a wrong model breaks each of its bounds."""

from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import transformers_agreement  # pyright: ignore[reportMissingImports]

    return transformers_agreement


# Each kind of layer first and last, alone and mixed, with and without YaRN, top-1 gates among them.
SEEDS = (0, 1, 3, 9, 15, 23, 30, 34, 37, 84, 104, 142)


@pytest.mark.parametrize("seed", SEEDS)
def test_log_probs_and_gradients_are_transformers(benchmark, seed):
    assert benchmark.agreement(seed).holds


def test_the_dozen_covers_every_place(benchmark):
    configs = [benchmark.random_config(seed) for seed in SEEDS]
    for place in (0, -1):
        assert {config.layer_types[place] for config in configs} == {benchmark.SWA, benchmark.CSA, benchmark.HCA}
    assert {len(set(config.layer_types)) for config in configs} == {1, 2, 3}
    kinds = [config.rope_parameters["compress"]["rope_type"] for config in configs]
    assert 3 <= kinds.count("yarn") <= 9
    assert {config.num_attention_heads % 2 for config in configs} == {0, 1}


@pytest.mark.parametrize(
    ("name", "change", "broken"),
    [
        ("model.layers.0.self_attn.sinks", 1e-2, "largest"),
        ("lm_head.weight", 3e-6, "mean"),
        ("model.layers.2.ffn_hc.base", 1e-3, "gradient"),
    ],
)
def test_a_difference_breaks_a_bound(benchmark, name, change, broken):
    model = benchmark.random_model(benchmark.random_config(9), 9)
    twin = benchmark.transformers_twin(model)
    with torch.no_grad():
        model.get_parameter(name).flatten()[::2].add_(change)
    found = benchmark.compare(model, twin, torch.arange(40) % model.config.vocab_size, 9, cut=False)
    assert not found.holds
    bounds = {"largest": benchmark.LOGPROB_BOUND, "mean": benchmark.MEAN_BOUND, "gradient": benchmark.GRADIENT_BOUND}
    assert getattr(found, broken) > bounds[broken]


def test_gradients_that_cancel_are_held_to_float64(benchmark):
    """The gate of a single chosen expert: its weight is a constant, so that both gradients are only rounding."""
    found = benchmark.agreement(3)
    assert benchmark.random_config(3).num_experts_per_tok == 1 and found.holds
    assert {"model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"} <= found.cancelled.keys()
    assert all(0 < error < 1e-6 for errors in found.cancelled.values() for error in errors)
