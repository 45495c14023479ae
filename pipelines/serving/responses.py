"""What clients get, in OpenAI's shapes: whole answers, and chunks of a stream.

Beside OpenAI's keys a choice may have `problems`: what is wrong with the tool calls that the model wrote and that are
left out. Log-probs are those of every token that was sampled, reasoning, tool calls and the end token too, under the
distribution that it was drawn from (temperature, top_p and the like applied).
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .answers import Answer, Delta
from .prompts import Job


@dataclass
class Response:
    """One response on its way. `kind`: chat.completion or text_completion; `logprobs`: whether they are asked for."""

    kind: str
    model: str
    tokenizer: Tokenizer
    job: Job
    logprobs: bool
    id: str = field(init=False)
    created: int = field(init=False)

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.is_chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())

    @property
    def is_chat(self) -> bool:
        return self.kind == "chat.completion"

    def whole(self, answers: Sequence[Answer], parts: Sequence[list[Delta]], rows: Sequence["Rows"]) -> dict[str, Any]:
        """The answer without a stream: of each choice its parts and its tokens."""
        choices = [
            self._choice(
                i, {"message": self._message(deltas)} if self.is_chat else {"text": _joined(deltas, "content")}, row
            )
            | _ending(answer)
            for i, (answer, deltas, row) in enumerate(zip(answers, parts, rows, strict=True))
        ]
        return self._head(self.kind, choices) | {"usage": self.usage(answers)}

    def first(self, index: int) -> dict[str, Any]:
        """A chat's first chunk of a choice: the role."""
        return self._chunk([self._choice(index, {"delta": {"role": "assistant", "content": ""}}, None)])

    def chunk(self, index: int, answer: Answer, deltas: list[Delta], row: "Rows") -> dict[str, Any] | None:
        """What an update adds to a choice; None where that is nothing yet. Texts of one kind are joined."""
        if not deltas and not answer.finish and not (self.logprobs and row.tokens):
            return None
        body = {"delta": self._delta(deltas)} if self.is_chat else {"text": _joined(deltas, "content")}
        return self._chunk([self._choice(index, body, row) | _ending(answer)])

    def last(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """A stream's chunk with the usage."""
        return self._chunk([]) | {"usage": self.usage(answers)}

    def usage(self, answers: Sequence[Answer]) -> dict[str, int]:
        asked, sampled = self.job.prompt_tokens, sum(answer.count for answer in answers)
        return {"prompt_tokens": asked, "completion_tokens": sampled, "total_tokens": asked + sampled}

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self.is_chat else self.kind, choices)

    def _choice(self, index: int, body: dict[str, Any], row: "Rows | None") -> dict[str, Any]:
        logprobs = row.shown(self.tokenizer, self.is_chat) if self.logprobs and row is not None else None
        return {"index": index} | body | {"logprobs": logprobs, "finish_reason": None}

    def _delta(self, deltas: list[Delta]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for kind in ("reasoning_content", "content"):
            if text := _joined(deltas, kind):
                found[kind] = text
        calls = _calls(deltas)
        return found | ({"tool_calls": [{"index": i} | call for i, call in enumerate(calls)]} if calls else {})

    def _message(self, deltas: list[Delta]) -> dict[str, Any]:
        calls, content = _calls(deltas), _joined(deltas, "content")
        message = {"role": "assistant", "content": None if calls and not content else content, "refusal": None}
        if reasoning := _joined(deltas, "reasoning_content"):
            message["reasoning_content"] = reasoning
        return message | ({"tool_calls": calls} if calls else {})


@dataclass
class Rows:
    """Sampled tokens and their log-probs."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def add(self, ids: np.ndarray, logprobs: np.ndarray) -> "Rows":
        self.tokens += ids.tolist()
        self.logprobs += logprobs.tolist()
        return self

    def shown(self, tokenizer: Tokenizer, is_chat: bool) -> dict[str, Any]:
        texts = [tokenizer.decode([i], skip_special_tokens=False) for i in self.tokens]
        if not is_chat:
            return {"tokens": texts, "token_logprobs": self.logprobs, "top_logprobs": None}
        rows = zip(texts, self.logprobs, strict=True)
        return {"content": [{"token": t, "logprob": p, "bytes": _bytes(t), "top_logprobs": []} for t, p in rows]}


def _bytes(text: str) -> list[int] | None:
    """None for a token that is a part of a character: its text does not say which."""
    return None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())


def _joined(deltas: list[Delta], kind: str) -> str:
    return "".join(delta.value for delta in deltas if delta.kind == kind)


def _calls(deltas: list[Delta]) -> list[dict[str, Any]]:
    calls = [call for delta in deltas if delta.kind == "tool_calls" for call in delta.value]
    return [{"id": f"call_{secrets.token_hex(12)}"} | call for call in calls]


def _ending(answer: Answer) -> dict[str, Any]:
    return {"finish_reason": answer.finish} | ({"problems": answer.problems} if answer.problems else {})
