"""From a request to what the engine runs: messages into V4's encoding or a checkpoint's own template, then token ids.

Our choices, where OpenAI's protocol and V4's encoding differ:

- A developer's message is a system message, as OpenAI's documentation has it. (V4's developer stands as a user and is
  forgotten with the reasoning of earlier turns.)
- Tools and the response format are rendered in the first message, of a system; an empty one is put there if need be.
- `tool_choice` "none" renders no tools. "required" or a function's name writes the beginning of the call into the
  prompt, so that the model has to go on with it; that is built for the mode chat, in which no reasoning comes first.
- The response format is told to the model, and nothing constrains what it writes. `strict` is refused there; on a tool
  it is rendered with the rest of the function and not enforced.
"""

import itertools
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...model.dsml import BEGIN
from ...model.encoding import Encoding, Piece, tokenize
from ...model.template import Template
from ...model.tokenizer import BOS, DSML
from ...rl.trajectory import Request, SamplingParams
from ..speak import Speaker
from .protocol import MAX_CHOICES, ApiError, ChatRequest, CompletionRequest, Sampled

MODES = {
    **{"none": "chat", "minimal": "chat", "low": "high", "medium": "high", "high": "high"},
    **{"xhigh": "max", "max": "max"},
}
_KEYS = ("role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_numbers = itertools.count(1)  # the engine's ids and groups: of this process, never seen outside


@dataclass
class Job:
    """What is asked of the engine: the choices in order, `n` of each prompt, and how their text is read."""

    requests: list[Request]
    thinks: bool = False  # whether the prompt opened the reasoning
    calls: bool = False  # whether tool calls are looked for
    opening: list[int] = field(default_factory=list)  # the prompt's last ids, if they open a tool call
    is_text: bool = False  # a completion: text as it is

    @property
    def prompt_tokens(self) -> int:
        """Of each prompt once, however many choices share it."""
        return sum(
            len(r.prompt_ids) for i, r in enumerate(self.requests) if i == 0 or r.group != self.requests[i - 1].group
        )


def chat_job(speaks: Speaker, context: int, asked: ChatRequest, mode: str) -> Job:
    """`context`: most tokens of prompt and answer. `mode`: the one without a reasoning_effort.

    ApiError for what cannot be answered.
    """
    mode = MODES[asked.reasoning_effort] if asked.reasoning_effort else mode
    if asked.max_tokens and asked.max_completion_tokens:
        raise _bad("max_tokens", "max_completion_tokens is given too; give one of them")
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(asked.messages)]
    tools = _tools(asked.tools or [])
    choice = _choice(asked.tool_choice, [tool["function"]["name"] for tool in tools])
    shown = [] if choice == "none" else tools
    schema = _schema(asked.response_format)
    if not isinstance(speaks.encoding, Encoding):
        _check_template(speaks.encoding, mode, bool(tools), schema is not None)
    try:
        ids = speaks.prompt(_declared(messages, shown, schema), mode)
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from None
    opening = _opening(speaks, choice, mode)
    prompt = np.append(ids, np.array(opening, np.int32))
    requests = _requests(asked, [prompt], context, asked.max_completion_tokens or asked.max_tokens)
    return Job(requests, thinks=mode != "chat", calls=bool(shown), opening=opening)


def completion_job(speaks: Speaker, context: int, asked: CompletionRequest) -> Job:
    """A text's special tokens count as such, and V4's BOS is put first where it is not. Ids are taken as they are."""
    given = asked.prompt
    single = isinstance(given, str) or (isinstance(given, list) and bool(given) and all(type(i) is int for i in given))
    prompts = [given] if single else given
    if not isinstance(prompts, list) or not prompts:
        raise _bad("prompt", "want a text, its token ids, or a list of texts or of lists of ids")
    if len(prompts) * (asked.n or 1) > MAX_CHOICES:
        raise _bad("prompt", f"{len(prompts)} prompts, n {asked.n or 1}: want at most {MAX_CHOICES} choices")
    ids = [_prompt_ids(speaks, prompt) for prompt in prompts]
    return Job(_requests(asked, ids, context, asked.max_tokens), is_text=True)


def _prompt_ids(speaks: Speaker, prompt: Any) -> np.ndarray:
    if isinstance(prompt, str):
        is_v4 = isinstance(speaks.encoding, Encoding)
        text = BOS + prompt if is_v4 and not prompt.startswith(BOS) else prompt
        prompt = speaks.tokenizer.encode(text, add_special_tokens=not is_v4).ids
    if not isinstance(prompt, list) or not prompt:
        raise _bad("prompt", "want a text, or token ids, at least one")
    for i in prompt:
        if type(i) is not int or not 0 <= i < speaks.vocabulary:
            raise _bad("prompt", f"{i!r} is no token's id; they are 0 to {speaks.vocabulary - 1}")
    return np.array(prompt, np.int32)


def _requests(asked: Sampled, prompts: list[np.ndarray], context: int, longest: int | None) -> list[Request]:
    """`n` of each prompt. A choice's noise counter is its index, so with a seed its tokens depend on nothing else."""
    seed = asked.seed if asked.seed is not None else secrets.randbits(63)
    requests = []
    for prompt in prompts:
        params = SamplingParams(
            temperature=1.0 if asked.temperature is None else asked.temperature,
            max_new_tokens=_limit(context, len(prompt), longest),
            seed=seed,
            top_k=max(asked.top_k or 0, 0),
            top_p=1.0 if asked.top_p is None else asked.top_p,
            min_p=asked.min_p or 0.0,
            stop=tuple(asked.stop or ()),
        )
        group = next(_numbers)
        for _ in range(asked.n or 1):
            requests.append(Request(next(_numbers), group, prompt, params, noise=len(requests)))
    return requests


