"""DSML, the markup of DeepSeek-V4's tool calls: from calls to text, and from the model's text to calls.

    \\n\\n<｜DSML｜tool_calls>
    <｜DSML｜invoke name="search">
    <｜DSML｜parameter name="query" string="true">two words</｜DSML｜parameter>
    <｜DSML｜parameter name="limit" string="false">5</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

`｜DSML｜` is one token. A string stands as it is, any other value as JSON (paper, Table 4; DeepSeek's `encoding/`
folder). A call is a dict {"type": "function", "function": {"name", "arguments"}} whose arguments are the text of a
JSON object, as in OpenAI's chat format.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from .tokenizer import DSML

BEGIN = f"\n\n<{DSML}tool_calls"
END = f"</{DSML}tool_calls"
_CALL, _CALL_END = f"<{DSML}invoke", f"</{DSML}invoke"
_PARAMETER, _PARAMETER_END = f"<{DSML}parameter", f"</{DSML}parameter"
_TAG = re.compile(f"</?{DSML}\\w*")
# JSON may nest this deep in a call: far above what tools declare, far below where Python's json gives up.
_DEPTH = 100

Call = dict[str, Any]
# Takes the name of what is wrong and a sentence about it; a strict parser's raises, a tolerant one's returns None.
Report = Callable[[str, str], None]


class Segment(NamedTuple):
    tag: str
    text: str  # what follows the tag, up to the next one


def to_json(value: Any) -> str:
    """One line of JSON with characters as they are. TypeError or ValueError for what JSON cannot hold.

    NaN and infinities are refused too (our choice): DeepSeek's code prints them as Python does.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def parameters(arguments: Any) -> list[tuple[str, str, bool]]:
    """A call's arguments as (name, text, is a string).

    As DeepSeek's code has it: what is no JSON becomes one parameter called `arguments`. ValueError for JSON
    that is no object, where that code fails.
    """
    try:
        values = json.loads(arguments)
    except (TypeError, ValueError, RecursionError):
        values = {"arguments": arguments}
    if not isinstance(values, dict):
        raise ValueError(f"want a JSON object, got {_short(str(arguments))}")
    return [
        (name, value if isinstance(value, str) else to_json(value), isinstance(value, str))
        for name, value in values.items()
    ]


def render_calls(calls: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, bool]]:
    """The block of checked calls in spans of (text, is a special token)."""
    yield from _mark("\n\n<", "tool_calls>\n")
    for call in calls:
        function = call["function"]
        yield from _mark("<", f'invoke name="{function["name"]}">\n')
        for i, (name, text, is_string) in enumerate(parameters(function["arguments"])):
            opening = f'parameter name="{name}" string="{"true" if is_string else "false"}">{text}'
            yield from _mark("\n<" if i else "<", opening)
            yield from _mark("</", "parameter>")
        yield from _mark("\n</", "invoke>\n")
    yield from _mark("</", "tool_calls>")


def _mark(before: str, after: str) -> Iterator[tuple[str, bool]]:
    yield before, False
    yield DSML, True
    yield after, False


def read_calls(block: str, report: Report) -> list[Call]:
    """The calls of a block, which begins after BEGIN and runs to where the message ends.

    A call with anything wrong in it is reported and left out, never repaired. Time is linear in the text.
    """
    segments = _segments(block)
    if segments[0].text != ">\n":
        report("bad_block", f"want a line's end after the tool block's first tag, got {_short(segments[0].text)}")
    groups = list(_groups(segments[1:]))
    ended = next((i for i, group in enumerate(groups) if group[0].tag == END), len(groups))
    if ended == 0:
        report("no_call", "the tool block holds no call")
    calls = [call for group in groups[:ended] if (call := _read_call(group, report)) is not None]
    if ended == len(groups):
        report("open_block", f"the tool block does not end with {END}>")
    elif groups[ended:] != [[Segment(END, ">")]]:
        report("text_after_block", f"want nothing after {END}>, got {_short(block.partition(END)[2])}")
    return calls


