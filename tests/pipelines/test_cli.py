"""The command line: exit codes, what goes to which stream, and that it starts light."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from amalgam import __version__
from amalgam.errors import UserError
from amalgam.pipelines import base_check
from amalgam.pipelines.cli import app
from amalgam.pipelines.recipe import Recipe, load_recipe

HEAVY = {"torch", "ray", "deepspeed", "transformers", "datasets", "wandb", "reasoning_gym", "numpy"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = tmp_path / "presets" / "tiny"
    preset.mkdir(parents=True)
    (preset / "config.json").write_text("{}")
    header = b'{"w": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'
    (preset / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    monkeypatch.setattr(base_check, "PRESETS", tmp_path / "presets")
    monkeypatch.chdir(tmp_path)


def amalgam(*arguments: str):
    return CliRunner().invoke(app, arguments)


def answer_with(monkeypatch: pytest.MonkeyPatch, module: str, function: str, answer) -> None:
    """Let a command's lazy import find `answer` as `function`."""
    stand_in = ModuleType(module)
    setattr(stand_in, function, answer)
    monkeypatch.setitem(sys.modules, f"amalgam.pipelines.{module}", stand_in)


def test_print_shows_the_resolved_recipe_and_starts_nothing():
    result = amalgam("run", "quickstart", "--set", "seed=3", "--print")
    assert result.exit_code == 0, result.output
    Path("again.yaml").write_text(result.stdout)
    assert load_recipe("again.yaml") == load_recipe("quickstart", ["seed=3"])
    assert not Path("runs").exists()


def test_bad_input_is_a_line_on_stderr_and_exit_code_2():
    result = amalgam("run", "quickstart", "--set", "seed=x", "--set", "sede=1")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        'error: --set seed: "x" is not a whole number; give a whole number at least 0, e.g. 0',
        "error: --set sede: unknown key; did you mean 'seed'?",
    ]
    assert not Path("runs").exists()


def test_run_gets_the_recipe_and_the_folder_and_prints_the_report(monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[Recipe, Path]] = []

    def run_recipe(recipe: Recipe, runs: Path) -> Path:
        calls.append((recipe, runs))
        return runs / recipe.name / "report.html"

    answer_with(monkeypatch, "run", "run_recipe", run_recipe)
    result = amalgam("run", "quickstart", "--set", "name=mine", "--runs", "elsewhere")
    assert result.exit_code == 0, result.output
    assert result.stdout == "report: elsewhere/mine/report.html\n"
    assert calls == [(load_recipe("quickstart", ["name=mine"]), Path("elsewhere"))]


@pytest.mark.parametrize(("error", "code"), [(UserError("a: b; c"), 2), (KeyboardInterrupt(), 130)])
def test_exit_codes_of_a_run(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int):
    def run_recipe(recipe: Recipe, runs: Path) -> Path:
        raise error

    answer_with(monkeypatch, "run", "run_recipe", run_recipe)
    result = amalgam("run", "quickstart")
    assert result.exit_code == code
    assert result.stderr == ("error: a: b; c\n" if code == 2 else "")


def test_a_bug_shows_itself(monkeypatch: pytest.MonkeyPatch):
    def run_recipe(recipe: Recipe, runs: Path) -> Path:
        raise ZeroDivisionError("a bug")

    answer_with(monkeypatch, "run", "run_recipe", run_recipe)
    assert isinstance(amalgam("run", "quickstart").exception, ZeroDivisionError)


def test_submit_passes_its_arguments_on_and_ends_with_the_runs_exit_code(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def submit(*arguments) -> int:
        calls.append(arguments)
        return 7

    answer_with(monkeypatch, "submit", "submit", submit)
    result = amalgam("submit", "quickstart", "--address", "http://h:1", "--set", "seed=1", "--set", "name=a")
    assert result.exit_code == 7
    assert calls == [("quickstart", ["seed=1", "name=a"], "http://h:1", Path("runs"))]


def test_convert_converts_and_says_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    arguments = ["convert", "tiny", str(tmp_path / "out"), "--format", "transformers", "--dtype", "bf16"]
    done = amalgam(*arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / 'out'}: 1 shards, 0.01 GB, verified\n"
    assert "transformers bf16" in done.stderr and "100%" not in done.stdout
    again = amalgam(*arguments)
    assert "1 shards, 1 of them from before" in again.stdout
    refused = amalgam(*arguments[:-1], "fp8")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.endswith("dtype was bf16, not fp8; name another folder\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["submit", "quickstart"],
        ["chat"],
        ["generate", "tiny"],
        ["rnu"],
        ["run", "quickstart", "--prin"],
        ["convert", "a", "b", "--format", "official"],
        ["convert", "a", "b", "--format", "official", "--dtype", "int4"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]):
    assert amalgam(*arguments).exit_code == 2


def test_help_names_every_command_and_option():
    overview, run = amalgam("--help").stdout, amalgam("run", "--help").stdout
    words = ("run", "submit", "convert", "chat", "generate", "--version")
    assert all(word in overview for word in words)
    assert all(word in run for word in ("RECIPE", "--set", "--runs", "--print"))
    assert "--address" in amalgam("submit", "--help").stdout
    chat, generate = amalgam("chat", "--help").stdout, amalgam("generate", "--help").stdout
    assert all(
        word in text for text in (chat, generate) for word in ("CHECKPOINT", "--mode", "--temperature", "--seed")
    )
    assert all(word in generate for word in ("--prompts", "--out"))
    assert amalgam("--version").stdout == f"amalgam {__version__}\n"


def test_the_front_door_and_recipes_load_nothing_heavy():
    code = (
        "import sys; from amalgam.pipelines import cli; assert 'pydantic' not in sys.modules; "
        "from amalgam.pipelines import recipe; print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "amalgam.rl.settings" in loaded.stdout
    assert not HEAVY & set(loaded.stdout.split())


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "amalgam.pipelines.cli", "run", "quikstart"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr == "error: quikstart: no such recipe or file; did you mean 'quickstart'?\n"
