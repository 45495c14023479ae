"""The fixed wordings of a chat encoding: our own, those of an encoding.json, or those of DeepSeek's encoding folder.

Three texts are fixed and not data: the instruction of the mode `max`, the preamble that lists the tools, and the
sentence before a response format. In the last two, fields in braces stand for what is filled in. Special tokens
in a wording are special tokens, for it belongs to the format.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Formatter

from ..errors import UserError
from .tokenizer import ASSISTANT, BOS, DSML, END_THINK, EOS, REMINDER, SPECIALS, THINK, USER

FILE = "encoding.json"
# Beside the weights of DeepSeek's checkpoints. It is read as a table of strings, and never run.
OFFICIAL = Path("encoding") / "encoding_dsv4.py"
_SIZE_LIMIT = 256 * 1024  # bytes; DeepSeek's file has some tens of thousands

MAX_INSTRUCTION = (
    "Use all the effort you have. Think through every step and try each idea that could work.\n"
    "Check every result in a second way, and answer only when nothing is left in doubt.\n\n"
)
TOOLS = """## Functions

Each line is a function that you may call:

{tool_schemas}

To call functions, end your turn with one block that holds the calls:

<{dsml_token}tool_calls>
<{dsml_token}invoke name="FUNCTION">
<{dsml_token}parameter name="PARAMETER" string="true|false">VALUE</{dsml_token}parameter>
</{dsml_token}invoke>
</{dsml_token}tool_calls>

With string="true" the value is the bare text; with string="false" it is JSON: a number, true, false, null, a list or
an object. What you think goes between {thinking_start_token} and {thinking_end_token}, before any call.
"""
RESPONSE_FORMAT = "## Answer as JSON\n\nYour answer is one JSON value that fits this schema:\n{schema}"

_TOKENS = {"dsml_token": DSML, "thinking_start_token": THINK, "thinking_end_token": END_THINK}
# The wording's name -> the data that it must hold, and the name of the constant in DeepSeek's file.
DATA = {"max_instruction": None, "tools": "tool_schemas", "response_format": "schema"}
_CONSTANTS = {
    "max_instruction": "REASONING_EFFORT_MAX",
    "tools": "TOOLS_TEMPLATE",
    "response_format": "response_format_template",
}
# What the file says of the format itself: another value is another format, which this code would render wrongly.
_FORMAT = {
    "bos_token": BOS,
    "eos_token": EOS,
    "thinking_start_token": THINK,
    "thinking_end_token": END_THINK,
    "dsml_token": DSML,
    "USER_SP_TOKEN": USER,
    "ASSISTANT_SP_TOKEN": ASSISTANT,
    "LATEST_REMINDER_SP_TOKEN": REMINDER,
    "tool_calls_block_name": "tool_calls",
    "tool_output_template": "<tool_result>{content}</tool_result>",
}


def read(folder: Path) -> dict[str, str]:
    """The wordings of a folder: those of DeepSeek's own file, else those of encoding.json. UserError names the file."""
    official = folder / OFFICIAL
    return _read_official(official) if official.is_file() else _read_json(folder / FILE)


def _read_json(file: Path) -> dict[str, str]:
    if not file.is_file():
        raise UserError(f"{file}: no such file; Encoding.default().save(folder) writes one")
    try:
        found = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON: {error}") from error
    if not isinstance(found, dict) or sorted(found) != sorted(DATA):
        raise UserError(f"{file}: want one object with the keys {', '.join(DATA)}")
    for key, value in found.items():
        if not isinstance(value, str):
            raise UserError(f"{file}: {key}: want a string, got {value!r}")
        _check(value, DATA[key], f"{file}: {key}")
    return found


def _read_official(file: Path) -> dict[str, str]:
    try:
        tree = ast.parse(_text(file))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{file}: not Python: {error}") from error
    strings: dict[str, str] = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                strings[target.id] = value.value
    for name, wanted in _FORMAT.items():
        if strings.get(name, wanted) != wanted:
            raise UserError(f"{file}: {name}: {strings[name]!r} is another format than DeepSeek-V4's {wanted!r}")
    for key, name in _CONSTANTS.items():
        if name not in strings:
            raise UserError(f"{file}: {name}: want an assignment of one string literal at the top level")
        _check(strings[name], DATA[key], f"{file}: {name}")
    return {key: strings[name] for key, name in _CONSTANTS.items()}


def _text(file: Path) -> str:
    with file.open("rb") as stream:
        data = stream.read(_SIZE_LIMIT + 1)
    if len(data) > _SIZE_LIMIT:
        raise UserError(f"{file}: larger than {_SIZE_LIMIT // 1024} KiB; it holds three short texts")
    return data.decode("utf-8")


def _check(wording: str, data: str | None, where: str) -> None:
    """UserError unless the wording has no braces but those of bare fields that it may have, and those it must."""
    try:
        wording.encode()
        found = {field for field, _ in _fields(wording)} if data else set()
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if data and data not in found:
        raise UserError(f"{where}: want a text with the field {{{data}}}")
    for field in found - {data, *_TOKENS, None}:
        raise UserError(f"{where}: unknown field {{{field}}}; want {', '.join([str(data), *_TOKENS])}")


def _fields(wording: str) -> Iterator[tuple[str | None, str]]:
    """(field or None, text before it); a field has no conversion and no format, which could reach into objects."""
    for literal, field, spec, conversion in Formatter().parse(wording):
        if spec or conversion:
            raise ValueError(f"field {{{field}}} must stand bare in its braces")
        yield field, literal


def fill(wording: str, data: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
    """A wording with its fields filled in, in spans of (text, is a special token)."""
    for field, literal in _fields(wording):
        yield from split_specials(literal)
        if field in _TOKENS:
            yield _TOKENS[field], True
        elif field is not None:
            yield data[field], False


_SPECIAL = re.compile("(" + "|".join(re.escape(special) for special in SPECIALS) + ")")


def split_specials(wording: str) -> Iterator[tuple[str, bool]]:
    """A wording without fields in spans of (text, is a special token)."""
    for i, text in enumerate(_SPECIAL.split(wording)):
        yield text, i % 2 == 1
