"""The benchmark of equal bits: on a small stack in Triton's interpreter, and as it is on a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amalgam.model import chunks

from .. import tiny

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bits  # pyright: ignore[reportMissingImports]

    return bits


@pytest.fixture
def stack(bits):
    """Every kind of layer, and an indexer that has to choose."""
    return bits.random_stack(tiny.config(**tiny.FUSED), torch.bfloat16, "cpu", seed=0)


def test_every_way_has_the_same_bits(bits, stack):
    counts = bits.forward_counts(stack, [1, 19, 8, 2], tail=5, largest=7, seed=0)
    assert {way: count.differing for way, count in counts.items()} == dict.fromkeys(counts, 0)
    assert counts["alone"].numbers == counts["in another order"].numbers == 30 * 32
    decoded = counts["token by token"].numbers
    assert counts["in chunks"].numbers + decoded == 30 * 32 and counts["from a CUDA graph"].numbers == decoded


def test_every_run_s_gradients_have_the_same_bits(bits, stack):
    count = bits.gradient_count(stack, [1, 19], runs=2, seed=0)
    assert count.numbers > 10_000 and count.differing == 0


def test_a_cache_that_loses_an_entry_shows(bits, stack, monkeypatch: pytest.MonkeyPatch):
    """Every entry is written where what is no entry should be."""
    kept = chunks._finished

    def losing(*args) -> chunks.Finished:
        found = kept(*args)
        return chunks.Finished(found.windows, torch.zeros_like(found.row))

    monkeypatch.setattr(chunks, "_finished", losing)
    counts = bits.forward_counts(stack, [2, 19], tail=5, largest=7, seed=0)
    assert counts["alone"].differing == 0 < counts["token by token"].differing


def test_a_bit_counts(bits):
    a = torch.tensor([1.0, 0.0, 3.0]).bfloat16()
    assert bits.differing(a, a.clone()) == 0
    assert bits.differing(a, torch.tensor([1.0, -0.0, 3.02]).bfloat16()) == 2
    nothing = torch.tensor([float("nan")])
    assert bits.differing(nothing, nothing) == 1


@pytest.mark.gpu
def test_at_flash_s_width():
    command = [sys.executable, BENCHMARKS / "bits.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
