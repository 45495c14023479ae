"""`amalgam rewards try`, the example of docs/rewards.md, and the check of a recipe's rewards before it runs."""

import json
import re
import sys
from pathlib import Path

import pytest

from amalgam.errors import UserError
from amalgam.pipelines import reward_check
from amalgam.pipelines.cli import app
from amalgam.pipelines.reward_check import check_rewards
from amalgam.pipelines.run import _domain
from amalgam.pipelines.try_rewards import try_rewards
from amalgam.rewards.registry import REWARDS

from .small_recipe import SMALL, enter, load

DOC = Path(__file__).parents[2] / "docs" / "rewards.md"
ROWS = [
    {"question": "1 + 1?", "gold": "2", "response": "\\boxed{2}"},
    {"question": "1 + 1?", "gold": "2", "response": "so \\boxed{3}", "mode": "chat", "tokens": 4},
    {"question": "1 + 1?", "gold": "2", "response": "hm \\boxed{3}</think>\\boxed{2}", "mode": "high"},
]


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_score_is_explained(tmp_path, capsys):
    from typer.testing import CliRunner

    file = jsonl(tmp_path / "a.jsonl", ROWS)
    done = CliRunner().invoke(app, ["rewards", "try", "math", str(file), "--field", "answer=gold"])
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert lines[:3] == ["row 1: 1.000  correct", "row 2: 0.000  wrong  '3' is not '2'", "row 3: 1.000  correct"]
    assert re.fullmatch(r"3 graded: mean 0\.667, 2 correct; failed: none; \d+ a second", lines[3])


def test_parameters_are_set(tmp_path, capsys):
    file = jsonl(tmp_path / "a.jsonl", ROWS[1:2])
    (score,) = try_rewards("length", file, ["free=2", "limit=6"], [])
    assert (score.value, score.correct) == (0.5, False)
    assert "row 1: 0.500  wrong  4 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "rows", "settings", "fields", "message"),
    [
        ("maths", ROWS, [], [], "rewards.maths: no reward 'maths'; did you mean math?"),
        ("math", ROWS, ["boxed=1"], [], "rewards.math.boxed: no such parameter; did you mean boxed_only?"),
        ("math", ROWS, [], [], "a.jsonl: row 1: no field 'answer', which math grades by; name it with --field"),
        ("math", ROWS, [], ["answer=none"], "a.jsonl: row 1: no field 'none' (try.fields.answer)"),
        ("math", ROWS, ["x"], [], "--set x: has no value"),
        ("math", ROWS, ["boxed_only=[", ], [], "--set boxed_only: '[' is no YAML"),
        ("format", [{"question": "x"}], [], [], "a.jsonl: row 1: no text in the field 'response'; it has question"),
        ("format", [{"question": "x", "response": "y", "mode": "max"}], [], [], "a.jsonl: row 1: mode is 'max'"),
    ],
)  # fmt: skip
def test_what_cannot_be_tried(tmp_path, name, rows, settings, fields, message):
    with pytest.raises(UserError) as error:
        try_rewards(name, jsonl(tmp_path / "a.jsonl", rows), settings, fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_docs_template_works_as_shown(tmp_path, monkeypatch, capsys):
    text = DOC.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(blocks[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    test: dict = {}
    exec(compile(blocks[1], "test_my_rewards.py", "exec"), test)
    for name, function in list(test.items()):
        if name.startswith("test_"):
            function()
    file = jsonl(tmp_path / "a.jsonl", [{"question": "x", "answer": "cat", "response": "cat cat"}])
    (score,) = try_rewards("my_rewards:mentions", file, ["at_most=1"], [])
    assert (score.value, score.correct) == (0.0, False)
    sys.modules.pop("my_rewards")


def test_the_docs_list_every_reward():
    listed = re.findall(r"^\| `([\w-]+)` \|", DOC.read_text(), re.MULTILINE)
    assert listed == list(REWARDS)


def checked(*overrides: str) -> None:
    recipe = load(SMALL, *overrides)
    check_rewards(recipe, {name: _domain(recipe, name) for name in recipe.domains})


def test_a_users_reward_that_gives_no_score_is_named_before_the_run(monkeypatch, tmp_path):
    enter(tmp_path, monkeypatch)
    folder = str(Path(__file__).parents[1] / "rewards")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", folder, prepend=":")
    checked('domains.strings.rewards={own: {reward: "own_rewards:contains"}}')
    with pytest.raises(UserError, match=r"domains\.strings\.rewards: .*:nothing returned NoneType and not a Score"):
        checked('domains.strings.rewards={own: {reward: "own_rewards:nothing"}}')


def test_a_judge_in_a_recipe_and_a_missing_sandbox_are_refused_before_the_run(monkeypatch, tmp_path):
    enter(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"domains\.strings\.rewards\.judge: a recipe cannot hand in a judge"):
        checked("domains.strings.rewards={judge: 1}")

    def refuse(ready):
        raise UserError("sandbox: cannot run here")

    monkeypatch.setattr(reward_check, "Sandboxes", refuse)
    with pytest.raises(UserError, match="sandbox: cannot run here"):
        checked("domains.strings.rewards={code: 1}")
