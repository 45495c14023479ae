"""`amalgam generate` through the command line: rows, what is refused, and going on where a run was cut off."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from amalgam.model import end_ids, load, save
from amalgam.model.config import PRESETS
from amalgam.model.precision import store_weights
from amalgam.model.template import speaker
from amalgam.pipelines import generate
from amalgam.pipelines.cli import app
from amalgam.rl.engine import Engine
from amalgam.rl.trajectory import Request, SamplingParams
from amalgam.settings import Precision

from .. import other_models

LOW = "experts=fp4,indexer=fp4,kv=fp8"


def amalgam(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return other_models.checkpoint(tmp_path_factory.mktemp("speak") / "other")


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def expected(checkpoint: Path, messages: list[dict[str, Any]], number: int, **limits: Any) -> str:
    encoding, tokenizer = speaker(checkpoint)
    prompt = np.array(encoding.prompt_ids(tokenizer, messages), "int32")
    request = Request(number, number, prompt, SamplingParams(**limits))
    (t,) = Engine(load(checkpoint), end_ids(checkpoint)).generate([request])
    return tokenizer.decode(t.response_ids[: -1 if t.finish == "stop" else None].tolist(), skip_special_tokens=False)


def test_rows_are_answered_in_order_whatever_stands_beside_them(other: Path, tmp_path: Path):
    rows = [
        {"prompt": "one", "id": 7},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "two"}]},
        {"prompt": "three"},
    ]
    out = tmp_path / "out.jsonl"
    limits = {"temperature": 0.9, "max_new_tokens": 30, "seed": 4}
    flags = ("--temperature", 0.9, "--max-new-tokens", 30, "--seed", 4)
    result = amalgam("generate", other, "--prompts", write(tmp_path / "in.jsonl", rows), "--out", out, *flags)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"3 rows in {out}\n"
    found = read(out)
    assert [{k: v for k, v in row.items() if k in ("prompt", "messages", "id")} for row in found] == rows
    for number, row in enumerate(found):
        messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        assert row["response"] == expected(other, messages, number, **limits)
        assert row["finish"] in ("stop", "length")
        assert 1 <= row["tokens"] <= 30


def test_an_interrupted_file_goes_on_to_the_same_result(other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generate, "ROWS_AT_ONCE", 2)
    rows = [{"prompt": str(i), "number": float("nan")} for i in range(5)]
    command = ("generate", other, "--prompts", write(tmp_path / "in.jsonl", rows), "--max-new-tokens", 6, "--out")
    assert amalgam(*command, tmp_path / "whole").exit_code == 0
    whole = (tmp_path / "whole").read_bytes()
    for cut in (0, 1, whole.index(b"\n") + 1, whole.index(b"\n") + 9, len(whole)):
        (tmp_path / "cut").write_bytes(whole[:cut])
        shutil.copy(tmp_path / "whole.settings.json", tmp_path / "cut.settings.json")
        result = amalgam(*command, tmp_path / "cut")
        assert result.exit_code == 0, result.output
        kept = whole[:cut].count(b"\n")
        assert result.stdout == f"5 rows in {tmp_path / 'cut'}" + (f", {kept} of them from before\n" if kept else "\n")
        assert (tmp_path / "cut").read_bytes() == whole
    again = Engine.generate

    def interrupted(self: Engine, requests: list[Request], **limits: Any) -> Any:
        if requests[0].id == 2:
            raise KeyboardInterrupt
        return again(self, requests, **limits)

    monkeypatch.setattr(Engine, "generate", interrupted)
    result = amalgam(*command, tmp_path / "stopped")
    assert result.exit_code == 130
    line = f"stopped; the same command goes on with the rows that {tmp_path / 'stopped'} lacks"
    assert result.stderr.splitlines()[-1] == line
    monkeypatch.setattr(Engine, "generate", again)
    assert amalgam(*command, tmp_path / "stopped").exit_code == 0
    assert (tmp_path / "stopped").read_bytes() == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": 3}\n', ":2: prompt: want a string"),
        ('{"prompt": "a"}\n\n{"prompts": "b"}\n', ':3: want an object with either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}\n', ':1: want an object with either "prompt" or "messages"'),
        ("[1]\n", ':1: want an object with either "prompt" or "messages"'),
        ('{"messages": "a"}\n', ":1: messages: want a list of objects"),
        ('{"messages": []}\n', ":1: a prompt must end with a user message"),
        ('{"messages": [{"role": "user", "content": 1}]}\n', ":1: messages[0]: content must be a string"),
        ('{"prompt": "a", "response": "b"}\n', ":1: response: the output's own key; give it another name"),
        ('{"prompt": "a"\n', ":1: not JSON: Expecting ',' delimiter: line 1 column 15 (char 14)"),
        ('{"prompt": "a"}\n{"prompt": "\udcff"}\n', ":2: not UTF-8"),
        ('{"prompt": "a", "note": "\\ud800"}\n', ":1: half of a surrogate pair, which has no UTF-8"),
        (
            '{"prompt": "' + "a" * 500 + '"}',
            ":1: a prompt of 519 tokens and --max-new-tokens 20 are more than the model's context, 512",
        ),
        ("\n", ": no prompts in it"),
        (None, ": No such file or directory"),
    ],
)
def test_a_bad_row_is_refused_before_anything_starts(text: str | None, message: str, other: Path, tmp_path: Path):
    if text is not None:
        (tmp_path / "in").write_text(text, errors="surrogateescape")
    command = ("generate", other, "--prompts", tmp_path / "in", "--out", tmp_path / "out")
    result = amalgam(*command, "--max-new-tokens", 20)
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path / 'in'}{message}\n"
    assert [file.name for file in tmp_path.iterdir()] == (["in"] if text is not None else [])


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of a run with V4's tiny preset: in, out and out.settings.json."""
    folder = tmp_path_factory.mktemp("answered")
    write(folder / "in", [{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}])
    flags = ("--max-new-tokens", 3, "--seed", 5)
    result = amalgam("generate", "tiny", "--prompts", folder / "in", "--out", folder / "out", *flags)
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize(
    ("flags", "change", "message"),
    [
        (["--seed", "6"], None, "out: its rows were made with seed 5, not 6"),
        (["--mode", "high"], None, "out: its rows were made with mode chat, not high"),
        (["--temperature", "0.5"], None, "out: its rows were made with temperature 1.0, not 0.5"),
        (["--max-new-tokens", "4"], None, "out: its rows were made with max_new_tokens 3, not 4"),
        (
            ["--precision", LOW],
            None,
            "out: its rows were made with precision experts=full,linear=full,indexer=full,kv=full, "
            "not experts=fp4,linear=full,indexer=fp4,kv=fp8",
        ),
        ([], ("in", '"a"', '"c"'), "out:1: not the answer to row 1 of the prompts"),
        ([], ("in", '"id": 1}\n{', '"id": 1.0}\n{'), "out:1: not the answer to row 1 of the prompts"),
        ([], ("in", '{"prompt": "b", "id": 1}\n', ""), "out: 2 answers to 1 prompts"),
        ([], ("out", '"prompt": "b"', '"prompt": b'), "out:2: not JSON: Expecting value: line 1 column 12 (char 11)"),
        ([], ("out.settings.json", "{", ""), "out.settings.json: not JSON: Extra data: line 2 column 15 (char 15)"),
        ([], ("out.settings.json", "", "null"), "out.settings.json: not a JSON object"),
    ],
)
def test_what_an_output_cannot_go_on_with(answered: Path, tmp_path: Path, flags: list, change: Any, message: str):
    """One line that names the setting and both values, or the row; and nothing on the disk has changed."""
    folder = shutil.copytree(answered, tmp_path / "r")
    if change:
        name, old, new = change
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace(old, new, 1) if old else new)
    with (folder / "out").open("a") as stream:
        stream.write('{"prompt')  # half a row stays, too
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    same = ["--max-new-tokens", "3", "--seed", "5"]
    result = amalgam("generate", "tiny", "--prompts", folder / "in", "--out", folder / "out", *same, *flags)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {folder}/{message}") and result.stderr.count("\n") == 1
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_the_checkpoints_files_count_and_not_where_they_lie(answered: Path, tmp_path: Path):
    folder = shutil.copytree(answered, tmp_path / "r")
    save(load("tiny"), tmp_path / "model")
    shutil.copytree(PRESETS / "tiny", tmp_path / "moved")
    flags = ("--prompts", folder / "in", "--out", folder / "out", "--max-new-tokens", 3, "--seed", 5)
    assert amalgam("generate", tmp_path / "moved", *flags).exit_code == 0
    result = amalgam("generate", tmp_path / "model", *flags)
    line = f"its rows were made with checkpoint tiny, not {tmp_path / 'model'}; give another --out"
    assert result.stderr == f"error: {folder / 'out'}: {line}\n"
    settings = json.loads((folder / "out.settings.json").read_text())
    (folder / "out.settings.json").write_text(json.dumps(settings | {"checkpoint": str(tmp_path / "model")}))
    again = amalgam("generate", tmp_path / "model", *flags).stderr
    assert again.endswith(f"{tmp_path / 'model'}, not {tmp_path / 'model'} as it is now; give another --out\n")


