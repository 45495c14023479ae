"""DeepSeek-V4's chat encoding: messages to text and ids, and the model's text back to a message.

V4 ships no template but a pair of functions; this is the same format (paper, Tables 3 and 4; DeepSeek's
`encoding/` folder), for three modes:

    mode  prompt                                                  the model writes
    chat  BOS system <｜User｜> question <｜Assistant｜> </think>    content EOS
    high  BOS system <｜User｜> question <｜Assistant｜> <think>     reasoning </think> content EOS
    max   as high, with a fixed instruction right after BOS       the same

(without the spaces; tool calls, in DSML, stand between content and EOS). Messages are dicts:

    role             content                                        other keys
    system           the text, none, or ""                          tools, response_format
    developer        the text; stands as a user's                   tools, response_format
    user             the text
    assistant        the text, none, or ""                          reasoning_content, tool_calls, wo_eos, mask
    tool             a text, or a list of blocks {type, text}       tool_call_id
    latest_reminder  the text (a date, a place)
    any                                                             task (a quick instruction)

Rules that are easily missed:

- The header `<｜Assistant｜>` + think token belongs to the turn before the model's. A user's turn has none where
  a message follows that is neither assistant nor latest_reminder.
- Without tools, high and max drop the reasoning of the turns before the last user or developer turn, and tool
  results are user turns; developer messages before it go too. If any message declares tools, everything stays.
- `task` asks a question beside the conversation, whose answer has no reasoning: `action` stands in the header,
  the others in its place; `title` belongs on an assistant message, and the next one is the title.
- `wo_eos` leaves EOS out. `mask` is 1 for an assistant message that is context only (DeepSeek's renderer does
  not read it; that it is a loss mask is our reading).
- Where DeepSeek's code would fail, and for values that it would print as Python, ValueError names the message.

Wordings that DeepSeek fixed are fields of `Encoding`; the defaults are our own text.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from . import wordings
from .completion import Event, read_strict, read_tolerant
from .dsml import render_calls, to_json
from .messages import Message, Turn, check, last_asked, merge, sort_results, without_old_developers
from .tokenizer import ASSISTANT, BOS, END_THINK, EOS, REMINDER, THINK, USER, encode_plain
from .wordings import FILE

MODES = ("chat", "high", "max")


class Piece(NamedTuple):
    """A special token, or all the text up to the next one. `turn`: the place of the assistant message it is of."""

    text: str
    special: bool = False
    trained: bool = False
    turn: int | None = None


@dataclass(frozen=True)
class Encoding:
    """The chat encoding with its fixed wordings.

    In all methods, `mode` is chat, high or max. `context` is messages whose text stands before and is not
    repeated: they have their part in what the rules decide. `keep_reasoning` drops nothing.
    """

    max_instruction: str = wordings.MAX_INSTRUCTION
    tools: str = wordings.TOOLS
    response_format: str = wordings.RESPONSE_FORMAT

    @classmethod
    def default(cls) -> "Encoding":
        """The encoding with our own wordings."""
        return cls()

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "Encoding":
        """The encoding with the wordings of a checkpoint's folder. UserError names file and key.

        They are DeepSeek's, where the folder holds its `encoding/encoding_dsv4.py`, whose string constants are
        read and whose code is not run; else those of encoding.json.
        """
        return cls(**wordings.read(Path(path)))

    def save(self, path: str | Path) -> None:
        """Write the wordings to encoding.json in a checkpoint's folder."""
        text = json.dumps(asdict(self), ensure_ascii=False, indent=2) + "\n"
        (Path(path) / FILE).write_text(text, "utf-8")

    def encode(
        self,
        messages: Sequence[Message],
        mode: str = "chat",
        *,
        context: Sequence[Message] = (),
        keep_reasoning: bool = False,
    ) -> str:
        """The text of a conversation. After a last user message it ends with the header of the model's turn.

        ValueError names the message and what is wrong with it.
        """
        return "".join(
            piece.text for piece in self.pieces(messages, mode, context=context, keep_reasoning=keep_reasoning)
        )

    def spans(
        self,
        messages: Sequence[Message],
        mode: str = "chat",
        *,
        context: Sequence[Message] = (),
        keep_reasoning: bool = False,
    ) -> list[tuple[str, bool]]:
        """The text of `encode` in spans of (text, trained).

        Trained is what the model writes: reasoning, `</think>`, content, calls and EOS, never a header, and
        nothing of a message with `mask`. Our choice: a turn that lost its reasoning is context only, for it
        stands as the model never wrote it. ValueError for a trained message that no header opens.
        """
        pieces = self.pieces(messages, mode, context=context, keep_reasoning=keep_reasoning)
        _check_opened(pieces)
        spans: list[tuple[str, bool]] = []
        for piece in pieces:
            if spans and spans[-1][1] == piece.trained:
                spans[-1] = (spans[-1][0] + piece.text, piece.trained)
            else:
                spans.append((piece.text, piece.trained))
        return spans

    def ids(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        mode: str = "chat",
        *,
        context: Sequence[Message] = (),
        keep_reasoning: bool = False,
    ) -> tuple[list[int], list[bool]]:
        """The token ids of a conversation, and for each whether it is trained (see `spans`).

        Special tokens come from the format alone: their strings inside a message are spelled as ordinary
        text. The tokenizer must have passed `check_specials`, as one from `tokenizer.load` has.
        """
        pieces = self.pieces(messages, mode, context=context, keep_reasoning=keep_reasoning)
        _check_opened(pieces)
        return tokenize(tokenizer, pieces)

    def prompt_ids(
        self, tokenizer: Tokenizer, messages: Sequence[Message], mode: str = "chat", *, keep_reasoning: bool = False
    ) -> list[int]:
        """The token ids up to where the model begins to write. ValueError if its turn does not come next."""
        pieces = self.pieces(messages, mode, keep_reasoning=keep_reasoning)
        check_prompt(messages)
        return tokenize(tokenizer, pieces)[0]

    def parse(self, text: str, mode: str = "chat") -> dict[str, Any]:
        """What the model wrote after the header, with its EOS, as a message.

        {role, content, reasoning_content} and, if it called any, tool_calls: a list of {type, function: {name,
        arguments}}, arguments as JSON text. Strict: ValueError says what is wrong; nothing is repaired.
        """
        _check_mode(mode)
        return read_strict(text, mode != "chat")

    def parse_tolerant(self, text: str, mode: str = "chat") -> tuple[dict[str, Any], list[Event]]:
        """The message of `parse` as far as it can be read, and what is wrong with the text (see completion.EVENTS).

        For RL: it never raises for a text, and never guesses; a call with anything wrong in it is left out.
        """
        _check_mode(mode)
        return read_tolerant(text, mode != "chat")

    def pieces(
        self,
        messages: Sequence[Message],
        mode: str = "chat",
        *,
        context: Sequence[Message] = (),
        keep_reasoning: bool = False,
    ) -> list[Piece]:
        """The text of a conversation, cut at special tokens and at where training begins and ends."""
        _check_mode(mode)
        if not messages:
            raise ValueError("messages is empty; want at least one message")
        check(context, "context")
        check(messages)
        before = merge(context)
        turns = before + merge(messages)
        sort_results(turns)
        drops = mode != "chat" and not keep_reasoning and not any(turn.declares_tools for turn in turns)
        if drops:
            before, turns = without_old_developers(before), without_old_developers(turns)
        writer = _Writer(self, mode, turns, last_asked(turns) if drops else -1)
        if not context:
            writer.special(BOS)
        for place in range(len(before), len(turns)):
            writer.turn(place)
        return writer.pieces


