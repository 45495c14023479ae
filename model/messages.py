"""The rules of DeepSeek-V4's chat encoding over whole messages: checks, turns, order of tool results, what is dropped.

A message is a dict of `role`, `content` and the keys below, as in OpenAI's chat format. What DeepSeek's
`encode_messages` does before it renders is here, in its order: tool results and user messages in a row become
one user turn; tool results are sorted; developer turns that the rules forget are dropped.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import tokenizer
from .dsml import parameters, to_json

ROLES = ("system", "user", "assistant", "tool", "developer", "latest_reminder")
TASKS = tokenizer.TASKS[:-1]  # extracted_url has a token, but no task
# What a message may hold. As in DeepSeek's code, a key that its role does not render is ignored.
KEYS = (
    *("role", "content", "reasoning_content", "tools", "response_format", "tool_calls", "tool_call_id", "name"),
    *("task", "wo_eos", "mask", "content_blocks"),
)

Message = Mapping[str, Any]


class Part(NamedTuple):
    """A piece of a user turn: a text or, with the id of its call (perhaps None), a tool's result."""

    text: str
    is_result: bool = False
    call_id: str | None = None


@dataclass
class Turn:
    """One message, or several user and tool messages in a row.

    `index` counts messages in the caller's list. `message` is the one that opens the turn, empty if that is a
    tool's result: `task`, `wo_eos` and the like of what follows in the turn are lost, as in DeepSeek's code.
    """

    index: int
    role: str
    message: Message
    parts: list[Part] = field(default_factory=list)

    @property
    def task(self) -> str | None:
        return self.message.get("task")

    @property
    def asks(self) -> bool:
        """Whether it is a user's or a developer's turn: what the model answers."""
        return self.role in ("user", "developer")

    @property
    def declares_tools(self) -> bool:
        """In any role but user, even where they are not rendered."""
        return self.role != "user" and bool(self.message.get("tools"))


def check(messages: Sequence[Message], name: str = "messages") -> None:
    """ValueError names the first message that is not well formed, and what is wrong with it."""
    for i, message in enumerate(messages):
        where = f"{name}[{i}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}: want an object, got {type(message).__name__}")
        try:
            _check_message(message)
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: half of a surrogate pair, which has no UTF-8: {error.object[:40]!r}") from error
        except RecursionError as error:
            raise ValueError(f"{where}: nested too deeply") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error


def _check_message(message: Message) -> None:
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}; want one of {', '.join(ROLES)}")
    for key in message:
        if key not in KEYS:
            raise ValueError(f"unknown key {key!r}; want some of {', '.join(KEYS)}")
    _check_content(role, message.get("content"))
    for key in ("reasoning_content", "tool_call_id"):
        _check_string(key, message.get(key))
    task = message.get("task")
    if task is not None and task not in TASKS:
        raise ValueError(f"unknown task {task!r}; want one of {', '.join(TASKS)}")
    for key in ("mask", "wo_eos"):
        if message.get(key) not in (None, 0, 1):
            raise ValueError(f"{key} must be true or false, got {message[key]!r}")
    for i, tool in enumerate(_objects("tools", message.get("tools"))):
        if not isinstance(tool.get("function"), Mapping):
            raise ValueError(f"tools[{i}] has no object `function`")
        to_json(tool["function"]).encode()
    for i, call in enumerate(_objects("tool_calls", message.get("tool_calls"))):
        _check_call(call, f"tool_calls[{i}]")
    to_json(message.get("response_format")).encode()


def _check_content(role: str, content: Any) -> None:
    if role == "tool" and isinstance(content, list):
        for i, block in enumerate(_objects("content", content)):
            if block.get("type") == "text":
                _check_string(f"the text of content[{i}]", block.get("text", ""), missing=False)
            elif "type" in block:
                _check_string(f"the type of content[{i}]", block["type"])
        return
    if role == "developer" and content == "":
        raise ValueError("content of a developer's message must not be empty")
    _check_string("content", content, missing=role not in ("user", "developer"))


def _check_call(call: Message, where: str) -> None:
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise ValueError(f"{where} has no object `function`")
    for owner in (call, function):
        _check_string(f"the id of {where}", owner.get("id"))
    _check_string(f"the name of {where}", function.get("name"), missing=False)
    if "arguments" not in function:
        raise ValueError(f"{where} has no `arguments`; want a JSON object as a string")
    try:
        for key, value, _ in parameters(function["arguments"]):
            (key + value).encode()
    except UnicodeEncodeError:
        raise
    except (TypeError, ValueError) as error:
        raise ValueError(f"the arguments of {where}: {error}") from error


def _check_string(what: str, value: Any, missing: bool = True) -> None:
    if isinstance(value, str):
        value.encode()
    elif value is not None or not missing:
        raise ValueError(f"{what} must be a string, got {type(value).__name__}")


def _objects(key: str, value: Any) -> Iterable[Message]:
    if not value:
        return []
    if not isinstance(value, list | tuple) or not all(isinstance(each, Mapping) for each in value):
        raise ValueError(f"{key} must be a list of objects")
    return value


def merge(messages: Sequence[Message]) -> list[Turn]:
    """The turns of checked messages: a tool's result joins the user turn before it, a user message one without task."""
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        role, last = message["role"], turns[-1] if turns else None
        if role == "tool":
            if last is None or last.role != "user":
                last = Turn(i, "user", {})
                turns.append(last)
            last.parts.append(Part(_result(message.get("content", "")), True, message.get("tool_call_id")))
        elif role == "user":
            if last is None or last.role != "user" or last.task is not None:
                last = Turn(i, "user", message)
                turns.append(last)
            last.parts.append(Part(message["content"]))
        else:
            turns.append(Turn(i, role, message))
    return turns


def _result(content: Any) -> str:
    """The text of a tool's result: None is "None", and a block that is no text a stub, as in DeepSeek's code."""
    if not isinstance(content, list):
        return str(content)
    return "\n\n".join(
        block.get("text", "") if block.get("type") == "text" else f"[Unsupported {block.get('type')}]"
        for block in content
    )


def sort_results(turns: Sequence[Turn]) -> None:
    """Put the tool results of each user turn in the order of the latest tool calls, by id; texts keep their places.

    The sort is stable, and an unknown id counts as that of the first call. Calls without ids leave the order as
    it is.
    """
    order: dict[str, int] = {}
    for turn in turns:
        if turn.role == "assistant" and turn.message.get("tool_calls"):
            ids = [call.get("id") or call["function"].get("id") for call in turn.message["tool_calls"]]
            order = {call_id: i for i, call_id in enumerate(ids) if call_id}
        results = [part for part in turn.parts if part.is_result]
        if order and len(results) > 1:
            ordered = iter(sorted(results, key=_rank(order)))
            turn.parts = [next(ordered) if part.is_result else part for part in turn.parts]


def _rank(order: Mapping[str, int]) -> Callable[[Part], int]:
    return lambda part: order.get(part.call_id or "", 0)


def last_asked(turns: Sequence[Turn]) -> int:
    """The place of the last user or developer turn, -1 if there is none."""
    return max((i for i, turn in enumerate(turns) if turn.asks), default=-1)


def without_old_developers(turns: Sequence[Turn]) -> list[Turn]:
    """The turns without developers' before the last user's or developer's: they go where reasoning is dropped."""
    last = last_asked(turns)
    return [turn for i, turn in enumerate(turns) if i >= last or turn.role != "developer"]
