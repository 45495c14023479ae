"""DeepSeek-V4's chat encoding: messages to text and ids, and the model's text back to a message.

V4 ships no template but a pair of functions; this is the same format (paper, Table 3; DeepSeek's
`encoding/` folder), for three modes:

    mode  prompt                                                  the model writes
    chat  BOS system <｜User｜> question <｜Assistant｜> </think>    content EOS
    high  BOS system <｜User｜> question <｜Assistant｜> <think>     reasoning </think> content EOS
    max   as high, with a fixed instruction right after BOS       the same

(without the spaces). The header `<｜Assistant｜>` + think token belongs to the user's turn. In high and max,
the reasoning of turns before the last user message is dropped, and their header closes it at once. Messages
are dicts with `role` (system, user or assistant), `content` and, for an assistant, optionally
`reasoning_content`. Wordings that DeepSeek fixed are fields of `Encoding`; the defaults are our own text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from ..errors import UserError
from .tokenizer import ASSISTANT, BOS, DSML, END_THINK, EOS, THINK, USER, encode_plain

MODES = ("chat", "high", "max")
FILE = "encoding.json"

_ROLES = ("system", "user", "assistant")
_LATER_ROLES = ("tool", "developer", "latest_reminder")
_LATER_KEYS = (
    *("tools", "tool_calls", "tool_call_id", "response_format"),
    *("task", "wo_eos", "mask", "content_blocks"),
)


class _Piece(NamedTuple):
    text: str
    trained: bool = False
    special: bool = False


@dataclass(frozen=True)
class Encoding:
    """The chat encoding with its fixed wordings."""

    max_instruction: str = (
        "Use all the effort you have. Think through every step and try each idea that could work.\n"
        "Check every result in a second way, and answer only when nothing is left in doubt.\n\n"
    )

    @classmethod
    def default(cls) -> "Encoding":
        """The encoding with our own wordings."""
        return cls()

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "Encoding":
        """The encoding with the wordings of a folder's encoding.json. UserError names file and key."""
        file = Path(path) / FILE
        if not file.is_file():
            raise UserError(f"{file}: no such file; Encoding.default().save(folder) writes one")
        try:
            wordings = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise UserError(f"{file}: not JSON: {error}") from error
        known = [field.name for field in fields(cls)]
        if not isinstance(wordings, dict) or sorted(wordings) != sorted(known):
            raise UserError(f"{file}: want one object with the keys {', '.join(known)}")
        for key, value in wordings.items():
            if not isinstance(value, str):
                raise UserError(f"{file}: {key}: want a string, got {value!r}")
        return cls(**wordings)

    def save(self, path: str | Path) -> None:
        """Write the wordings to encoding.json in a checkpoint's folder."""
        text = json.dumps(asdict(self), ensure_ascii=False, indent=2) + "\n"
        (Path(path) / FILE).write_text(text, "utf-8")

    def encode(self, messages: Sequence[Mapping[str, Any]], mode: str = "chat") -> str:
        """The text of a conversation. After a last user message it ends with the header of the model's turn.

        ValueError names the message and what is wrong with it.
        """
        return "".join(piece.text for piece in self._pieces(messages, mode))

    def spans(self, messages: Sequence[Mapping[str, Any]], mode: str = "chat") -> list[tuple[str, bool]]:
        """The text of `encode` in spans of (text, trained).

        Trained is what the model writes: reasoning, `</think>`, content and EOS, never a header. Our choice:
        in high and max, a turn before the last user message is context only, for without its reasoning it
        stands as the model never wrote it.
        """
        spans: list[tuple[str, bool]] = []
        for text, trained, _ in self._pieces(messages, mode):
            if spans and spans[-1][1] == trained:
                spans[-1] = (spans[-1][0] + text, trained)
            else:
                spans.append((text, trained))
        return spans

    def ids(
        self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], mode: str = "chat"
    ) -> tuple[list[int], list[bool]]:
        """The token ids of a conversation, and for each whether it is trained.

        Special tokens come from the format alone: their strings inside a message are spelled as ordinary
        text. The tokenizer must have passed `check_specials`, as one from `tokenizer.load` has.
        """
        ids: list[int] = []
        trained: list[bool] = []
        for piece in self._pieces(messages, mode):
            new = _special_id(tokenizer, piece.text) if piece.special else encode_plain(tokenizer, piece.text)
            ids += new
            trained += [piece.trained] * len(new)
        return ids, trained

    def prompt_ids(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], mode: str = "chat") -> list[int]:
        """The token ids up to where the model begins to write. ValueError if no user message comes last."""
        if not messages or messages[-1].get("role") != "user":
            raise ValueError("a prompt must end with a user message")
        return self.ids(tokenizer, messages, mode)[0]

    def parse(self, text: str, mode: str = "chat") -> dict[str, str]:
        """What the model wrote after the header, with its EOS: a message {role, content, reasoning_content}.

        Strict: ValueError says what is wrong; nothing is repaired.
        """
        _check_mode(mode)
        body, end, rest = text.partition(EOS)
        if not end:
            raise ValueError(f"the message does not end with {EOS}")
        if rest:
            raise ValueError(f"{len(rest)} characters follow {EOS}")
        reasoning, content = "", body
        if mode != "chat":
            reasoning, end, content = body.partition(END_THINK)
            if not end:
                raise ValueError(f"the reasoning does not end with {END_THINK}")
        for name, part in (("reasoning", reasoning), ("content", content)):
            if DSML in part:
                raise ValueError(f"not built yet: tool calls ({DSML} in the {name})")
            for special in (BOS, THINK, END_THINK):
                if special in part:
                    raise ValueError(f"the {name} holds the special token {special}")
        return {"role": "assistant", "content": content, "reasoning_content": reasoning}

    def _pieces(self, messages: Sequence[Mapping[str, Any]], mode: str) -> list[_Piece]:
        _check_mode(mode)
        turns = _merge(messages)
        last_user = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
        pieces = [_Piece(BOS, special=True)]
        text = self.max_instruction if mode == "max" else ""
        for i, turn in enumerate(turns):
            thinks = mode != "chat" and i >= last_user
            if turn["role"] == "system":
                text += turn["content"]
                continue
            pieces.append(_Piece(text))
            text = ""
            if turn["role"] == "user":
                pieces += [_Piece(USER, special=True), _Piece(turn["content"])]
                if i + 1 == len(turns) or turns[i + 1]["role"] == "assistant":
                    think = THINK if thinks else END_THINK
                    pieces += [_Piece(ASSISTANT, special=True), _Piece(think, special=True)]
            else:
                trained = thinks or mode == "chat"
                if thinks:
                    reasoning = turn.get("reasoning_content") or ""
                    pieces += [_Piece(reasoning, trained), _Piece(END_THINK, trained, special=True)]
                pieces += [_Piece(turn["content"], trained), _Piece(EOS, trained, special=True)]
        pieces.append(_Piece(text))
        return [piece for piece in pieces if piece.text]


