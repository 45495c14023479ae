"""A whole run of a tiny recipe: what it leaves, and that no interruption changes it."""

import fcntl
import json
import os
import re
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from amalgam.errors import UserError
from amalgam.model import load
from amalgam.pipelines import sft as sft_module
from amalgam.pipelines.cli import app
from amalgam.pipelines.recipe import Recipe, load_recipe, resolved_yaml
from amalgam.pipelines.run import _refuse_another, run_recipe
from amalgam.pipelines.sft import demonstrations, weighted
from amalgam.pipelines.sft import loss as sft_loss
from amalgam.pipelines.stage import StageRun
from amalgam.rewards.domains import Domain
from amalgam.rl.packing import collate

from .test_stage import tear
from .tiny_run import RECIPE, STEPS, driver, make_base, metrics, outcome

MODELS = ["base", "sft-numbers", "sft-words", "grpo-numbers", "grpo-words", "average", "merged"]
STAGES = {name: STEPS[name.partition("-")[0]] for name in MODELS[1:]}


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    file = folder / "tiny.yaml"
    file.write_text(RECIPE.replace("BASE", str(make_base(folder / "base"))))
    return file


@pytest.fixture(scope="module")
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(str(recipe_file))


@pytest.fixture(scope="module")
def whole(ray_session: None, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    return run_recipe(recipe, tmp_path_factory.mktemp("whole")).parent


# ---- what a run leaves


def test_results_are_the_evaluations_counts(whole: Path):
    rows = json.loads((whole / "results.json").read_text())
    assert [(r["model"], r["domain"]) for r in rows] == [(m, d) for m in MODELS for d in ("numbers", "words")]
    problems = []
    for row in rows:
        evaluation = json.loads((whole / "evaluations" / f"{row['model']}.json").read_text())
        found = evaluation["domains"][row["domain"]]
        assert row["total"] == len(found) == 8
        assert row["correct"] == sum(o["correct"] for o in found)
        assert row in evaluation["rows"]
        problems.append([(o["task"], o["index"], o["question"]) for o in found])
    assert problems[:2] * 7 == problems, "every model answers the same problems"


def test_every_step_has_its_row_and_its_rollouts(whole: Path):
    rows = metrics(whole)
    assert {stage: [r["step"] for r in found] for stage, found in rows.items()} == {
        stage: list(range(1, steps + 1)) for stage, steps in STAGES.items() if steps
    }
    for stage, members in (("grpo-numbers", 4), ("grpo-words", 4), ("merged", 1)):
        files = sorted((whole / "stages" / stage / "rollouts").iterdir())
        assert [f.name for f in files] == [f"{step:06}.parquet" for step in range(1, STAGES[stage] + 1)]
        requests: list[int] = []
        for step, file in enumerate(files, 1):
            table = pq.read_table(file).to_pylist()
            assert len(table) == (16 if members == 4 else 5)
            assert {(r["step"], v) for r in table for v in r["versions"]} == {(step, step - 1)}
            assert all(len(r["response_ids"]) == len(r["logprobs"]) == r["tokens"] for r in table)
            requests += [r["request"] for r in table]
        assert requests == list(range(len(requests))), "every sample of a stage has noise of its own"


def test_a_rate_counts_trained_tokens_and_no_prompts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sft_module.time, "monotonic", lambda: 12.0)
    mask = np.arange(2, dtype=np.float32)
    rows = [{"tokens": np.zeros(n, np.int32), "trained": np.repeat(mask, [n - 3, 3])} for n in (9, 5)]
    assert sft_module.rate(rows, began=10.0) == 3.0


def test_rewards_in_the_rollouts_are_those_in_the_metrics(whole: Path):
    for stage in ("grpo-numbers", "grpo-words"):
        for row in metrics(whole)[stage]:
            table = pq.read_table(whole / "stages" / stage / "rollouts" / f"{row['step']:06}.parquet").to_pylist()
            rewards = [r["value"] for r in table]
            assert row["reward"] == pytest.approx(sum(rewards) / 16)
            assert row["part_format"] == pytest.approx(sum(r["part_format"] for r in table) / 16)
            assert row["correct"] == sum(r["correct"] for r in table) / 16
            groups = [rewards[i : i + 4] for i in range(0, 16, 4)]
            assert row["dropped_groups"] == sum(max(g) - min(g) < 1e-6 for g in groups)


