"""Recipes on a base that is not V4: a whole run, and what is refused before it starts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from amalgam.errors import UserError
from amalgam.model import load, save
from amalgam.model.template import speaker
from amalgam.pipelines.recipe import Recipe, load_recipe
from amalgam.pipelines.run import run_recipe
from amalgam.pipelines.sft import loss, weighted
from amalgam.rewards.domains import Domain
from amalgam.rl.packing import Row, collate

from .. import other_models
from .tiny_run import TASKS, metrics

RECIPE = f"""\
name: other
base: BASE
domains:
  numbers: {{tasks: {json.dumps(TASKS["numbers"])}, demonstrations: 16}}
stages:
  sft: {{kind: sft, from: base, evaluate: false, batch_size: 8, max_epochs: 1, validation: 8, optimizer: {{lr: 0.001}}}}
  grpo:
    kind: grpo
    from: sft
    steps: 2
    prompts: 4
    group_size: 4
    sampling: {{max_new_tokens: 24}}
    optimizer: {{lr: 0.001, micro_batch_tokens: 900}}
  average: {{kind: average, of: [sft, grpo], evaluate: false}}
  merged:
    kind: distill
    from: base
    teachers: {{numbers: grpo}}
    steps: 2
    prompts: 4
    sampling: {{max_new_tokens: 24}}
    optimizer: {{lr: 0.001}}
evaluate: {{problems: 4, max_new_tokens: 24}}
tracking: {{wandb: "off"}}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps on the demonstrations: its samples of one prompt differ in reward."""
    folder = other_models.checkpoint(tmp_path_factory.mktemp("other") / "start", "qwen3")
    model = load(folder)
    encoding, tokenizer = speaker(folder)
    domain = Domain("numbers", "chat", TASKS["numbers"], 32, 8, 0)
    made: list[Row] = []
    for problem in domain.problems("demonstrations", 0, 32):
        answer = {"role": "assistant", "content": domain.demonstration(problem)}
        ids, trained = encoding.ids(tokenizer, [*domain.messages(problem), answer], "chat")
        made.append({"tokens": np.array(ids, np.int32), "trained": np.array(trained, np.float32)})
    batch = collate(weighted(made), "cpu")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        loss(model, batch, {})[0].backward()
        optimizer.step()
    save(model, folder.parent / "base")
    return folder.parent / "base"


def recipe(base: Path, folder: Path, text: str = RECIPE, *overrides: str) -> Recipe:
    file = folder / "r.yaml"
    file.write_text(text.replace("BASE", str(base)))
    return load_recipe(str(file), overrides)


def test_every_stage_runs(ray_session: None, base: Path, tmp_path: Path):
    folder = run_recipe(recipe(base, tmp_path), tmp_path / "runs").parent
    rows = json.loads((folder / "results.json").read_text())
    assert [row["model"] for row in rows] == ["base", "grpo", "merged"]
    steps = metrics(folder)
    assert {name: len(found) for name, found in steps.items()} == {"sft": 2, "grpo": 2, "merged": 2}
    learned = [row for row in steps["grpo"] if "mismatch" in row]
    assert learned, "the test needs a group whose rewards differ"
    assert all(abs(row["mismatch"]) < 1e-6 for row in learned)
    names = {name: folder / "stages" / name / "checkpoint" for name in ("sft", "grpo", "average", "merged")}
    models: dict[str, Any] = {name: AutoModelForCausalLM.from_pretrained(path) for name, path in names.items()}
    average = models["average"].state_dict()
    for name, tensor in models["sft"].state_dict().items():
        expected = (tensor + models["grpo"].state_dict()[name]) / 2
        torch.testing.assert_close(average[name], expected, rtol=1e-6, atol=1e-7)


PRETRAINED = """\
  other: {kind: pretrain, init: tiny, steps: 1}
  merged:
    kind: distill
    from: base
    teachers: {numbers: other}
"""
END = RECIPE[RECIPE.index("evaluate: {problems") :]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            RECIPE.partition("  sft:")[0] + PRETRAINED + END,
            (),
            "stages.merged.teachers.numbers: other has the vocabulary of .*tiny, base that of .*base; distillation",
        ),
        (
            RECIPE.partition("  sft:")[0] + "  grpo: {kind: grpo, from: base, steps: 1}\n" + END,
            ("domains.numbers.mode=high",),
            "domains.numbers: .*base: the checkpoint's chat template has no mode 'high'; it has chat",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(
    base: Path, tmp_path: Path, text: str, overrides: tuple[str, ...], message: str
):
    with pytest.raises(UserError, match=message):
        run_recipe(recipe(base, tmp_path, text, *overrides), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stages.sft.mtp={weight: 0.1}", "stages.sft.mtp.weight: the stage's model has no MTP block"),
        ("stages.grpo.sampling={draft: mtp}", "stages.grpo.sampling.draft: .*no MTP block"),
    ],
)
def test_mtp_is_refused_where_the_recipe_is_read(base: Path, tmp_path: Path, setting: str, message: str):
    with pytest.raises(UserError, match=message):
        recipe(base, tmp_path, RECIPE, setting)


@pytest.mark.parametrize("stage", ["sft", "grpo", "merged"])
def test_training_an_indexer_is_refused(base: Path, tmp_path: Path, stage: str):
    with pytest.raises(UserError, match=f"^stages.{stage}.indexer.weight: .*base has no indexer, which only CSA"):
        run_recipe(recipe(base, tmp_path, RECIPE, f"stages.{stage}.indexer.weight=1"), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("stage", ["sft", "grpo", "merged"])
def test_muon_is_refused(base: Path, tmp_path: Path, stage: str):
    with pytest.raises(UserError, match=f"^stages.{stage}.optimizer.name: muon is for DeepSeek-V4, and .*base is ano"):
        run_recipe(recipe(base, tmp_path, RECIPE, f"stages.{stage}.optimizer=muon"), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_low_precision_is_refused(base: Path, tmp_path: Path):
    with pytest.raises(UserError, match="base: precision: low precision is DeepSeek-V4's alone"):
        run_recipe(recipe(base, tmp_path, RECIPE, "precision={experts: fp4}"), tmp_path / "runs")


def test_a_base_in_shards(base: Path, tmp_path: Path):
    """An index and its shards are a whole base; without a shard it is refused where the recipe is read."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "shards" / name).write_bytes((base / name).read_bytes())
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 2
    recipe(tmp_path / "shards", tmp_path)
    assert load(tmp_path / "shards").state_dict().keys() == load(base).state_dict().keys()
    shards[1].unlink()
    with pytest.raises(UserError, match=f"model.safetensors.index.json names '{shards[1].name}', which is no file"):
        recipe(tmp_path / "shards", tmp_path)
    (tmp_path / "shards" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="model.safetensors.index.json is no index of shards"):
        recipe(tmp_path / "shards", tmp_path)