def _special_id(tokenizer: Tokenizer, special: str) -> list[int]:
    token = tokenizer.token_to_id(special)
    if token is None:
        raise ValueError(f"the tokenizer has no token {special}")
    return [token]


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; want one of {', '.join(MODES)}")


def _merge(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Check the messages; user messages in a row become one, joined by a blank line."""
    if not messages:
        raise ValueError("messages is empty; want at least one message")
    turns: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        _check_message(message, f"messages[{i}]")
        if message["role"] == "user" and turns and turns[-1]["role"] == "user":
            turns[-1]["content"] += "\n\n" + message["content"]
        else:
            turns.append(dict(message))
    return turns


def _check_message(message: Mapping[str, Any], where: str) -> None:
    role = message.get("role")
    if role in _LATER_ROLES:
        raise ValueError(f"{where}: not built yet: role {role!r}")
    if role not in _ROLES:
        raise ValueError(f"{where}: unknown role {role!r}; want one of {', '.join(_ROLES)}")
    if not isinstance(message.get("content"), str):
        raise ValueError(f"{where}: content must be a string, got {type(message.get('content')).__name__}")
    for key, value in message.items():
        if key in ("role", "content") or value is None:  # a table's row holds None for a key it does not have
            continue
        if key in _LATER_KEYS:
            raise ValueError(f"{where}: not built yet: key {key!r}")
        if key != "reasoning_content" or role != "assistant":
            raise ValueError(f"{where}: unknown key {key!r} for role {role!r}")
        if not isinstance(value, str):
            raise ValueError(f"{where}: reasoning_content must be a string, got {type(value).__name__}")