def test_more_prompts_go_on_and_low_precision_answers_differ(answered: Path, tmp_path: Path):
    folder = shutil.copytree(answered, tmp_path / "r")
    first = (folder / "out").read_text()
    write(folder / "in", [*({"prompt": p, "id": 1} for p in "ab"), {"prompt": "c"}])
    flags = ("--prompts", folder / "in", "--max-new-tokens", 3, "--seed", 5, "--out")
    result = amalgam("generate", "tiny", *flags, folder / "out")
    assert result.stdout == f"3 rows in {folder / 'out'}, 2 of them from before\n"
    assert (folder / "out").read_text().startswith(first) and len(read(folder / "out")) == 3
    assert amalgam("generate", "tiny", *flags, folder / "low", "--precision", LOW).exit_code == 0
    model = load("tiny", precision=Precision(experts="fp4", indexer="fp4", kv="fp8"))
    store_weights(model)
    encoding, tokenizer = speaker(PRESETS / "tiny")
    prompt = np.array(encoding.prompt_ids(tokenizer, [{"role": "user", "content": "c"}]), "int32")
    request = Request(2, 2, prompt, SamplingParams(temperature=1.0, max_new_tokens=3, seed=5))
    (t,) = Engine(model, end_ids(PRESETS / "tiny")).generate([request])
    assert read(folder / "low")[2]["response"] == tokenizer.decode(t.response_ids.tolist(), skip_special_tokens=False)


