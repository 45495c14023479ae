"""`amalgam chat` and `amalgam generate`: a checkpoint answers, one conversation or a file of prompts."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer

from ..errors import UserError
from ..model import end_ids, load
from ..model.config import resolve
from ..model.template import speaker
from ..rl.engine import Engine
from ..rl.trajectory import Request

ROWS_AT_ONCE = 64  # of a file: they decode together, and are written together
_HELP = "commands: /mode MODE, /new (forget the conversation), /exit"


class Speaker:
    """A checkpoint that answers: on a GPU in bf16 if there is one, else on the CPU in fp32 (our choice)."""

    def __init__(self, checkpoint: str):
        folder = resolve(checkpoint)
        self.encoding, self.tokenizer = speaker(folder)
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        self.engine = Engine(load(folder, dtype, device), end_ids(folder), ROWS_AT_ONCE)

    def prompt(self, messages: list[dict[str, Any]], mode: str) -> np.ndarray:
        return np.array(self.encoding.prompt_ids(self.tokenizer, messages, mode), np.int32)

    def text(self, ids: np.ndarray) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def answer(self, ids: np.ndarray, mode: str) -> dict[str, str]:
        """The message that the model wrote; all of its text as the content where that is no whole message."""
        try:
            return self.encoding.parse(self.text(ids), mode)
        except ValueError:
            return {"role": "assistant", "content": self.text(ids[:-1] if ids[-1] in self.engine.end_ids else ids)}


def chat(checkpoint: str, mode: str, temperature: float, max_new_tokens: int, seed: int) -> None:
    """Reads lines until the end of the input, and prints the answers as they are sampled."""
    speaks = Speaker(checkpoint)
    check_mode(speaks, mode)
    typer.echo(f"{checkpoint}, mode {mode}; {_HELP}")
    messages: list[dict[str, Any]] = []
    turn = 0
    while (line := _read()) is not None:
        if line.startswith("/"):
            command, _, argument = line.partition(" ")
            if command == "/exit":
                return
            if command == "/new":
                messages = []
            elif command == "/mode" and argument:
                mode = _changed(speaks, mode, argument)
            else:
                typer.echo(_HELP)
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            prompt = speaks.prompt(asked, mode)
        except ValueError as error:
            typer.echo(f"error: {error}")
            continue
        request = Request(turn, turn, prompt)
        ids = _show(speaks, request, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
        messages = [*asked, speaks.answer(ids, mode)]
        turn += 1


def check_mode(speaks: Speaker, mode: str) -> None:
    """UserError where the checkpoint's chat format has no such mode."""
    try:
        speaks.prompt([{"role": "user", "content": "?"}], mode)
    except ValueError as error:
        raise UserError(f"--mode {mode}: {error}") from None


def _changed(speaks: Speaker, mode: str, wanted: str) -> str:
    try:
        check_mode(speaks, wanted)
    except UserError as error:
        typer.echo(f"error: {error}")
        return mode
    return wanted


def _read() -> str | None:
    """The next line that is not empty; None at the end of the input."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return None
        if line:
            return line


def _show(speaks: Speaker, request: Request, **limits: Any) -> np.ndarray:
    """Prints the answer while it is sampled, then the rate; returns its ids. Ctrl-C ends the answer."""
    parts: list[np.ndarray] = []
    began, shown, note = time.monotonic(), "", ""
    try:
        for new in speaks.engine.stream(request, **limits):
            parts.append(new)
            ids = np.concatenate(parts)
            ended = ids[-1] in speaks.engine.end_ids
            text = speaks.text(ids[:-1] if ended else ids)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character's last bytes are still to come
                typer.echo(text[len(shown) :], nl=False)
                shown = text
    except KeyboardInterrupt:
        note = ", stopped"
    count = sum(len(part) for part in parts)
    typer.echo(f"\n[{count} tokens, {count / (time.monotonic() - began):.1f} tokens/s{note}]")
    return np.concatenate(parts) if parts else np.array(speaks.engine.end_ids[:1], np.int32)


def generate(
    checkpoint: str, prompts: Path, out: Path, mode: str, temperature: float, max_new_tokens: int, seed: int
) -> None:
    """A row in `out` for each row of `prompts`: the same, with "response", "finish" (stop or length) and "tokens".

    Rows are checked before the first is answered. Rows that `out` has already are kept, and not answered again; what a
    row gets depends on its number, its prompt and the settings alone.
    """
    rows = _rows(prompts)
    speaks = Speaker(checkpoint)
    requests = []
    for number, (line, row) in enumerate(rows):
        messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
        try:
            requests.append(Request(number, number, speaks.prompt(messages, mode)))
        except ValueError as error:
            raise UserError(f"{prompts}:{line}: {error}") from None
    done = _finished(out, [row for _, row in rows])
    limits = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    with out.open("a", encoding="utf-8") as stream:
        for start in range(done, len(rows), ROWS_AT_ONCE):
            began, batch = time.monotonic(), requests[start : start + ROWS_AT_ONCE]
            found = speaks.engine.generate(batch, **limits, seed=seed, version=0)
            for t, (_, row) in zip(found, rows[start:], strict=False):
                ids = t.response_ids[:-1] if t.finish == "stop" else t.response_ids
                result = {"response": speaks.text(ids), "finish": t.finish, "tokens": len(t.response_ids)}
                stream.write(json.dumps(row | result, ensure_ascii=False) + "\n")
            stream.flush()
            rate = sum(len(t.response_ids) for t in found) / (time.monotonic() - began)
            typer.echo(f"{start + len(batch)} of {len(rows)} rows, {rate:.1f} tokens/s", err=True)
    typer.echo(f"{len(rows)} rows in {out}")


def _rows(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line's number, row) of a JSONL file of prompts; empty lines are skipped."""
    found = []
    for line, row in _lines(file):
        if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
            raise UserError(f'{file}:{line}: want an object with either "prompt" or "messages"')
        if not isinstance(row.get("prompt", ""), str):
            raise UserError(f"{file}:{line}: prompt: want a string")
        messages = row.get("messages", [])
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise UserError(f"{file}:{line}: messages: want a list of objects")
        if taken := [key for key in ("response", "finish", "tokens") if key in row]:
            raise UserError(f"{file}:{line}: {taken[0]}: the output's own key; give it another name")
        found.append((line, row))
    if not found:
        raise UserError(f"{file}: no prompts in it")
    return found


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {error.strerror if isinstance(error, OSError) else 'not UTF-8'}") from None
    for number, text in enumerate(lines, 1):
        if text.strip():
            try:
                yield number, json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}:{number}: not JSON: {error}") from None


def _finished(out: Path, rows: list[dict[str, Any]]) -> int:
    """How many rows `out` holds already; half a row, where a run was cut off, is taken away. UserError for others'."""
    if not out.exists():
        return 0
    whole = out.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    os.truncate(out, len(whole))
    done = list(_lines(out))
    for (number, result), row in zip(done, rows, strict=False):
        if not isinstance(result, dict) or any(result.get(key) != value for key, value in row.items()):
            raise UserError(f"{out}:{number}: not the answer to row {number} of the prompts; give another file")
    if len(done) > len(rows):
        raise UserError(f"{out}: more rows than there are prompts; give another file")
    return len(done)
