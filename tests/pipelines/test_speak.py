"""`amalgam chat` and `amalgam generate` through the command line, with V4's tiny preset and another model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from amalgam.model import end_ids, load
from amalgam.model.template import speaker
from amalgam.pipelines import speak
from amalgam.pipelines.cli import app
from amalgam.rl.engine import Engine
from amalgam.rl.trajectory import Request

from .. import other_models

QUESTION = "State the final answer to the following arithmetic problem: 5 + 2 ="


def amalgam(*arguments: Any, text: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)


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
    request = Request(number, number, np.array(encoding.prompt_ids(tokenizer, messages), "int32"))
    (t,) = Engine(load(checkpoint), end_ids(checkpoint)).generate([request], **limits, version=0)
    return tokenizer.decode(t.response_ids[: -1 if t.finish == "stop" else None].tolist(), skip_special_tokens=False)


def test_a_session_with_v4():
    lines = f"{QUESTION}\n\n/mode high\n{QUESTION}\n/mode loud\n/what\n/new\n/exit\nnot read\n"
    result = amalgam("chat", "tiny", "--temperature", 0, "--max-new-tokens", 12, text=lines)
    assert result.exit_code == 0, result.output
    assert "<answer>7</answer>\n[4 tokens, " in result.stdout
    assert result.stdout.count(" tokens/s]") == 2
    assert "error: --mode loud: unknown mode 'loud'; want one of chat, high, max" in result.stdout
    assert result.stdout.count(speak._HELP) == 2


def test_a_conversation_goes_on_and_begins_anew(other: Path, monkeypatch: pytest.MonkeyPatch):
    """The prompt of the second turn holds the first; after /new it does not. A message that is refused leaves none."""
    asked: list[list[dict[str, Any]]] = []
    monkeypatch.setattr(speak.Speaker, "prompt", spied(asked))
    result = amalgam("chat", other, "--max-new-tokens", 5, text="one\n<|end|>\ntwo\n/new\nthree\n")
    assert result.exit_code == 0, result.output
    assert "error: messages[2]: content spells the token <|end|>; take it out" in result.stdout
    contents = [[m["content"] for m in messages] for messages in asked[1:]]  # the first one only tries the mode
    assert contents[0] == ["one"]
    assert contents[2] == ["one", contents[1][1], "two"]
    assert contents[3] == ["three"]


def spied(asked: list) -> Any:
    prompt = speak.Speaker.prompt

    def spy(self: speak.Speaker, messages: list[dict[str, Any]], mode: str) -> Any:
        asked.append(messages)
        return prompt(self, messages, mode)

    return spy


def test_ctrl_c_ends_an_answer_not_the_session(other: Path, monkeypatch: pytest.MonkeyPatch):
    stream = Engine.stream

    def interrupted(self: Engine, request: Request, **limits: Any) -> Any:
        for ids in stream(self, request, **limits):
            yield ids
            if request.id == 0:
                raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "stream", interrupted)
    result = amalgam("chat", other, "--max-new-tokens", 5, "--temperature", 0, text="one\ntwo\n")
    assert result.exit_code == 0, result.output
    assert "[1 tokens, " in result.stdout
    assert result.stdout.count("tokens/s, stopped]") == 1
    assert result.stdout.count("tokens/s]") == 1


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
    monkeypatch.setattr(speak, "ROWS_AT_ONCE", 2)
    prompts = write(tmp_path / "in.jsonl", [{"prompt": str(i)} for i in range(5)])
    command = ("generate", other, "--prompts", prompts, "--max-new-tokens", 6, "--out")
    assert amalgam(*command, tmp_path / "whole").exit_code == 0
    whole = (tmp_path / "whole").read_bytes()
    for cut in (0, 1, whole.index(b"\n") + 1, whole.index(b"\n") + 9, len(whole)):
        (tmp_path / "cut").write_bytes(whole[:cut])
        result = amalgam(*command, tmp_path / "cut")
        assert result.exit_code == 0, result.output
        assert (tmp_path / "cut").read_bytes() == whole


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
        ("\n", ": no prompts in it"),
        (None, ": No such file or directory"),
    ],
)
def test_a_bad_row_is_refused_before_anything_starts(text: str | None, message: str, other: Path, tmp_path: Path):
    if text is not None:
        (tmp_path / "in").write_text(text)
    result = amalgam("generate", other, "--prompts", tmp_path / "in", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path / 'in'}{message}\n"
    assert not (tmp_path / "out").exists()


def test_another_files_answers_are_not_gone_on_with(other: Path, tmp_path: Path):
    out = write(tmp_path / "out", [{"prompt": "b", "response": "x"}])
    result = amalgam("generate", other, "--prompts", write(tmp_path / "in", [{"prompt": "a"}]), "--out", out)
    assert result.stderr == f"error: {out}:1: not the answer to row 1 of the prompts; give another file\n"


@pytest.mark.parametrize("command", [("chat",), ("generate", "--prompts", "in", "--out", "out")])
def test_a_mode_or_checkpoint_that_is_not_there(command: tuple, other: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("in"), [{"prompt": "a"}])
    result = amalgam(command[0], other, *command[1:], "--mode", "high")
    assert result.exit_code == 2
    assert result.stderr.endswith("the checkpoint's chat template has no mode 'high'; it has chat\n")
    assert amalgam(command[0], "nowhere", *command[1:]).stderr.startswith("error: nowhere: neither a checkpoint's")