class _Writer:
    """Renders turns one by one. `last`: reasoning before this place is dropped, -1 for none."""

    def __init__(self, encoding: Encoding, mode: str, turns: list[Turn], last: int) -> None:
        self.encoding, self.turns, self.last = encoding, turns, last
        self.thinks, self.max = mode != "chat", mode == "max"
        self.pieces: list[Piece] = []

    def special(self, token: str, trained: bool = False, turn: int | None = None) -> None:
        self.pieces.append(Piece(token, True, trained, turn))

    def spans(self, spans: Iterable[tuple[str, bool]], trained: bool = False, turn: int | None = None) -> None:
        for text, special in spans:
            old = self.pieces[-1] if self.pieces else Piece("", True)
            if not special and not old.special and (old.trained, old.turn) == (trained, turn):
                self.pieces[-1] = old._replace(text=old.text + text)
            elif text:
                self.pieces.append(Piece(text, special, trained, turn))

    def turn(self, place: int) -> None:
        turn = self.turns[place]
        if self.max and place == 0:
            self.spans(wordings.split_specials(self.encoding.max_instruction))
        if turn.role == "assistant":
            self._assistant(place, turn)
        else:
            self._other(turn)
        if place + 1 == len(self.turns) or self.turns[place + 1].role in ("assistant", "latest_reminder"):
            self._header(place, turn)

    def _header(self, place: int, turn: Turn) -> None:
        """What opens the model's turn: `<｜Assistant｜>` and a think token, or the token of a task."""
        if turn.task is None and turn.asks:
            self.special(ASSISTANT)
            self.special(THINK if self.thinks and place >= self.last else END_THINK)
        elif turn.task == "action":
            self.special(ASSISTANT)
            self.special(THINK if self.thinks else END_THINK)
        if turn.task is not None:
            self.special(f"<｜{turn.task}｜>")

    def _assistant(self, place: int, turn: Turn) -> None:
        message = turn.message
        answers_task = place > 0 and self.turns[place - 1].task is not None
        reasons = self.thinks and not answers_task and place > self.last
        intact = reasons or answers_task or not self.thinks
        trained = intact and not message.get("mask")
        if reasons:
            self.spans([(message.get("reasoning_content") or "", False)], trained, turn.index)
            self.special(END_THINK, trained, turn.index)
        self.spans([(message.get("content") or "", False)], trained, turn.index)
        if message.get("tool_calls"):
            self.spans(render_calls(message["tool_calls"]), trained, turn.index)
        if not message.get("wo_eos"):
            self.special(EOS, trained, turn.index)

    def _other(self, turn: Turn) -> None:
        content = turn.message.get("content")
        if turn.role == "user":
            self.special(USER)
            parts = [f"<tool_result>{part.text}</tool_result>" if part.is_result else part.text for part in turn.parts]
            self.spans([("\n\n".join(parts), False)])
        elif turn.role == "latest_reminder":
            self.special(REMINDER)
            self.spans([(str(content), False)])  # "None" without content, as in DeepSeek's code
        else:
            if turn.role == "developer":
                self.special(USER)
            self.spans([(content or "", False)])
            self._wordings(turn.message)

    def _wordings(self, message: Message) -> None:
        if message.get("tools"):
            schemas = "\n".join(to_json(tool["function"]) for tool in message["tools"])
            self.spans([("\n\n", False), *wordings.fill(self.encoding.tools, {"tool_schemas": schemas})])
        if message.get("response_format"):
            schema = to_json(message["response_format"])
            self.spans([("\n\n", False), *wordings.fill(self.encoding.response_format, {"schema": schema})])


