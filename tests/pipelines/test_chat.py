"""`amalgam chat` through the command line, with V4's tiny preset and another model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from amalgam.model import load
from amalgam.model.config import PRESETS
from amalgam.model.precision import store_weights
from amalgam.model.template import speaker
from amalgam.model.tokenizer import ASSISTANT, BOS, DSML, END_THINK, EOS, SPECIALS, THINK, USER
from amalgam.pipelines import chat
from amalgam.pipelines.cli import app
from amalgam.pipelines.speak import Speaker, parse_precision
from amalgam.rl.engine import Engine
from amalgam.rl.trajectory import Request

from .. import other_models

QUESTION = "State the final answer to the following arithmetic problem: 5 + 2 ="
TINY = speaker(PRESETS / "tiny")[1]
STOP = -1  # in a script: Ctrl-C


def amalgam(*arguments: Any, text: str | bytes | None = None, color: bool = False) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=text, color=color)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return other_models.checkpoint(tmp_path_factory.mktemp("speak") / "other", template=other_models.REASONING)


def spelled(text: str) -> list[int]:
    return TINY.encode(text, add_special_tokens=False).ids


def raw(data: bytes) -> list[int]:
    return [len(SPECIALS) + byte for byte in data]


def script(monkeypatch: pytest.MonkeyPatch, *answers: list[int]) -> list[list[int]]:
    """Let the model write these ids in turn, a token at a time; returns the list of prompts that it will see."""
    prompts: list[list[int]] = []

    def stream(self: Engine, request: Request, **limits: Any) -> Iterator[np.ndarray]:
        assert request.id == len(prompts)
        prompts.append(request.prompt_ids.tolist())
        for i in answers[request.id]:
            if i == STOP:
                raise KeyboardInterrupt
            yield np.array([i], np.int32)

    monkeypatch.setattr(Engine, "stream", stream)
    return prompts


def test_a_session_with_v4():
    lines = f"{QUESTION}\n\n/mode high\n{QUESTION}\n/mode loud\n/what\n/new\n/exit\nnot read\n"
    result = amalgam("chat", "tiny", "--temperature", 0, "--max-new-tokens", 12, text=lines)
    assert result.exit_code == 0, result.output
    assert f"> {QUESTION}\n<answer>7</answer>\n[4 tokens, " in result.stdout
    assert result.stdout.count(" tokens/s") == 2
    assert "error: --mode loud: unknown mode 'loud'; want one of chat, high, max" in result.stdout
    assert result.stdout.count(chat._HELP) == 2
    assert "not read" not in result.stdout


def test_what_the_model_wrote_stays_as_its_ids(monkeypatch: pytest.MonkeyPatch):
    """Also where a turn was stopped or cut off, and where the text would be tokenized otherwise."""
    own = raw(b" following")
    assert own != spelled(" following")
    answers = [[*own, *spelled(EOS)], [*own, STOP], [*own, 0xC3 + len(SPECIALS)], [STOP], spelled(EOS)]
    prompts = script(monkeypatch, *answers)
    result = amalgam("chat", "tiny", "--max-new-tokens", len(own) + 1, text="a\nb\nc\nd\ne\n/new\n")
    assert result.exit_code == 0, result.output
    for prompt, answer, after, question in zip(prompts, answers, prompts[1:], "bcde", strict=False):
        written = [i for i in answer if i != STOP]
        assert after == [*prompt, *written, *spelled(f"{USER}{question}{ASSISTANT}{END_THINK}")]
    assert result.stdout.count(" following\n[") == 2
    assert " following\N{REPLACEMENT CHARACTER}\n[" in result.stdout  # held back until nothing followed
    assert result.stdout.count("stopped]\n[no_eos: the message does not end with") == 2
    assert result.stdout.count("cut off]\n[no_eos: the message does not end with") == 1


def test_reasoning_stands_apart_and_leaves_with_the_next_question(monkeypatch: pytest.MonkeyPatch):
    own = raw(b" following")
    thought = [*spelled(f"so{END_THINK}"), *own, *spelled(EOS)]
    prompts = script(monkeypatch, thought, spelled(f"hm{EOS}"), spelled(f"ok{EOS}"), spelled(EOS))
    result = amalgam("chat", "tiny", "--mode", "high", text="a\nb\n/mode chat\nc\n/new\nd\n", color=True)
    assert result.exit_code == 0, result.output
    assert f"\x1b[2mo\x1b[0m\x1b[2m{END_THINK}\x1b[0m\n foll" in result.stdout
    assert "\x1b[2m[open_reasoning: the reasoning does not end with </think>]\x1b[0m\n" in result.stdout
    past = spelled(f"{BOS}{USER}a{ASSISTANT}")
    assert prompts[0] == [*past, *spelled(THINK)]
    past += [*spelled(END_THINK), *own, *spelled(f"{EOS}{USER}b{ASSISTANT}")]
    assert prompts[1] == [*past, *spelled(THINK)]
    assert prompts[2] == [*past, *spelled(f"{END_THINK}{EOS}{USER}c{ASSISTANT}{END_THINK}")]
    assert prompts[3] == spelled(f"{BOS}{USER}d{ASSISTANT}{END_THINK}")


def test_calls_are_shown_and_not_run(monkeypatch: pytest.MonkeyPatch):
    parameter = f'<{DSML}parameter name="[/b]" string="false">1</{DSML}parameter>'
    call = f'<{DSML}invoke name="f">\n{parameter}\n</{DSML}invoke>\n'
    block = f"\n\n<{DSML}tool_calls>\n{call}</{DSML}tool_calls>"
    broken = block.replace(call, call.replace("name=", "nam=") * 5)
    script(monkeypatch, spelled(f"Look:{block}{EOS}"), spelled(f"{broken}{EOS}"))
    result = amalgam("chat", "tiny", text="a\nb\n")
    assert result.exit_code == 0, result.output
    assert f"Look:{block}\n[" in result.stdout
    assert 'tokens/s]\n[calls, which are not run: f({"[/b]": 1})]\n> b\n' in result.stdout
    assert "tokens/s]\n[bad_call: want <｜DSML｜invoke name=" in result.stdout
    assert result.stdout.splitlines()[-1].endswith("; and 2 more]")


def test_text_cannot_steer_the_terminal_and_is_no_markup(monkeypatch: pytest.MonkeyPatch):
    script(monkeypatch, [*raw(b"\x1b[31m[/b]\r\x07\xc2\x9b2J\ttab"), *spelled(EOS)])
    result = amalgam("chat", "tiny", text="[bold]a[/x]\x1b[2J\n", color=True)
    assert result.exit_code == 0, result.output
    assert "> [bold]a[/x]\\x1b[2J\n" in result.stdout
    assert "\\x1b[31m[/b]\\r\\x07\\x9b2J\ttab\n" in result.stdout


def test_a_refused_line_changes_nothing(other: Path, monkeypatch: pytest.MonkeyPatch):
    prompts = script(monkeypatch, spelled("x"), spelled("y"))
    long = b"z" * 600
    lines = b"one\n<|end|>\nso \xff\n" + long + b"\ntwo\n/new\n" + long + b"\n"
    result = amalgam("chat", other, text=lines)
    assert result.exit_code == 0, result.output
    assert "error: messages[2]: content spells the token <|end|>; take it out\n" in result.stdout
    assert "error: the line is not UTF-8\n" in result.stdout
    for end in ("; /new begins anew\n", "\n"):
        assert f" tokens, and an answer, are more than the model's context, 512{end}" in result.stdout
    tokenizer = speaker(other)[1]
    second = tokenizer.decode(prompts[1], skip_special_tokens=False)
    assert second.count("<|start|>user\n") == 2 and "\ntwo<|end|>" in second


def test_another_models_answers_stay_as_their_ids(other: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = speaker(other)[1]

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    newline = ids("\n")
    assert ids("\n\n") != newline * 2
    own = [*ids("a"), *newline, *newline, *ids("b")]
    full, cut, odd = [*own, *ids("<|eot|>")], own, [*ids("<think>"), STOP]
    prompts = script(monkeypatch, full, cut, odd, ids("<|end|>"))
    result = amalgam("chat", other, "--max-new-tokens", len(own), text="p\nq\nr\ns\n")
    assert result.exit_code == 0, result.output
    between, header = "\n<|start|>user\n", "<|end|>\n<|start|>assistant\n<think>\n\n</think>\n\n"
    last = prompts[3]
    # The template shows earlier turns without the empty reasoning of their headers, and ends them with its own token.
    plain = header.partition("<think>")[0]
    assert tokenizer.decode(prompts[0], skip_special_tokens=False) == f"<|start|>user\np{header}"
    shown = f"{plain}a\n\nb<|end|>{between}"
    assert tokenizer.decode(last, skip_special_tokens=False) == (
        f"<|start|>user\np{shown}q{shown}r{plain}<think><|end|>{between}s{header}"
    )
    assert "error" not in result.stdout


def test_a_model_of_plain_turns_appends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = other_models.checkpoint(tmp_path / "plain")
    tokenizer = speaker(folder)[1]

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    newline = ids("\n")
    own = [*ids("a"), *newline, *newline, *ids("b")]
    prompts = script(monkeypatch, [*own, *ids("<|eot|>")], own, [*ids("<think>"), STOP], ids("<|end|>"))
    result = amalgam("chat", folder, "--max-new-tokens", len(own), text="p\nq\nr\ns\n")
    assert result.exit_code == 0, result.output
    turn = "\n<|start|>user\n{}<|end|>\n<|start|>assistant\n"
    assert prompts[0] == ids(turn.format("p")[1:])
    assert prompts[1] == [*prompts[0], *own, *ids("<|eot|>" + turn.format("q"))]
    assert prompts[2] == [*prompts[1], *own, *ids("<|end|>" + turn.format("r"))]
    assert prompts[3] == [*prompts[2], *ids("<think><|end|>" + turn.format("s"))]


def test_a_model_is_served_as_it_was_trained(other: Path):
    precision = parse_precision("experts=fp4, indexer=fp4,kv=fp8")
    served = Speaker("tiny", precision).engine.model
    trained = load("tiny", precision=precision)
    tokens, cu_seqlens = torch.arange(60) * 7 % 512, torch.tensor([0, 60], dtype=torch.int32)
    with torch.no_grad():
        assert torch.equal(served.logprobs(tokens, cu_seqlens), trained.logprobs(tokens, cu_seqlens))
        assert not torch.equal(served.logprobs(tokens, cu_seqlens), load("tiny").logprobs(tokens, cu_seqlens))
    store_weights(trained)
    theirs = trained.state_dict()
    for name, mine in served.state_dict().items():
        assert torch.equal(mine, theirs[name]), name


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("experts=fp9", "--precision: experts: \"fp9\" is not possible; did you mean 'fp8'?"),
        ("expert=fp4", "--precision: expert: unknown key; did you mean 'experts'?"),
        ("fp4", "--precision fp4: want each key once, such as experts=fp4,indexer=fp4,kv=fp8"),
        ("kv=fp8,kv=full", "--precision kv=fp8,kv=full: want each key once, such as experts=fp4,indexer=fp4,kv=fp8"),
    ],
)
def test_a_bad_precision_is_one_line(precision: str, message: str):
    result = amalgam("chat", "tiny", "--precision", precision)
    assert (result.exit_code, result.stderr) == (2, f"error: {message}\n")


def test_what_stops_before_the_first_question(other: Path):
    refused = "precision: low precision is DeepSeek-V4's alone; leave it out for this model"
    assert amalgam("chat", other, "--precision", "kv=fp8").stderr == f"error: {other}: {refused}\n"
    none = "this preset is a configuration without weights; name a checkpoint's folder"
    assert amalgam("chat", "flash").stderr == f"error: flash: {none}\n"
    assert amalgam("chat", "tiny", "--temperature", "inf").stderr == "error: --temperature inf: want a finite number\n"
