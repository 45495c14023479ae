"""`amalgam generate`: a checkpoint answers a file of prompts; what is answered already is kept."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from ..errors import UserError
from ..model.auto import read_object
from ..model.shards import write_text
from ..rl.trajectory import Request, SamplingParams, Trajectory
from .speak import ROWS_AT_ONCE, Speaker, check_mode, check_temperature, parse_precision

_OWN = ("response", "finish", "tokens")  # the keys of an answer
_EDGE = 2**20  # bytes of a file's beginning and of its end that are compared


def generate(
    checkpoint: str,
    prompts: Path,
    out: Path,
    mode: str,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    precision: str = "",
) -> None:
    """A row in `out` for each row of `prompts`: the same, with "response", "finish" (stop or length) and "tokens".

    Rows are checked before the first is answered. Rows that `out` has already are kept, and not answered again, if they
    were made with the settings in `out`.settings.json, which have to be these. What a row gets depends on its number,
    its prompt and the settings alone. UserError for what does not fit; nothing is changed then.
    """
    check_temperature(temperature)
    rows = _rows(prompts)
    speaks = Speaker(checkpoint, parse_precision(precision))
    check_mode(speaks, mode)
    params = SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    requests = [_request(speaks, number, *row, prompts, mode, params) for number, row in enumerate(rows)]
    settings = {
        "checkpoint": checkpoint,
        "files": _digest(speaks.folder),
        "precision": speaks.precision.model_dump(exclude={"compute"}),
        "dtype": speaks.precision.dtype(speaks.device),
        "mode": mode,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    done = _resumed(out, [row for _, row in rows], settings)
    try:
        for start in range(done, len(rows), ROWS_AT_ONCE):
            began, batch = time.monotonic(), requests[start : start + ROWS_AT_ONCE]
            found = speaks.engine.generate(batch)
            with out.open("a", encoding="utf-8") as stream:
                stream.writelines(_answer(speaks, t, row) for t, (_, row) in zip(found, rows[start:], strict=False))
            rate = sum(len(t.response_ids) for t in found) / (time.monotonic() - began)
            typer.echo(f"{start + len(batch)} of {len(rows)} rows, {rate:.1f} tokens/s", err=True)
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on with the rows that {out} lacks", err=True)
        raise
    typer.echo(f"{len(rows)} rows in {out}" + (f", {done} of them from before" if done else ""))


def _answer(speaks: Speaker, t: Trajectory, row: dict[str, Any]) -> str:
    answer = {"response": speaks.text(t.response_ids), "finish": t.finish, "tokens": len(t.response_ids)}
    return json.dumps(row | answer, ensure_ascii=False) + "\n"


def _rows(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line's number, row) of a JSONL file of prompts; empty lines are skipped."""
    found = []
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    for line, row in _lines(file, data):
        if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
            raise UserError(f'{file}:{line}: want an object with either "prompt" or "messages"')
        if not isinstance(row.get("prompt", ""), str):
            raise UserError(f"{file}:{line}: prompt: want a string")
        messages = row.get("messages", [])
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise UserError(f"{file}:{line}: messages: want a list of objects")
        if taken := [key for key in _OWN if key in row]:
            raise UserError(f"{file}:{line}: {taken[0]}: the output's own key; give it another name")
        try:
            _dumped(row).encode()
        except UnicodeEncodeError:
            raise UserError(f"{file}:{line}: half of a surrogate pair, which has no UTF-8") from None
        found.append((line, row))
    if not found:
        raise UserError(f"{file}: no prompts in it")
    return found


def _lines(file: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    for number, text in enumerate(data.split(b"\n"), 1):
        if text.strip():
            try:
                yield number, json.loads(text.decode("utf-8"))
            except UnicodeDecodeError:
                raise UserError(f"{file}:{number}: not UTF-8") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}:{number}: not JSON: {error}") from None


def _request(
    speaks: Speaker, number: int, line: int, row: dict[str, Any], file: Path, mode: str, params: SamplingParams
) -> Request:
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    try:
        prompt = speaks.prompt(messages, mode)
    except ValueError as error:
        raise UserError(f"{file}:{line}: {error}") from None
    if speaks.context is not None and len(prompt) + params.max_new_tokens > speaks.context:
        raise UserError(
            f"{file}:{line}: a prompt of {len(prompt)} tokens and --max-new-tokens {params.max_new_tokens} are more "
            f"than the model's context, {speaks.context}"
        )
    return Request(number, number, prompt, params)


def _resumed(out: Path, rows: list[dict[str, Any]], settings: dict[str, Any]) -> int:
    """How many rows `out` holds already; half a row, where a run was cut off, is taken away.

    UserError where they are the answers to other rows, or made with other settings; both files stay as they are then.
    """
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"{out}: " + ("a folder; want a file" if out.is_dir() else f"no folder {out.parent}"))
    beside = out.with_name(f"{out.name}.settings.json")
    try:
        data = out.read_bytes() if out.exists() else b""
        if data:
            _compare(out, beside, settings)
            data = data[: data.rfind(b"\n") + 1]
            done = _answered(out, data, rows)
            os.truncate(out, len(data))
            return done
        write_text(beside, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        out.touch()
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror}") from None
    return 0


def _compare(out: Path, beside: Path, settings: dict[str, Any]) -> None:
    """UserError unless `beside`, the settings that the rows of `out` were made with, are these."""
    if not beside.exists():
        raise UserError(f"{out}: it exists, without the {beside.name} that a run to go on with has; give another --out")
    before = read_object(beside)
    for key, now in settings.items():
        was = before.get(key)
        if key == "checkpoint" or was == now:  # its files count, and not where they lie
            continue
        if key == "files":
            key, was, now = "checkpoint", before.get("checkpoint"), settings["checkpoint"]
            now = f"{now} as it is now" if was == now else now
        raise UserError(f"{out}: its rows were made with {key} {_told(was)}, not {_told(now)}; give another --out")


def _told(value: Any) -> str:
    return ",".join(f"{key}={each}" for key, each in value.items()) if isinstance(value, dict) else str(value)


def _answered(out: Path, data: bytes, rows: list[dict[str, Any]]) -> int:
    """How many of `rows` the answers in `data` are to; UserError where one is to another row."""
    answers = list(_lines(out, data))
    for (line, answer), row in zip(answers, rows, strict=False):
        asked = {key: value for key, value in answer.items() if key not in _OWN} if isinstance(answer, dict) else None
        if _dumped(asked) != _dumped(row):
            raise UserError(f"{out}:{line}: not the answer to row {line} of the prompts; give another --out")
    if len(answers) > len(rows):
        raise UserError(f"{out}: {len(answers)} answers to {len(rows)} prompts; give another --out")
    return len(answers)


def _dumped(row: Any) -> str:
    return json.dumps(row, ensure_ascii=False, sort_keys=True)


def _digest(folder: Path) -> str:
    """SHA-256 of the names, the sizes, and the first and last MiB of a checkpoint's files: enough to tell two apart."""
    digest = hashlib.sha256()
    kinds = ("*.safetensors", "*.json", "*.jinja", "encoding/*.py")
    for file in sorted(file for kind in kinds for file in folder.glob(kind)):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_EDGE))
            stream.seek(max(_EDGE, size - _EDGE))
            digest.update(stream.read(_EDGE))
    return digest.hexdigest()