def test_sampler_and_learner_agree_in_every_step(whole: Path):
    """On-policy: the ratio is 1 but for rounding, whatever happened to the weights in the steps before."""
    learned = [r for s in ("grpo-numbers", "grpo-words") for r in metrics(whole)[s] if "mismatch" in r]
    assert 6 < len(learned) < 24, "the test needs steps with and without groups that disagree"
    assert max(abs(r["mismatch"]) for r in learned) < 1e-6
    assert all(r["clipped"] == 0 for r in learned)
    assert all(r["grad_norm"] > 0 for r in learned)


def test_the_indexers_are_trained_where_their_loss_has_a_weight(whole: Path, recipe: Recipe):
    found = metrics(whole)
    for stage, origin in (("sft-words", str(recipe.base)), ("grpo-words", "sft-words"), ("merged", str(recipe.base))):
        assert all(row["indexer_loss"] > 0 for row in found[stage] if "grad_norm" in row)
        before = load(origin if stage != "grpo-words" else whole / "stages" / origin / "checkpoint").state_dict()
        after = load(whole / "stages" / stage / "checkpoint").state_dict()
        moved = [not torch.equal(tensor, before[name]) for name, tensor in after.items() if ".indexer." in name]
        assert len(moved) == 6 and all(moved)


def test_the_sft_checkpoint_is_the_best_epochs(whole: Path, recipe: Recipe):
    """By its own held-out loss, in at least one stage an earlier epoch than the last."""
    earlier = []
    for name in ("numbers", "words"):
        found = [r["held_out_loss"] for r in metrics(whole)[f"sft-{name}"] if "held_out_loss" in r]
        settings = recipe.domains[name]
        domain = Domain(name, settings.mode, settings.tasks, settings.demonstrations, 8, recipe.seed)
        base = Path(str(recipe.base))
        stage: Any = SimpleNamespace(run=SimpleNamespace(domains={name: domain}, model=lambda _, base=base: base))
        _, held_out = demonstrations(stage, SimpleNamespace(domains=[name], validation=8, from_="base"))  # pyright: ignore
        model = load(whole / "stages" / f"sft-{name}" / "checkpoint")
        with torch.no_grad():
            value = sft_loss(model, collate(weighted(held_out), "cpu"), {})[0].item()
        assert value == pytest.approx(min(found), rel=1e-5)
        earlier.append(found[-1] > min(found))
    assert any(earlier), "the test needs a stage whose last epoch is not its best"


def test_a_finished_stage_says_so_and_keeps_no_state(whole: Path):
    for stage, steps in STAGES.items():
        folder = whole / "stages" / stage
        done = json.loads((folder / "done.json").read_text())
        assert (done["stage"], done["steps"], done["failures"]) == (stage, steps, {})
        assert done["wall_seconds"] > 0
        assert done["cpu_seconds"] > 0
        assert not (folder / "state").exists()
        assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]
    assert (whole / "recipe.yaml").read_text().count("kind:") == len(STAGES)
    assert json.loads((whole / "versions.json").read_text())["torch"] == torch.__version__


def test_the_report_names_every_model(whole: Path):
    report = (whole / "report.html").read_text()
    assert all(name in report for name in MODELS)


def test_every_checkpoint_loads_with_transformers(whole: Path):
    tokens = torch.arange(30) * 37 % 512
    for stage in STAGES:
        folder = whole / "stages" / stage / "checkpoint"
        model, oracle = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            ours = torch.log_softmax(model.logits(model(tokens, torch.tensor([0, 30])).hidden), -1)
            theirs = torch.log_softmax(oracle(tokens.unsqueeze(0)).logits[0], -1)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_average_is_the_experts_mean(whole: Path):
    one, other, mean = (
        load(whole / "stages" / s / "checkpoint").state_dict() for s in ("grpo-numbers", "grpo-words", "average")
    )
    assert any(not torch.equal(one[name], other[name]) for name in mean)
    for name, tensor in mean.items():
        expected = (one[name] + other[name]) / 2 if tensor.is_floating_point() else one[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


def test_a_finished_run_runs_nothing_again(whole: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]):
    before = {f: f.stat().st_mtime_ns for f in whole.glob("stages/**/*")}
    expected = outcome(whole)
    run_recipe(recipe, whole.parent)
    assert {f: f.stat().st_mtime_ns for f in whole.glob("stages/**/*")} == before
    assert outcome(whole) == expected
    assert "starts" not in capsys.readouterr().out


# ---- interruptions