def test_a_file_of_something_else_is_left_alone(other: Path, tmp_path: Path):
    prompts = write(tmp_path / "in", [{"prompt": "a"}])
    (tmp_path / "notes").write_text("one line without its end")
    for out, message in [
        ("notes", "it exists, without the notes.settings.json that a run to go on with has; give another --out"),
        ("in", "it exists, without the in.settings.json that a run to go on with has; give another --out"),
        (".", "a folder; want a file"),
        ("nowhere/out", f"no folder {tmp_path / 'nowhere'}"),
    ]:
        flags = ("--max-new-tokens", 3, "--prompts", prompts, "--out", tmp_path / out)
        assert amalgam("generate", other, *flags).stderr == f"error: {tmp_path / out}: {message}\n"
    assert (tmp_path / "notes").read_text() == "one line without its end"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in", "notes"]


@pytest.mark.parametrize("command", [("chat",), ("generate", "--prompts", "in", "--out", "out")])
def test_a_mode_or_checkpoint_that_is_not_there(command: tuple, other: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("in"), [{"prompt": "a"}])
    result = amalgam(command[0], other, *command[1:], "--mode", "high")
    assert result.exit_code == 2
    assert result.stderr.endswith("the checkpoint's chat template has no mode 'high'; it has chat\n")
    assert amalgam(command[0], "nowhere", *command[1:]).stderr.startswith("error: nowhere: neither a checkpoint's")
    assert not Path("out").exists()
