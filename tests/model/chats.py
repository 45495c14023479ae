"""Messages for the tests of the chat encoding, and hypothesis strategies of whole conversations."""

import json
from typing import Any

from hypothesis import strategies as st

from amalgam.model import tokenizer
from amalgam.model.encoding import Encoding
from amalgam.model.tokenizer import SPECIALS

TINY = tokenizer.build(["Question", "<answer>", "</answer>"])
# Short wordings, so that expected texts can be read.
ENCODING = Encoding(
    max_instruction="Try hard.\n\n",
    tools="Tools: <{dsml_token}>\n{tool_schemas}\n",
    response_format="Schema: {schema}",
)
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def user(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: str | None, reasoning: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, **more}


def result(content: Any, call_id: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def call(name: str, arguments: Any, call_id: str | None = None) -> dict[str, Any]:
    text = json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments
    made = {"type": "function", "function": {"name": name, "arguments": text}}
    return {**made, "id": call_id} if call_id else made


PLAIN = st.text(max_size=30).filter(lambda text: not any(special in text for special in SPECIALS))
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=3),
    max_leaves=5,
)
_NAMES = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
ARGUMENTS = st.dictionaries(_NAMES, _JSON, max_size=3)
CALLS = st.lists(st.builds(call, _NAMES, ARGUMENTS), max_size=3)


@st.composite
def answers(draw: st.DrawFn, mode: str, text: st.SearchStrategy[str] = PLAIN) -> dict[str, Any]:
    """What a model may write in a mode, as `parse` gives it back."""
    message = assistant(draw(text), draw(text) if mode != "chat" else "")
    calls = draw(CALLS)
    return {**message, "tool_calls": calls} if calls else message


@st.composite
def conversations(draw: st.DrawFn, mode: str, text: st.SearchStrategy[str] = PLAIN) -> list[dict[str, Any]]:
    """Well-formed messages: system first or not, then turns of the user or of tools and of the model."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(text), "tools": [TOOL] * draw(st.integers(0, 2))})
    calls: list[dict[str, Any]] = []
    for turn in range(draw(st.integers(1, 4))):
        if calls and draw(st.booleans()):
            messages += draw(st.permutations([result(draw(text), each["id"]) for each in calls]))
        else:
            messages += draw(st.lists(st.builds(user, text), min_size=1, max_size=2))
        answer = draw(answers(mode, text))
        calls = [{**each, "id": f"{turn}.{i}"} for i, each in enumerate(answer.get("tool_calls", []))]
        messages.append({**answer, "tool_calls": calls} if calls else answer)
    return messages