@contextmanager
def before_commit(monkeypatch: pytest.MonkeyPatch, stage: str, step: int, act):
    """Calls act(stage run) when `step` steps of the stage are done, and not yet committed."""
    original = StageRun.commit

    def commit(self: StageRun, *arguments) -> None:
        if (self.name, self.step + 1) == (stage, step):
            act(self)
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StageRun, "commit", commit)
        yield


def fail(_: StageRun) -> None:
    raise ZeroDivisionError("a bug in a stage")


def press_ctrl_c(stage: StageRun) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    assert stage.run.stop.wait(60)


def test_no_interruption_changes_a_bit(
    whole: Path,
    recipe: Recipe,
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """One run, cut off by an error in SFT, kill -9 in GRPO that also tears its last state, Ctrl-C in distillation."""
    run = tmp_path / recipe.name
    with before_commit(monkeypatch, "sft-numbers", 4, fail), pytest.raises(ZeroDivisionError, match="a bug in a stage"):
        run_recipe(recipe, tmp_path)
    assert metrics(run)["sft-numbers"][-1]["step"] == 3
    assert not (run / "stages" / "grpo-numbers").exists()
    assert not (run / "results.json").exists()
    half = run / "stages" / "sft-numbers" / ".checkpoint"  # as left by a kill while the best epoch's is copied
    half.mkdir()
    (half / "config.json").write_text("{")

    def going_on() -> dict[str, tuple[int, int]]:
        """The steps of the two saves of each GRPO stage in its middle, unless it was between the two writes."""
        found: dict[str, tuple[int, int]] = {}
        for folder in (run / "stages" / name for name in ("grpo-numbers", "grpo-words")):
            if (folder / "progress.json").exists() and not (folder / "done.json").exists():
                saves = json.loads((folder / "progress.json").read_text())
                states = json.loads((folder / "state" / "state.json").read_text())
                if len(saves) == 2 and {s["learned"] for s in saves} == {s["step"] for s in states}:
                    found[folder.name] = saves[0]["step"], saves[1]["step"]
        return found

    with driver(recipe_file, tmp_path) as other:
        other.wait_until(lambda: (run / "stages" / "grpo-numbers").exists(), "the first GRPO stage", 300)
        with pytest.raises(UserError, match=f"^{run}: another process is running this"):
            run_recipe(recipe, tmp_path)
        other.wait_until(lambda: bool(going_on()), "two states of a GRPO stage", 300)
        other.kill()
    assert list(run.glob("stages/sft-*/done.json"))
    stage, (before, torn) = next(iter(going_on().items()))
    tear(run / "stages" / stage / "state")

    capsys.readouterr()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell script's background has it ignored
    with before_commit(monkeypatch, "merged", 2, press_ctrl_c), pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path)
    said = capsys.readouterr().out
    assert f"{stage}: the state of step {torn} is torn; going back to step {before}" in said
    assert f"{stage} (grpo) starts: 12 steps, going on after {before}" in said
    assert "the same command goes on from merged step 2" in said
    assert "(sft) starts" not in said, "what is done is not started again"

    run_recipe(recipe, tmp_path)
    assert "merged (distill) starts: 4 steps, going on after 2" in capsys.readouterr().out
    ours, theirs = outcome(run), outcome(whole)
    assert ours.keys() == theirs.keys()
    for name, found in theirs.items():
        assert ours[name] == found, name


def test_colocated_stages_find_the_same(recipe_file: Path, whole: Path, tmp_path: Path):
    """Bit for bit: each kind of stage that samples, in the run that is otherwise done."""
    recipe = load_recipe(str(recipe_file), ["resources.placement=colocated"])
    run = Path(shutil.copytree(whole, tmp_path / recipe.name))
    (run / "recipe.yaml").write_text(resolved_yaml(recipe))
    again = ("grpo-words", "merged")
    for name in again:
        shutil.rmtree(run / "stages" / name)
        (run / "evaluations" / f"{name}.json").unlink()
    kept = [line for line in (run / "metrics.jsonl").open() if json.loads(line)["stage"] not in again]
    (run / "metrics.jsonl").write_text("".join(kept))
    run_recipe(recipe, tmp_path)
    ours, theirs = outcome(run), outcome(whole)
    assert ours.keys() == theirs.keys()
    for name, found in theirs.items():
        assert ours[name] == found, name


# ---- bad input


