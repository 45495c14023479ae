"""The benchmarks' own instruments: a wrong model breaks a bound, and every process's CPU is counted."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amalgam.model import DeepseekV4, initialize, load, save
from amalgam.model.checkpoint import config_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def agreement(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import agreement  # pyright: ignore[reportMissingImports]

    return agreement


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    save(initialize(config_of("tiny"), 0), folder)
    return folder


@pytest.fixture
def kinds() -> dict[str, list[torch.Tensor]]:
    noise = torch.Generator().manual_seed(0)
    return {"random": [torch.randint(500, (n,), generator=noise) for n in (2, 40, 33, 140, 5, 70)]}


def test_a_right_model_holds_the_bounds(agreement, checkpoint, kinds):
    (found,) = agreement.agreement("model", checkpoint, kinds)
    assert found.verdict == "absolute"
    assert found.tokens == 290 and found.compared > 200


def test_a_cache_that_forgets_breaks_the_decoding_bound(agreement, checkpoint, kinds, monkeypatch):
    decode = DeepseekV4.decode

    def forgetful(model, tokens, cache):
        cache.layers[0]["rows"][:, 0] = 0.0
        return decode(model, tokens, cache)

    monkeypatch.setattr(DeepseekV4, "decode", forgetful)
    (found,) = agreement.agreement("model", checkpoint, kinds)
    assert found.decode_scaled > agreement.DECODE_BOUND and found.verdict == "BROKEN"


def test_a_forward_that_differs_breaks_the_bound(agreement, checkpoint, kinds, monkeypatch):
    ours = load(checkpoint)
    with torch.no_grad():
        ours.lm_head.weight[7] += 0.1
    monkeypatch.setattr(agreement, "load", lambda _: ours)
    (found,) = agreement.agreement("model", checkpoint, kinds)
    assert found.transformers_scaled > agreement.TRANSFORMERS_BOUND and found.verdict == "BROKEN"


def test_near_ties_are_found_where_scores_are_equal(agreement, checkpoint, kinds):
    model = load(checkpoint)
    tokens = torch.cat(kinds["random"])
    cu_seqlens = agreement.cu_seqlens_of(kinds["random"])
    assert agreement.near_ties(model, tokens, cu_seqlens).float().mean() < 0.1
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.zero_()  # pyright: ignore
    assert agreement.near_ties(model, tokens, cu_seqlens).all()


# In a process of its own: a Job takes all descendants of its process for the command's.
JOB = """
import os, sys, time
from pathlib import Path
from processes import Job, _descendants
spin = "import time\\nwhile time.process_time() < 0.3: pass"
command = ["sh", "-c", f"{sys.executable} -S -c '{spin}' & {sys.executable} -S -c '{spin}'; exec sleep 60"]
with Job(command, Path(os.devnull), dict(os.environ), Path("/")) as job:
    until = time.monotonic() + 30
    while job.cpu().total() < 0.55 and time.monotonic() < until:  # /proc counts whole ticks of 0.01 s
        pass
    print(job.cpu().total() >= 0.55)
print(_descendants())
"""


def test_a_job_counts_orphans_and_leaves_nothing_behind():
    done = subprocess.run(
        [sys.executable, "-c", JOB], capture_output=True, text=True, timeout=60, cwd="/",
        env={"PYTHONPATH": str(BENCHMARKS), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert (done.stdout.split("\n"), done.stderr) == (["True", "{}", ""], "")
