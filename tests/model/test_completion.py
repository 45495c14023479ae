"""What the model wrote, read back: tool calls, every refusal and its event, damaged and very long text."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amalgam.model.completion import EVENTS
from amalgam.model.encoding import MODES
from amalgam.model.tokenizer import ASSISTANT, BOS, DSML, END_THINK, EOS, SPECIALS, THINK, USER

from .chats import ENCODING, answers, assistant, call, user


def written(message: dict, mode: str) -> str:
    """The text that a model writes to say a message."""
    prompt = ENCODING.encode([user("q")], mode)
    return ENCODING.encode([user("q"), message], mode).removeprefix(prompt)


TWO = assistant("Look:", "", tool_calls=[call("f", {"a": 'x "1"\n<', "b": [1, None]}), call("g", {})])
TEXT = written(TWO, "chat")


def test_calls_are_read_back_and_absent_ones_leave_no_key():
    assert ENCODING.parse(TEXT) == TWO
    assert ENCODING.parse_tolerant(TEXT) == (TWO, [])
    assert ENCODING.parse(f"4{EOS}") == {"role": "assistant", "content": "4", "reasoning_content": ""}
    without_empty_line = TEXT.replace('name="g">\n\n', 'name="g">\n')
    assert ENCODING.parse(without_empty_line) == TWO
    assert ENCODING.parse(f"{USER}{ASSISTANT}{EOS}")["content"] == USER + ASSISTANT  # as DeepSeek's parser


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(MODES))
def test_what_was_encoded_is_read_back(data: st.DataObject, mode: str):
    message = data.draw(answers(mode))
    text = written(message, mode)
    assert ENCODING.parse(text, mode) == message
    assert ENCODING.parse_tolerant(text, mode) == (message, [])


CALL, BLOCK = f"<{DSML}invoke", f"<{DSML}tool_calls>\n"
END_CALL, END_BLOCK = f"</{DSML}invoke>\n", f"</{DSML}tool_calls>"
FIRST, SECOND = TWO["tool_calls"]


@pytest.mark.parametrize(
    ("text", "mode", "events", "error"),
    [
        ("4", "chat", ["no_eos"], f"does not end with {EOS}"),
        ("", "high", ["no_eos", "open_reasoning"], f"does not end with {EOS}"),
        (f"4{EOS}!", "chat", ["text_after_eos"], f"1 characters follow {EOS}"),
        (f"4{EOS}{EOS}", "chat", ["text_after_eos"], f"19 characters follow {EOS}"),
        (f"4{EOS}", "high", ["open_reasoning"], f"reasoning does not end with {END_THINK}"),
        (f"r{END_THINK}4{EOS}", "chat", ["special_token"], f"content holds the special token {END_THINK}"),
        (f"r{END_THINK}{THINK}4{EOS}", "max", ["special_token"], f"content holds the special token {THINK}"),
        (f"{BOS}r{END_THINK}4{EOS}", "max", ["special_token"], f"reasoning holds the special token {BOS}"),
        (f"\n<{DSML}tool_calls>{EOS}", "chat", ["special_token"], f"content holds the special token {DSML}"),
        (f"r{TEXT}", "high", ["open_reasoning", "special_token"], f"reasoning does not end with {END_THINK}"),
    ],
)
def test_what_is_wrong_around_the_calls(text: str, mode: str, events: list[str], error: str):
    with pytest.raises(ValueError, match=error.replace("｜", ".")):
        ENCODING.parse(text, mode)
    message, found = ENCODING.parse_tolerant(text, mode)
    assert [event.name for event in found] == events
    assert error in found[0].detail
    assert "tool_calls" not in message


@pytest.mark.parametrize(
    ("old", "new", "events", "left"),
    [
        (BLOCK, BLOCK.strip(), ["bad_block"], [FIRST, SECOND]),
        (BLOCK, f"{BLOCK}so: ", ["bad_block"], [FIRST, SECOND]),
        (f"{END_BLOCK}{EOS}", "", ["no_eos", "open_block"], [FIRST, SECOND]),
        (f"{END_CALL}{END_BLOCK}{EOS}", "", ["no_eos", "bad_call", "open_block"], [FIRST]),
        (END_BLOCK, f"{END_BLOCK}\nDone.", ["text_after_block"], [FIRST, SECOND]),
        (END_BLOCK, END_BLOCK * 2, ["text_after_block"], [FIRST, SECOND]),
        (f'{CALL} name="f"', f'{CALL} nam="f"', ["bad_call"], [SECOND]),
        (f'{CALL} name="f"', f'{CALL}s name="f"', ["bad_call"], [SECOND]),
        (f'{CALL} name="g">\n\n{END_CALL}', CALL, ["bad_call"], [FIRST]),
        (f"{END_CALL}{CALL}", CALL, ["bad_call"], [SECOND]),
        (END_CALL + END_BLOCK, END_CALL.strip() + END_BLOCK, ["bad_call"], [FIRST]),
        ('parameter name="a"', 'parameter key="a"', ["bad_parameter"], [SECOND]),
        ('name="a" string="true"', 'name="a"', ["bad_parameter"], [SECOND]),
        ('string="true"', 'string="yes"', ["bad_parameter"], [SECOND]),
        (f"</{DSML}parameter>\n<", "<", ["bad_parameter"], [SECOND]),
        (f"<\n</{DSML}parameter>", f"</{DSML}parameter> and", ["bad_parameter"], [SECOND]),
        (f"</{DSML}parameter>\n{END_CALL}", END_CALL, ["bad_parameter"], [SECOND]),
        ('name="b"', 'name="a"', ["duplicate_parameter"], [SECOND]),
        ("[1, null]", "[1, null", ["bad_json"], [SECOND]),
        ("[1, null]", '"\\ud800"', ["bad_json"], [SECOND]),
        ("[1, null]", "[NaN]", ["bad_json"], [SECOND]),
        ("[1, null]", "-1e999", ["bad_json"], [SECOND]),  # JSON, but Python would write it again as -Infinity
        ("[1, null]", "[" * 200 + "]" * 200, ["bad_json"], [SECOND]),
        ("[1, null]", "[" * 100_000, ["bad_json"], [SECOND]),
    ],
)
def test_damaged_calls_are_left_out_and_named(old: str, new: str, events: list[str], left: list):
    damaged = TEXT.replace(old, new) if old in TEXT else TEXT.replace(old.replace("<\n", "<"), new)
    assert damaged != TEXT
    with pytest.raises(ValueError, match="."):
        ENCODING.parse(damaged)
    message, found = ENCODING.parse_tolerant(damaged)
    assert [event.name for event in found] == events
    assert message.get("tool_calls", []) == left
    assert message["content"] == "Look:"


def test_a_block_without_calls():
    text = f"\n\n{BLOCK}{END_BLOCK}{EOS}"
    assert [event.name for event in ENCODING.parse_tolerant(text)[1]] == ["no_call"]


TOKENS = st.sampled_from(
    [
        *SPECIALS,
        "\n\n",
        "<",
        "</",
        ">",
        ">\n",
        '"',
        "tool_calls",
        "invoke",
        "parameter",
        ' name="f"',
        ' string="false"',
        "1",
    ]
)


@st.composite
def damaged(draw: st.DrawFn, mode: str) -> str:
    """A well-formed answer with some cuts, insertions and doublings; or tokens at random."""
    if draw(st.integers(0, 3)) == 0:
        return "".join(draw(st.lists(TOKENS, max_size=30)))
    text = written(draw(answers(mode)), mode)
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(text)))
        end = min(len(text), begin + draw(st.integers(0, 40)))
        text = text[:begin] + draw(st.sampled_from(["", text[begin:end] * 2])) + draw(TOKENS | st.just("")) + text[end:]
    return text


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(MODES))
def test_damaged_text_is_named_or_refused_and_never_more(data: st.DataObject, mode: str):
    text = data.draw(damaged(mode))
    message, events = ENCODING.parse_tolerant(text, mode)
    assert {event.name for event in events} <= EVENTS.keys()
    for each in message.get("tool_calls", []):
        assert isinstance(json.loads(each["function"]["arguments"]), dict)
    try:
        strict = ENCODING.parse(text, mode)
    except ValueError as error:
        assert str(error) == events[0].detail
    else:
        assert (strict, []) == (message, events)
        # What the strict parser takes can stand in a conversation, and says the same again.
        assert normal(ENCODING.parse(written(strict, mode), mode)) == normal(strict)


def normal(message: dict) -> dict:
    """The message with its calls' JSON in one spelling."""
    calls = [each["function"] for each in message.get("tool_calls", [])]
    return {**message, "tool_calls": [(each["name"], json.dumps(json.loads(each["arguments"]))) for each in calls]}


@pytest.mark.parametrize(
    "piece",
    [
        f"\n\n<{DSML}tool_calls",
        f'<{DSML}invoke name="f">\n',
        f'<{DSML}parameter name="a" string="true">',
        f'<{DSML}parameter name="a" string="true"></{DSML}parameter>\n',
        f"{END_CALL}",
        '" string="true">',
        "[",
        f"<{DSML}",
        "\n",
        DSML,
    ],
)
def test_long_text_takes_time_in_proportion(piece: str):
    opened = f'\n\n{BLOCK}{CALL} name="f">\n<{DSML}parameter name="a" string="false">'
    for begin in ("", f"\n\n{BLOCK}", opened):
        text = begin + piece * (400_000 // len(piece))
        began = time.process_time()
        ENCODING.parse_tolerant(text, "chat")
        assert time.process_time() - began < 3  # about 0.1 s; what grows with the square takes minutes
