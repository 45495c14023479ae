"""From tokens, as they are sampled, to what a client sees: reasoning, content and tool calls, piece by piece.

Ids -> pieces of text, cut where no character is -> cut at a stop string -> parts of the message. What is held back is
only what later tokens may still change: a character's first bytes, the beginning of a stop string, of a tool block, of
`</think>`. All parts of an answer together are the same however its ids came.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ...model.conversation import read_ids
from ...model.dsml import BEGIN
from ...model.encoding import Encoding
from ...model.tokenizer import DSML, END_THINK, SPECIALS, THINK
from ..speak import Speaker
from .prompts import Job

_MOST_PENDING = 64  # tokens that may be bytes of one character: more are shown as they decode, which bounds the work
_BEFORE, _AFTER = BEGIN.split(DSML)


class Piece(NamedTuple):
    """A special token's text, or ordinary text."""

    text: str
    special: bool = False


class Delta(NamedTuple):
    """A part of the message. `tool_calls` come whole: a list of OpenAI's calls, without ids."""

    kind: Literal["reasoning_content", "content", "tool_calls"]
    value: Any


class Answer:
    """One choice while it grows. `finish` is None until it has ended."""

    def __init__(self, speaks: Speaker, job: Job, stop: Sequence[str]) -> None:
        self._ends, self.ids = speaks.end_ids, list(job.opening)
        is_v4 = isinstance(speaks.encoding, Encoding)
        self._spelled = _Spelled(speaks.tokenizer, SPECIALS if is_v4 else ())
        self._cut = _Cut(stop)
        if job.is_text:
            self._reader: Any = _Text()
        elif is_v4:
            self._reader = _V4(speaks.tokenizer, job.thinks, job.calls)
        else:
            self._reader = _Written(job.thinks)
        self.finish: str | None = None
        self.count = 0  # of tokens that were sampled
        self.problems: list[str] = []  # with tool calls that are left out
        list(self._read(self._spelled.feed(job.opening)))

    def feed(self, ids: np.ndarray, finish: str | None) -> list[Delta]:
        """What new ids add. `finish`: why there are no more (a Trajectory's), or None."""
        new = [int(i) for i in ids]
        self.count += len(new)
        self.ids += new
        ended = finish == "stop" and bool(new) and new[-1] in self._ends
        deltas = list(self._read(self._cut.feed(self._spelled.feed(new[:-1] if ended else new))))
        if self._cut.found:
            finish = "stop"
        elif finish:
            deltas += self._read([*self._cut.feed(self._spelled.end()), *self._cut.end()])
        if finish:
            tail, self.problems = self._reader.end(self.ids)
            deltas += tail
            called = any(delta.kind == "tool_calls" for delta in tail)
            self.finish = "tool_calls" if called and finish == "stop" else finish
        return deltas

    def _read(self, pieces: Iterable[Piece]) -> Iterator[Delta]:
        for piece in pieces:
            yield from self._reader.feed(piece)


class _Spelled:
    """Ids to pieces. `specials`: the tokens that are pieces of their own."""

    def __init__(self, tokenizer: Tokenizer, specials: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._specials = {tokenizer.token_to_id(token): token for token in specials}
        self._before: list[int] = []  # the last ids that were shown: some decoders look at what stands before
        self._pending: list[int] = []

    def feed(self, ids: Iterable[int]) -> Iterator[Piece]:
        for i in ids:
            if (special := self._specials.get(i)) is not None:
                yield from self.end()
                self._before = []
                yield Piece(special, True)
                continue
            self._pending.append(i)
            if (text := self._text())[-1:] != "\N{REPLACEMENT CHARACTER}" or len(self._pending) >= _MOST_PENDING:
                yield from self._show(text)

    def end(self) -> Iterator[Piece]:
        """What is held back, bytes that are no character too."""
        if self._pending:
            yield from self._show(self._text())

    def _show(self, text: str) -> Iterator[Piece]:
        self._before, self._pending = self._pending, []
        if text:
            yield Piece(text)

    def _text(self) -> str:
        before = self._decode(self._before) if self._before else ""
        return self._decode(self._before + self._pending)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class _Cut:
    """Ends the pieces before the first stop string, which may lie across several of them."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self._held = stop, list[Piece]()
        self.found = False

    def feed(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if not self._stop:
                yield piece
            elif not self.found:
                self._held.append(piece)
                yield from self._checked()

    def end(self) -> list[Piece]:
        return [] if self.found else self._held

    def _checked(self) -> Iterator[Piece]:
        text = "".join(piece.text for piece in self._held)
        at = min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=-1)
        self.found = at >= 0
        if not self.found:
            at = len(text) - max(held_back(text, stop) for stop in self._stop)
        while self._held and at > 0:
            piece = self._held.pop(0)
            if len(piece.text) > at:
                self._held.insert(0, Piece(piece.text[at:]))
                piece = Piece(piece.text[:at])  # of a special token, a part is text
            at -= len(piece.text)
            yield piece


def held_back(text: str, wanted: str) -> int:
    """How many of the text's last characters may be the beginning of `wanted`, which is not in it."""
    most = min(len(text), len(wanted) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(wanted[:n])), 0)