def tokenize(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> tuple[list[int], list[bool]]:
    """The token ids of pieces, and for each whether it is trained."""
    ids: list[int] = []
    trained: list[bool] = []
    for piece in pieces:
        new = _special_id(tokenizer, piece.text) if piece.special else encode_plain(tokenizer, piece.text)
        ids += new
        trained += [piece.trained] * len(new)
    return ids, trained


def _special_id(tokenizer: Tokenizer, special: str) -> list[int]:
    token = tokenizer.token_to_id(special)
    if token is None:
        raise ValueError(f"the tokenizer has no token {special}")
    return [token]


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; want one of {', '.join(MODES)}")


def check_prompt(messages: Sequence[Message]) -> None:
    """ValueError unless the model's turn comes after these checked messages."""
    if messages[-1]["role"] not in ("user", "tool", "developer") and messages[-1].get("task") is None:
        raise ValueError(
            f"messages[{len(messages) - 1}]: a prompt must end with a user message, a tool's result, a developer's "
            f"message or one with a task, not with role {messages[-1]['role']!r}"
        )


def _check_opened(pieces: Sequence[Piece]) -> None:
    """ValueError unless each trained turn stands right after a header, which ends with a special token."""
    for before, piece in zip(pieces, pieces[1:], strict=False):
        begins = piece.trained and piece.turn != before.turn
        if begins and not (before.special and before.turn is None and before.text not in (BOS, REMINDER, USER)):
            raise ValueError(
                f"messages[{piece.turn}]: an assistant message, but none before it opens the model's turn; "
                "put a user message before it, or set its mask to 1"
            )
