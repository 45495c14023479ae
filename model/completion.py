"""What the model wrote, as a message: a strict parser, and one for RL that reports instead of raising.

Both read the text after the header, with its EOS, and are one reader with two ways to report. So a text that
the strict parser takes is one for which the tolerant parser reports nothing, and the messages are the same.
DeepSeek's own parser is meant for well-formed output only. It takes a tool block that is cut off, parameters
whose JSON is broken, and markup inside values; here each of these is an error (our choice). What both take, they
read alike.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from .dsml import BEGIN, Report, read_calls
from .tokenizer import BOS, DSML, END_THINK, EOS, THINK

# What can be wrong. In brackets, what the tolerant parser then returns.
EVENTS = {
    "no_eos": "the text does not end with EOS: it was cut off",
    "text_after_eos": "something follows EOS (left out)",
    "open_reasoning": "the reasoning does not end with </think> (all the text is reasoning)",
    "special_token": "a special token, or a tag of a tool call, stands in the reasoning or the content (kept there)",
    "bad_block": "the tool block's first tag is not followed by a line's end",
    "no_call": "the tool block holds no call",
    "bad_call": "a call has no name or no end (the call is left out, here and below)",
    "bad_parameter": "a parameter has no name, no kind or no end, or something else stands in its place",
    "duplicate_parameter": "a call has a parameter twice",
    "bad_json": "a value that is not a string is not JSON",
    "open_block": "the tool block does not end",
    "text_after_block": "something follows the tool block (left out)",
}


Reader = Callable[[Report], dict[str, Any]]  # makes the message of a text, and reports what is wrong with it


class Event(NamedTuple):
    """One thing that is wrong with a text: a name of EVENTS, and a sentence with the place."""

    name: str
    detail: str


def read_strict(text: str, thinks: bool) -> dict[str, Any]:
    """The message, if nothing is wrong with the text. ValueError says what is."""
    return strict(lambda report: _read(text, thinks, report))


def read_tolerant(text: str, thinks: bool) -> tuple[dict[str, Any], list[Event]]:
    """The message as far as it can be read, and what is wrong with the text. Never raises; linear in the text."""
    return tolerant(lambda report: _read(text, thinks, report))


def strict(read: Reader) -> dict[str, Any]:
    """What `read` returns; ValueError with the first thing that it reports."""

    def fail(_: str, detail: str) -> NoReturn:
        raise ValueError(detail)

    return read(fail)


def tolerant(read: Reader) -> tuple[dict[str, Any], list[Event]]:
    """What `read` returns, and all that it reports."""
    events: list[Event] = []

    def note(name: str, detail: str) -> None:
        events.append(Event(name, detail))

    return read(note), events


def _read(text: str, thinks: bool, report: Report) -> dict[str, Any]:
    body, end, rest = text.partition(EOS)
    if not end:
        report("no_eos", f"the message does not end with {EOS}")
    if rest:
        report("text_after_eos", f"{len(rest)} characters follow {EOS}")
    reasoning, content = "", body
    if thinks:
        reasoning, end, content = body.partition(END_THINK)
        if not end:
            report("open_reasoning", f"the reasoning does not end with {END_THINK}")
    content, begins, block = content.partition(BEGIN)
    for name, part in (("reasoning", reasoning), ("content", content)):
        for special in (BOS, THINK, END_THINK, DSML):
            if special in part:
                report("special_token", f"the {name} holds the special token {special}")
    message: dict[str, Any] = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    calls = read_calls(block, report) if begins else []
    return message | ({"tool_calls": calls} if calls else {})
