"""The fixed wordings: saved and loaded, read from DeepSeek's file without running it, and every refusal."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amalgam.errors import UserError
from amalgam.model import checkpoint, wordings
from amalgam.model.encoding import Encoding
from amalgam.model.tokenizer import BOS, DSML, END_THINK, SPECIALS, THINK

from .. import tiny
from .chats import ENCODING, SYSTEM, TINY, TOOL, user

OFFICIAL = '''
import os
raise SystemExit("this file is read, and not run")
bos_token: str = "<｜begin▁of▁sentence｜>"
dsml_token = "｜DSML｜"
response_format_template: str = (
    "As JSON:\\n"
    "{schema}"
)
REASONING_EFFORT_MAX = "old"
REASONING_EFFORT_MAX = "Think " "long.\\n\\n"
TOOLS_TEMPLATE = """{tool_schemas} after {thinking_end_token} in <{dsml_token}>, {{literally}}"""
other = "a" + bos_token
def f():
    TOOLS_TEMPLATE = "inner"
'''


def official(folder: Path, text: str | bytes = OFFICIAL) -> Path:
    file = folder / "encoding" / "encoding_dsv4.py"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def test_wordings_travel_with_the_checkpoint(tmp_path: Path):
    ENCODING.save(tmp_path)
    assert Encoding.from_checkpoint(tmp_path) == ENCODING
    assert Encoding.default() == Encoding() != ENCODING
    assert Encoding.default().encode([user("a")], "max").startswith(BOS + Encoding.default().max_instruction)
    assert Encoding.from_checkpoint(checkpoint.resolve("tiny")) == Encoding.default()


def test_deepseeks_own_wordings_go_first_and_are_read_as_literals(tmp_path: Path):
    ENCODING.save(tmp_path)
    encoding = Encoding.from_checkpoint(official(tmp_path))
    assert encoding.max_instruction == "Think long.\n\n"
    assert encoding.response_format == "As JSON:\n{schema}"
    listed = '{"name": "add", "parameters": {"type": "object"}}'
    text = encoding.encode([{**SYSTEM, "tools": [TOOL]}])
    assert text == f"{BOS}Be brief.\n\n{listed} after {END_THINK} in <{DSML}>, {{literally}}"
    model = tiny.model(0)
    model.origin = tmp_path
    checkpoint.save(model, tmp_path / "saved")
    assert Encoding.from_checkpoint(tmp_path / "saved") == encoding


def test_special_tokens_in_a_wording_are_special():
    encoding = Encoding(max_instruction=f"a{THINK}b", tools="{thinking_start_token}{tool_schemas}" + DSML)
    ids, _ = encoding.ids(TINY, [{**SYSTEM, "tools": [{"function": {"name": THINK}}]}, user("q")], "max")
    named = [SPECIALS[i] for i in ids if i < len(SPECIALS)]
    assert named[:4] == [BOS, THINK, THINK, DSML]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, "encoding.json: no such file"),
        ("{", "encoding.json: not JSON"),
        ("[" * 100_000, "encoding.json: not JSON"),
        ("\udcff", "encoding.json: not JSON"),
        (" " * 300_000, "encoding.json: larger than 256 KiB"),
        ("[]", "encoding.json: want one object with the keys max_instruction, tools, response_format"),
        ('{"max_instruction": ""}', "want one object with the keys max_instruction"),
        ('{"max_instruction": 1, "tools": "", "response_format": ""}', "max_instruction: want a string, got 1"),
        (
            '{"max_instruction": "{", "tools": "a", "response_format": ""}',
            "tools: want a text with the field {tool_sch",
        ),
        (
            '{"max_instruction": "", "tools": "{tool_schemas}", "response_format": "{schema.x}"}',
            "with the field {schema}",
        ),
        (
            '{"max_instruction": "", "tools": "{tool_schemas}{x}", "response_format": ""}',
            "tools: unknown field {x}; want",
        ),
        (
            '{"max_instruction": "", "tools": "{tool_schemas!r}", "response_format": ""}',
            "{tool_schemas} must stand bare",
        ),
        (
            '{"max_instruction": "", "tools": "{tool_schemas:9999}", "response_format": ""}',
            "must stand bare in its braces",
        ),
        (
            '{"max_instruction": "", "tools": "{tool_schemas", "response_format": ""}',
            "encoding.json: tools: expected '}'",
        ),
    ],
)
def test_bad_wordings_are_refused(tmp_path: Path, text: str | None, error: str):
    if text is not None:
        (tmp_path / "encoding.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as raised:
        Encoding.from_checkpoint(tmp_path)
    assert error in str(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("import os", "import (", "encoding_dsv4.py: not Python"),
        ("import os", "x = " + "-" * 50_000 + "1", "encoding_dsv4.py: not Python"),
        ("import os", "x = " + "(" * 50_000, "encoding_dsv4.py: not Python"),
        ("import os", "\0", "encoding_dsv4.py: not Python"),
        ("import os", "#" * 300_000, "encoding_dsv4.py: larger than 256 KiB"),
        ("TOOLS_TEMPLATE", "TEMPLATE", "TOOLS_TEMPLATE: want an assignment of one string literal at the top level"),
        ('"As JSON', 'f"As JSON', "response_format_template: want an assignment of one string literal"),
        ("{schema}", "", "response_format_template: want a text with the field {schema}"),
        ("{dsml_token}", "{eval}", "TOOLS_TEMPLATE: unknown field {eval}"),
        ('"｜DSML｜"', '"|DSML|"', "dsml_token: '|DSML|' is another format than DeepSeek-V4's '｜DSML｜'"),
    ],
)
def test_a_bad_file_of_deepseeks_is_refused(tmp_path: Path, old: str, new: str, error: str):
    official(tmp_path, OFFICIAL.replace(old, new))
    with pytest.raises(UserError) as raised:
        Encoding.from_checkpoint(tmp_path)
    assert error in str(raised.value)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_files_raise_only_a_user_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    folder = tmp_path_factory.mktemp("damaged", numbered=True)
    whole = OFFICIAL.encode()
    begin, end = sorted(data.draw(st.tuples(st.integers(0, len(whole)), st.integers(0, len(whole)))))
    official(folder, whole[:begin] + data.draw(st.binary(max_size=8)) + whole[end:])
    try:
        encoding = Encoding.from_checkpoint(folder)
    except UserError as error:
        assert str(wordings.OFFICIAL) in str(error)
    else:
        encoding.encode([{**SYSTEM, "tools": [TOOL], "response_format": {"a": 1}}], "max")
