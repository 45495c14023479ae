"""The benchmarks' own instruments: a wrong model breaks a bound, every process's CPU is counted, goals are missed."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amalgam.errors import UserError
from amalgam.model import DeepseekV4, initialize, load, save
from amalgam.model.cache import Cache
from amalgam.model.config import config_of

from ..pipelines.made_run import DOMAINS, made_run

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


@pytest.mark.parametrize("broken", [False, True])
def test_what_a_cache_forgets_breaks_the_bound_of_packing(monkeypatch, broken):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import packing  # pyright: ignore[reportMissingImports]

    if broken:  # drops tokens without the rings' slack for it
        new = DeepseekV4.new_cache
        monkeypatch.setattr(DeepseekV4, "new_cache", lambda model, count, room, slack=0: _lax(new(model, count, room)))
    found = {each.way: each for each in packing.measure("mixed", 1, (1, 9, 60))}
    assert found.keys() == packing.WAYS.keys()
    assert all(each.positions == 70 and each.compared > 20 for each in found.values())
    assert all(each.largest <= packing.BOUND for each in found.values() if each.way != "rolled back")
    assert (found["rolled back"].largest > packing.BOUND) == broken
    assert (found["rolled back"].float64 > packing.FLOAT64_BOUND) == broken
    assert [each.holds for each in found.values()] == [True, True, True, not broken]


def _lax(cache: Cache) -> Cache:
    cache.rollback = lambda length: setattr(cache, "length", length.clone())
    return cache


def test_a_right_model_holds_the_bounds(agreement, checkpoint, kinds):
    (found,) = agreement.agreement("model", checkpoint, kinds)
    assert found.verdict == "absolute"
    assert 0 < found.float64_max < 1e-12 < found.rounding_max < 1e-5
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
    monkeypatch.setattr(agreement, "load", lambda _, dtype=torch.float32: copy.deepcopy(ours).to(dtype))
    (found,) = agreement.agreement("model", checkpoint, kinds)
    assert found.transformers_scaled > agreement.TRANSFORMERS_BOUND and found.verdict == "BROKEN"
    assert found.float64_max < 1e-12  # the model itself is as exact as before


def test_models_come_from_a_run_a_checkpoint_or_a_preset(agreement, checkpoint, tmp_path):
    for given in ("tiny", str(checkpoint)):
        recipe, models = agreement.checkpoints(given)
        assert list(models) == [Path(given).name] and set(recipe.domains) == {"arithmetic", "strings"}
    with pytest.raises(UserError, match="neither a checkpoint's folder"):
        agreement.checkpoints(str(tmp_path))


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


# Its 0.6 s of CPU show up nowhere but in /proc while it lives: Ray's raylet ignores SIGCHLD too.
IGNORED = """
import os, subprocess, sys, processes
from pathlib import Path
processes._READING_SECONDS = 0.02
spin = "import time\\nwhile time.process_time() < 0.6: pass"
parent = (
    "import signal, subprocess, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
    f"subprocess.run([sys.executable, '-S', '-c', {spin!r}])"
)
with processes.Job([sys.executable, "-S", "-c", parent], Path(os.devnull), dict(os.environ), Path("/")) as job:
    job.root.wait(30)