def refused(recipe_file: Path, runs: Path, *overrides: str) -> str:
    """What `amalgam run` says, on one line, before it exits with 2."""
    arguments = [part for override in overrides for part in ("--set", override)]
    result = CliRunner().invoke(app, ["run", str(recipe_file), "--runs", str(runs), *arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("domains.words.tasks={spell_backwards: {}}", "domains.words.tasks.* no task 'spell_backwards'; did you mean"),
        ("domains.words.tasks={spell_backward: {min_len: 3}}", "spell_backward.min_len: .* did you mean min_word_len"),
        ("domains.words.tasks={chain_sum: {min_terms: many}}", "domains.words.tasks.chain_sum.min_terms: 'many'"),
        ("domains.words.tasks={countdown: {}}", "domains.words.tasks.countdown: its scorer runs Python code"),
        ("evaluate.problems=5000", "domains.numbers.tasks.chain_sum: its space of problems is too small"),
        ("stages.merged.teachers={words: grpo-words}", "stages.merged.teachers: the domain 'numbers' has no teacher"),
        ("stages.grpo-words.from=sft-wrods", "stages.grpo-words.from: no stage 'sft-wrods'; did you mean .*sft-words"),
        ("base=nowhere", "base: 'nowhere' is neither a preset nor a folder"),
        ("precision.experts=fp4", "base/config.json: moe_intermediate_size: 16 is no multiple of 32, which precision"),
        ("precision.kv=fp4", "precision.kv: .*fp4.* is not possible; did you mean 'fp8'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(recipe_file: Path, tmp_path: Path, override: str, message: str):
    assert re.search(message, refused(recipe_file, tmp_path / "runs", override))
    assert not (tmp_path / "runs").exists()


def test_shards_of_narrow_weights_are_refused(recipe_file: Path, tmp_path: Path):
    overrides = ("stages.merged.optimizer.zero_stage=3", "stages.merged.optimizer.ranks=2")
    assert refused(recipe_file, tmp_path / "runs", *overrides, "precision.compute=bfloat16") == (
        "stages.merged.optimizer.zero_stage: 3 shards float32 weights, and precision.compute is bfloat16; give 2, or "
        "precision.compute: float32"
    )


@pytest.mark.parametrize("name", ["tokenizer.json", "encoding.json", "model.safetensors", "config.json"])
def test_a_base_that_lacks_a_file_is_refused_before_anything_starts(recipe_file: Path, tmp_path: Path, name: str):
    shutil.copytree(recipe_file.parent / "base", tmp_path / "base")
    (tmp_path / "base" / name).unlink()
    assert name in refused(recipe_file, tmp_path / "runs", f"base={tmp_path / 'base'}")
    assert not (tmp_path / "runs").exists()


def test_another_recipes_folder_is_refused_untouched(recipe_file: Path, recipe: Recipe, tmp_path: Path):
    """The line names where the two differ first."""
    folder = tmp_path / recipe.name
    folder.mkdir()
    kept = resolved_yaml(recipe)
    (folder / "recipe.yaml").write_text(kept)
    line = next(i for i, text in enumerate(kept.splitlines(), 1) if text.startswith("seed:"))
    said = refused(recipe_file, tmp_path, "seed=1")
    assert said.startswith(f"{folder / 'recipe.yaml'}:{line}: this folder holds a run of another recipe")
    assert (folder / "recipe.yaml").read_text() == kept
    assert {f.name for f in folder.iterdir()} <= {"recipe.yaml", ".lock"}


def test_a_run_may_go_on_with_another_deadline(recipe_file: Path, tmp_path: Path):
    """Also one that was begun before the key was there. Other resources are another recipe's."""
    texts = [resolved_yaml(load_recipe(str(recipe_file), [f"resources.{o}"])) for o in ("deadline=5", "threads=2")]
    kept = tmp_path / "recipe.yaml"
    plain = resolved_yaml(load_recipe(str(recipe_file)))
    for old in (plain, plain.replace(", deadline: 1800.0", "")):
        kept.write_text(old)
        _refuse_another(kept, texts[0])
        with pytest.raises(UserError, match="another recipe"):
            _refuse_another(kept, texts[1])


def test_a_folder_in_use_is_refused(recipe_file: Path, recipe: Recipe, tmp_path: Path):
    folder = tmp_path / recipe.name
    folder.mkdir()
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is running this" in refused(recipe_file, tmp_path)
    assert [f.name for f in folder.iterdir()] == [".lock"]
