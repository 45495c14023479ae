"""Recipes: what they expand to, and what is written and read back."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amalgam.pipelines.recipe import RECIPES, Distill, Grpo, Sft, load_recipe, resolved_yaml
from amalgam.pipelines.yaml_lines import read, write
from amalgam.settings import FULL, Precision

from .small_recipe import SMALL, enter, load, stage, values


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch)


def test_a_name_with_domain_makes_a_stage_per_domain():
    recipe = load(SMALL)
    assert list(recipe.stages) == [
        "sft-arithmetic",
        "sft-strings",
        "grpo-arithmetic",
        "grpo-strings",
        "average",
        "merged",
    ]
    grpo = stage(recipe, "grpo-strings", Grpo)
    assert (grpo.from_, grpo.domains, grpo.steps, grpo.optimizer.lr) == (
        "sft-strings",
        ("strings",),
        20,
        1e-4,
    )
    assert recipe.inputs("average") == ["grpo-arithmetic", "grpo-strings"]
    merged = stage(recipe, "merged", Distill)
    assert merged.teachers == {"arithmetic": "grpo-arithmetic", "strings": "grpo-strings"}
    assert merged.domains == ("arithmetic", "strings")
    assert recipe.inputs("merged") == ["base", "grpo-arithmetic", "grpo-strings"]


def test_the_graph_is_in_the_recipes_order_but_inputs_come_first():
    text = SMALL.replace("stages:\n", 'stages:\n  late: {kind: average, of: [base, "sft-{domain}"]}\n')
    recipe = load(text)
    assert recipe.inputs("late") == ["base", "sft-arithmetic", "sft-strings"]
    assert list(recipe.graph()) == [
        "sft-arithmetic",
        "sft-strings",
        "late",
        "grpo-arithmetic",
        "grpo-strings",
        "average",
        "merged",
    ]


def test_teachers_follow_the_stages_own_domains():
    recipe = load(SMALL, "stages.merged.domains=[strings]")
    assert recipe.inputs("merged") == ["base", "grpo-strings"]
    one_teacher = load(SMALL, "stages.merged.teachers=average")
    assert stage(one_teacher, "merged", Distill).teachers == {"arithmetic": "average", "strings": "average"}


def test_yaml_words_mean_what_they_look_like():
    recipe = load(SMALL, "tracking.project=2026-01-01", "stages.sft-strings.optimizer.lr=1e-3", "seed=1_000")
    assert recipe.tracking.wandb == "off"
    assert recipe.tracking.project == "2026-01-01"
    assert recipe.seed == 1000
    assert stage(recipe, "sft-strings", Sft).optimizer.lr == 1e-3


@pytest.mark.parametrize("name", ["quickstart", "tiny-base"])
def test_shipped_recipes_load_and_come_back_from_their_resolved_form(name: str):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert load(resolved_yaml(recipe)) == recipe


def test_the_resolved_form_holds_overrides_and_comes_back():
    recipe = load(SMALL, "stages.merged.optimizer.eps=1e-12", 'tracking.project="1e-3"', "tracking.wandb=off")
    again = load(resolved_yaml(recipe))
    assert again == recipe
    assert list(again.graph()) == list(recipe.graph())


def test_an_optimizers_name_may_stand_alone():
    assert stage(load(SMALL), "merged", Distill).optimizer.name == "adamw"
    muon = load(SMALL, "stages.merged.optimizer=muon")
    assert muon == load(SMALL, "stages.merged.optimizer.name=muon")
    assert stage(muon, "merged", Distill).optimizer.name == "muon"
    assert load(resolved_yaml(muon)) == muon


def test_precision_is_full_unless_the_recipe_says_otherwise():
    assert load(SMALL).precision == FULL
    assert [FULL.dtype(device) for device in ("cpu", "cuda", "cuda:1")] == ["float32", "bfloat16", "bfloat16"]
    narrow = load(SMALL, "precision.compute=bfloat16").precision
    assert narrow.dtype("cpu") == "bfloat16" and not narrow.rounds
    v4 = load(SMALL, "precision={experts: fp4, indexer: fp4, kv: fp8}")
    assert v4.precision == Precision(experts="fp4", indexer="fp4", kv="fp8") and v4.precision.rounds
    assert load(resolved_yaml(v4)) == v4


def test_quickstart_is_short_and_makes_the_promised_models():
    file = RECIPES / "quickstart.yaml"
    assert len(file.read_text().splitlines()) <= 45
    recipe = load_recipe("quickstart")
    evaluated = {name for name, settings in recipe.stages.items() if settings.evaluate}
    assert evaluated == {
        "sft-arithmetic",
        "grpo-arithmetic",
        "sft-strings",
        "grpo-strings",
        "average",
        "merged",
    }
    assert recipe.base == "tiny"


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(), values, max_size=4))
def test_what_is_written_is_read_back(data: dict):
    assert read(write(data).encode(), "x").data == data


@pytest.mark.parametrize(
    "text", ["off", "1e-3", "1_0", ".5", "null", "~", "", "true", "2026-01-01", "<<", "0x1", "1:30"]
)
def test_text_that_looks_like_something_else_stays_text(text: str):
    assert read(write({"key": text}).encode(), "x").data == {"key": text}
