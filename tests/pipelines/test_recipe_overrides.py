"""Overrides of a recipe: what they reach, and the one line that each mistake gets."""

from pathlib import Path

import pytest

from amalgam.pipelines.recipe import Grpo

from .small_recipe import SMALL, enter, errors, load


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch)


def test_an_override_reaches_one_stage_or_all_that_a_pattern_made():
    def steps(*overrides: str) -> list[int]:
        return [s.steps for s in load(SMALL, *overrides).stages.values() if isinstance(s, Grpo)]

    assert steps("stages.grpo-{domain}.steps=5") == [5, 5]
    assert steps("stages.grpo-strings.steps=5") == [20, 5]
    assert steps("stages.grpo-strings.steps=5", "stages.grpo-{domain}.steps=6") == [6, 6]
    assert steps("stages.grpo-{domain}.steps=6", "stages.grpo-strings.steps=5") == [6, 5]


def test_an_override_may_make_a_section_and_use_a_pattern():
    recipe = load(SMALL, "evaluate.problems=7", "stages.merged.teachers=sft-{domain}", "stages.average.of=[base]")
    assert recipe.evaluate.problems == 7
    assert recipe.inputs("merged") == ["base", "sft-arithmetic", "sft-strings"]
    assert recipe.inputs("average") == ["base"]


def test_an_override_of_the_domains_comes_before_stages_are_made():
    recipe = load(SMALL, "domains={logic: {tasks: {syllogism: {}}}}")
    assert list(recipe.stages) == ["sft-logic", "grpo-logic", "average", "merged"]


def test_the_expansions_of_one_stage_share_nothing():
    stages = load(SMALL, "stages.grpo-strings.optimizer.lr=1e-5").stages
    rates = [s.optimizer.lr for s in stages.values() if isinstance(s, Grpo)]
    assert rates == [1e-4, 1e-5]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set seed: write KEY=VALUE, e.g. --set stages.sft.batch_size=16"),
        ("stages..steps=1", "--set stages..steps=1: write KEY=VALUE, e.g. --set stages.sft.batch_size=16"),
        ("sede=1", "--set sede: unknown key; did you mean 'seed'?"),
        ("evaluat.problems=1", "--set evaluat: unknown key; did you mean 'evaluate'?"),
        ("seed=abc", '--set seed: "abc" is not a whole number; give a whole number at least 0, e.g. 0'),
        ("name=12", '--set name: 12 is not text; put it in quotes ("12")'),
        (
            "seed.more=1",
            "--set seed: a mapping is not a whole number; give a whole number at least 0, e.g. 0",
        ),
        ("base.more=1", '--set base.more: base is "tiny", which has no keys'),
        ("stages.merge.steps=5", "--set stages.merge.steps: no stage 'merge'; did you mean 'merged'?"),
        (
            "domains.string.mode=high",
            "--set domains.string.mode: no domain 'string'; did you mean 'strings'?",
        ),
        (
            "stages.grpo-strings.lr=1",
            "--set stages.grpo-strings.lr: unknown key; did you mean 'optimizer.lr'?",
        ),
        (
            "stages.grpo-{domain}.optimizer={lrr: 1}",
            "--set stages.grpo-{domain}.optimizer.lrr: unknown key; did you mean 'lr'?",
        ),
        (
            "stages.grpo-{domain}.domains=[strings]",
            "--set stages.grpo-{domain}.domains: the stage's name gives its domain; leave this key out",
        ),
        (
            "seed=[1",
            "--set seed: while parsing a flow sequence begun on line 1, expected ',' or ']', but got "
            "'<stream end>'; check indentation, colons, quotes and brackets here",
        ),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str):
    assert errors(SMALL, override) == [message]