print(job.cpu_seconds >= 0.5)
"""


def test_a_job_counts_processes_that_nobody_waits_for():
    done = subprocess.run(
        [sys.executable, "-c", IGNORED], capture_output=True, text=True, timeout=60, cwd="/",
        env={"PYTHONPATH": str(BENCHMARKS), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("True\n", "")


# The quickstart's goals

RIGHT = {"base": 20, "sft-arithmetic": 60, "sft-strings": 60, "grpo-arithmetic": 80, "grpo-strings": 80,
         "average": 40, "merged": 80}  # fmt: skip


@pytest.fixture
def goals(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import goals  # pyright: ignore[reportMissingImports]

    return goals


@pytest.fixture
def seeds(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import seeds  # pyright: ignore[reportMissingImports]

    return seeds


def runs_of(folder: Path, right: dict[str, int]):
    """Two runs; every model answers the first so many of 100 problems in both domains."""
    outcomes = {model: {domain: [i < n for i in range(100)] for domain in DOMAINS} for model, n in right.items()}
    return [made_run(folder / str(seed), outcomes) for seed in range(2)]


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"base": 4}, ["base on arithmetic", "base on strings"]),
        ({"base": 41}, ["base on arithmetic", "base on strings"]),
        ({"sft-strings": 73}, ["grpo-strings over sft-strings on strings"]),
        ({"grpo-arithmetic": 44, "sft-arithmetic": 30}, ["grpo-arithmetic over base on arithmetic"]),
        ({"merged": 75}, ["merged of grpo-arithmetic on arithmetic", "merged of grpo-strings on strings"]),
        ({"average": 80}, ["merged over average on the mean of the domains"]),
    ],
)
def test_every_goal_can_be_missed(goals, tmp_path, changed, missed):
    verdicts = goals.verdicts(runs_of(tmp_path, RIGHT | changed))
    assert len(verdicts) == 9 and [each.what for each in verdicts if not each.met] == missed


def test_a_goal_is_missed_where_nothing_was_compared(goals, tmp_path):
    *others, last = goals.verdicts(runs_of(tmp_path, {m: n for m, n in RIGHT.items() if m != "average"}))
    assert all(each.met for each in others)
    assert last.cells() == ["merged over average on the mean of the domains", "-", "-", "interval above 0", "MISSED"]


def test_a_verdict_is_strict_json(goals, seeds):
    """Without a high end, as where the other model is nearly never right, and without an estimate."""
    estimates = ((2.0, 1.0, math.inf), None)
    found = [seeds.comparison(goals.Verdict("x of y", each, goals.KEEPS)) for each in estimates]
    assert [each["estimate"] for each in json.loads(json.dumps(found, allow_nan=False))] == [[2.0, 1.0, None], None]


def test_evaluations_are_medians_over_the_runs(seeds, tmp_path):
    runs = runs_of(tmp_path, {"base": 20})
    for run, seconds in zip(runs, (3.0, 5.0), strict=True):
        run.evaluation_times = {"base": {"wall_seconds": seconds}}
    assert seeds.evaluations(runs) == [{"model": "base", "wall_seconds": 4.0}]


def test_a_verdict_is_told_in_the_goals_unit(goals):
    cells = goals.Verdict("x over y", (0.0949, -0.001, 0.2), goals.ADDS).cells()
    assert cells == ["x over y", "+9.5 points", "-0.1 to +20.0", "at least 8 points, interval above 0", "MISSED"]
    assert goals.Verdict("x of y", (0.95, 0.9, 1.02), goals.KEEPS).cells()[1:] == [
        "95.0 %", "90.0 to 102.0", "at least 95 %", "met",
    ]  # fmt: skip


def test_tables_of_several_seeds_are_summed(seeds):
    row = {"model": "base", "domain": "strings", "correct": 3, "total": 8}
    other = {"model": "base", "domain": "arithmetic", "correct": 1, "total": 8}
    assert seeds.pooled([[row, other], [row | {"correct": 5}, other]]) == [
        row | {"correct": 8, "total": 16}, other | {"correct": 2, "total": 16},
    ]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), [([0, 1], "quickstart-1: is there"), ([2, 2], "twice"), ([-1], "seed")])
def test_runs_that_cannot_be_measured_are_refused(seeds, tmp_path, given, message):
    (tmp_path / "quickstart-1").mkdir()
    assert seeds.new_folders([2, 0], tmp_path) == {n: tmp_path / f"quickstart-{n}" for n in (2, 0)}
    with pytest.raises(UserError, match=message):
        seeds.new_folders(given, tmp_path)