def _limit(context: int, prompt: int, wanted: int | None) -> int:
    """Most new tokens after a prompt of so many."""
    room = context - prompt
    if room < max(wanted or 1, 1):
        answer = f"max_tokens {wanted}" if wanted else "an answer"
        raise ApiError(
            400,
            f"a prompt of {prompt} tokens and {answer} are more than a request may have here, {context}",
            "max_tokens" if wanted and room > 0 else None,
            "context_length_exceeded",
        )
    return wanted or room


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """As the encoding has it: without keys that are null, contents as text. It checks the rest itself."""
    message = {key: value for key, value in message.items() if value is not None and value != []}
    for key in message:
        if key not in _KEYS:
            raise _bad(f"{where}.{key}", f"not built; a message has {', '.join(_KEYS)}")
    if message.get("role") not in _ROLES:
        problem = f"{message.get('role')!r} is no role; want one of {', '.join(_ROLES)}"
        raise _bad(f"{where}.role", problem)
    message.pop("name", None)  # of a participant: V4's encoding has no place for it
    if message["role"] == "developer":
        message["role"] = "system"
    if isinstance(parts := message.get("content"), list):
        message["content"] = "\n\n".join(_text(part, f"{where}.content[{i}]") for i, part in enumerate(parts))
    for i, call in enumerate(message.get("tool_calls", ())):
        if isinstance(call, Mapping) and call.get("type", "function") != "function":
            raise _bad(f"{where}.tool_calls[{i}].type", f"{call['type']!r} is not built; want function")
    return message


def _text(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise _bad(where, 'want {"type": "text", "text": TEXT}; the model reads nothing else')
    return part["text"]


def _tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = set()
    for i, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, Mapping):
            raise _bad(f"tools[{i}]", 'want {"type": "function", "function": {"name": ...}}')
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in names:
            problem = f"{name!r}: want a name of its own, of 1 to 64 letters, digits, _ and -"
            raise _bad(f"tools[{i}].function.name", problem)
        names.add(name)
    return tools


def _choice(choice: Any, names: list[str]) -> str:
    """auto, none, required, or "=NAME"."""
    if choice is None or choice in ("auto", "none"):
        return choice or "auto"
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if choice != "required" and name is None:
        wanted = 'auto, none, required or {"type": "function", "function": {"name": NAME}}'
        raise _bad("tool_choice", f"want {wanted}")
    if not names or (name is not None and name not in names):
        raise _bad("tool_choice", f"{name or choice!r}: tools has {', '.join(names) or 'none'}")
    return "required" if name is None else f"={name}"


def _schema(response_format: dict[str, Any] | None) -> Any:
    """The JSON schema that the model is told; None for text."""
    kind = (response_format or {"type": "text"}).get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    given = (response_format or {}).get("json_schema")
    if kind != "json_schema" or not isinstance(given, Mapping) or not isinstance(given.get("schema"), Mapping):
        problem = (
            'want {"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": ...}}'
        )
        raise _bad("response_format", problem)
    if given.get("strict"):
        problem = "not built: the model is told the schema, and nothing constrains what it writes; leave it out"
        raise _bad("response_format.json_schema.strict", problem)
    return given["schema"]


def _declared(messages: list[dict[str, Any]], tools: list[dict[str, Any]], schema: Any) -> list[dict[str, Any]]:
    """The messages with tools and the response format in the first system message."""
    more = ({"tools": tools} if tools else {}) | ({"response_format": schema} if schema is not None else {})
    if not more:
        return messages
    if messages[0]["role"] == "system":
        return [messages[0] | more, *messages[1:]]
    return [{"role": "system", "content": ""} | more, *messages]


def _check_template(template: Template, mode: str, has_tools: bool, has_schema: bool) -> None:
    """ApiError for what another model's own template cannot do."""
    if mode not in template.modes:
        raise _bad("reasoning_effort", f"mode {mode} is not built for this model; it has {', '.join(template.modes)}")
    if has_tools:
        raise _bad("tools", "not built for this model, whose chat template is its own; V4's encoding has them")
    if has_schema:
        raise _bad("response_format", "not built for this model, whose chat template is its own; V4's encoding has it")


def _opening(speaks: Speaker, choice: str, mode: str) -> list[int]:
    """The ids with which a call begins that the model has to make; none where it is free."""
    if choice in ("auto", "none"):
        return []
    if mode != "chat":
        problem = f"a call that the model has to make is built for reasoning_effort none alone, not for mode {mode}"
        raise _bad("tool_choice", problem)
    before, after = BEGIN.split(DSML)
    name = f'{choice[1:]}">\n' if choice[0] == "=" else ""
    texts = [(before, False), (DSML, True), (f"{after}>\n<", False), (DSML, True), (f'invoke name="{name}', False)]
    return tokenize(speaks.tokenizer, [Piece(text, special) for text, special in texts])[0]


def _bad(where: str, problem: str) -> ApiError:
    return ApiError(400, f"{where}: {problem}", where)