class _Text:
    """All is content."""

    def feed(self, piece: Piece) -> Iterator[Delta]:
        yield Delta("content", piece.text)

    def end(self, ids: list[int]) -> tuple[list[Delta], list[str]]:
        return [], []


class _V4:
    """V4's encoding: reasoning up to `</think>`, content up to a tool block, which is read when it is complete."""

    def __init__(self, tokenizer: Tokenizer, thinks: bool, calls: bool) -> None:
        self._tokenizer, self._thinks, self._calls = tokenizer, thinks, calls
        self._take: Callable[[Piece], Iterator[Delta]] = self._reasoning if thinks else self._content
        self._held, self._opened, self._in_block = "", False, False  # _opened: DSML came behind what is held

    def feed(self, piece: Piece) -> Iterator[Delta]:
        yield from self._take(piece)

    def end(self, ids: list[int]) -> tuple[list[Delta], list[str]]:
        """The rest of the content, or the calls; and what is wrong with those that are left out."""
        if not self._in_block:
            return list(self._release()), []
        message, events = read_ids(self._tokenizer, ids, self._thinks)
        calls = message.get("tool_calls")
        problems = [
            f"{event.name}: {event.detail}" for event in events if event.name not in ("no_eos", "special_token")
        ]
        return [Delta("tool_calls", calls)] if calls else [], problems

    def _reasoning(self, piece: Piece) -> Iterator[Delta]:
        if piece == (END_THINK, True):
            self._take = self._content
        else:
            yield Delta("reasoning_content", piece.text)

    def _content(self, piece: Piece) -> Iterator[Delta]:
        if self._opened:
            self._held += piece.text
            name = self._held.removeprefix(_BEFORE + DSML)
            if name.startswith(_AFTER):
                self._take, self._in_block = self._block, True
            elif piece.special:
                yield from self._release()
            elif not _AFTER.startswith(name):
                self._held = _BEFORE + DSML
                yield from self._release()
                yield from self._content(Piece(name))
        elif piece == (DSML, True) and self._held == _BEFORE:
            self._held, self._opened = self._held + DSML, True
        else:
            text = self._held + piece.text
            keep = 0 if piece.special or not self._calls else held_back(text, _BEFORE + DSML)
            self._held = text[len(text) - keep :]
            if shown := text[: len(text) - keep]:
                yield Delta("content", shown)

    def _block(self, piece: Piece) -> Iterator[Delta]:
        yield from ()

    def _release(self) -> Iterator[Delta]:
        held, self._held, self._opened = self._held, "", False
        if held:
            yield Delta("content", held)


class _Written:
    """Another model's template (Template.parse): `</think>` and what stands around it are ordinary text."""

    def __init__(self, thinks: bool) -> None:
        self._strips, self._reasons = thinks, thinks
        self._text, self._opened, self._began = "", False, False  # _opened: what may be `<think>` has gone by

    def feed(self, piece: Piece) -> Iterator[Delta]:
        self._text += piece.text
        if self._reasons:
            reasoning, found, rest = self._text.partition(END_THINK)
            if not found:
                if self._opened or not THINK.startswith(self._text.lstrip()):
                    yield from self._reasoning(held_back(self._text, END_THINK))
                return
            self._text = reasoning
            yield from self._reasoning()
            self._text, self._reasons = rest, False
        yield from self._content()

    def end(self, ids: list[int]) -> tuple[list[Delta], list[str]]:
        return list(self._reasoning()) if self._reasons else [], []

    def _reasoning(self, keep: int = 0) -> Iterator[Delta]:
        """All but the last `keep` characters, and the spaces before them, which may be the last ones."""
        self._text = self._text if self._began else self._text.lstrip()
        if self._text and not self._opened:
            self._opened = True
            self._text = self._text.removeprefix(THINK).lstrip()
        if shown := self._text[: len(self._text) - keep].rstrip():
            self._began, self._text = True, self._text[len(shown) :]
            yield Delta("reasoning_content", shown)

    def _content(self) -> Iterator[Delta]:
        text, self._text = self._text.lstrip("\n") if self._strips else self._text, ""
        if text:
            self._strips = False
            yield Delta("content", text)