def _segments(block: str) -> list[Segment]:
    tags = list(_TAG.finditer(block))
    begins = [0, *(tag.end() for tag in tags)]
    ends = [*(tag.start() for tag in tags), len(block)]
    names = ["", *(tag.group() for tag in tags)]
    return [Segment(name, block[begin:end]) for name, begin, end in zip(names, begins, ends, strict=True)]


def _groups(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """The segments, cut before each call and before the block's end."""
    group: list[Segment] = []
    for segment in segments:
        if group and segment.tag in (_CALL, END):
            yield group
            group = []
        group.append(segment)
    if group:
        yield group


def _read_call(segments: Sequence[Segment], report: Report) -> Call | None:
    (tag, head), *inner = segments
    name = _between(head, ' name="', '">\n') if inner[:1] and inner[0].tag == _PARAMETER else _lone_name(head)
    if tag != _CALL or name is None:
        return report("bad_call", f'want {_CALL} name="NAME"> and a line\'s end, got {_short(tag + head)}')
    if not inner or inner[-1] != (_CALL_END, ">\n"):
        return report("bad_call", f"the call of {_short(name)} does not end with {_CALL_END}> and a line's end")
    arguments: dict[str, str] = {}
    for opening, closing in zip_longest(inner[:-1:2], inner[1:-1:2]):
        key, value = _read_parameter(opening, closing, report)
        if key is None:
            return None
        if key in arguments:
            return report("duplicate_parameter", f"the call of {_short(name)} has parameter {_short(key)} twice")
        arguments[key] = value
    text = "{" + ", ".join(f"{to_json(key)}: {value}" for key, value in arguments.items()) + "}"
    return {"type": "function", "function": {"name": name, "arguments": text}}


def _read_parameter(opening: Segment, closing: Segment | None, report: Report) -> tuple[str | None, str]:
    """The name and the value as JSON; None for the name of one that is reported."""
    got = _short(opening.tag + opening.text)
    if opening.tag != _PARAMETER or not opening.text.startswith(' name="'):
        return report("bad_parameter", f'want {_PARAMETER} name="NAME", got {got}'), ""
    name, quote, rest = opening.text.removeprefix(' name="').partition('" string="')
    kind, bracket, value = rest.partition('">')
    if not quote or not bracket or kind not in ("true", "false"):
        return report("bad_parameter", f'want {_PARAMETER} name="NAME" string="true|false">, got {got}'), ""
    if closing != (_PARAMETER_END, ">\n"):
        return report("bad_parameter", f"want {_PARAMETER_END}> and a line's end after {got}"), ""
    if kind == "true":
        return name, to_json(value)
    if not _is_json(value):
        return report("bad_json", f'parameter {_short(name)} with string="false" is not JSON: {_short(value)}'), ""
    return name, value


def _is_json(text: str) -> bool:
    """Whether it is JSON that can be written again: not too deep, no NaN, without half a surrogate pair."""
    try:
        value = json.loads(text)
        to_json(value).encode()
    except (ValueError, RecursionError):
        return False
    return not _is_deeper(value, _DEPTH)


def _is_deeper(value: Any, limit: int) -> bool:
    if not isinstance(value, list | dict):
        return False
    children = value.values() if isinstance(value, dict) else value
    return limit == 0 or any(_is_deeper(child, limit - 1) for child in children)


def _lone_name(head: str) -> str | None:
    """The name of a call without parameters: an empty line stands in their place, which may be missing."""
    name = _between(head, ' name="', '">\n\n')
    return _between(head, ' name="', '">\n') if name is None else name


def _between(text: str, before: str, after: str) -> str | None:
    if len(text) < len(before) + len(after) or not (text.startswith(before) and text.endswith(after)):
        return None
    return text[len(before) : len(text) - len(after)]


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
