"""Token-in, token-out: a conversation with the model that grows by appending ids.

What the model wrote is kept as the ids that it wrote and never tokenized again, for another split of the same text
would have other log-probs than those recorded at sampling. What others add is rendered by the encoding's rules, and
only the new text is tokenized.

One rule does not append. Without tools, high and max drop the reasoning of earlier turns when a user, a developer or a
tool answers. `add` then raises HistoryRewritten and changes nothing, and `restart` begins a new sequence (our choice:
a rollout that is trained on stands as it was sampled). With `keep_reasoning`, everything appends.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from .completion import Event, read_tolerant
from .encoding import Encoding, Piece, check_prompt, tokenize
from .tokenizer import END_THINK, EOS, SPECIALS, THINK
from .wordings import split_specials

_HIDDEN = "\U0010fffd"  # of a private area: put into a special token's string, it is none


class HistoryRewritten(ValueError):
    """The rules would change what stands before the new messages; the conversation is as it was."""


class _Written(NamedTuple):
    ids: list[int]
    thought: bool  # whether its header opened the reasoning


class Conversation:
    """A conversation of messages and of token ids; the model's turn is open until `write`, and after each `add`.

    messages   all messages so far, the model's as they were read from its ids
    ids        all token ids so far: the prompt of the next completion while the model's turn is open
    trained    for each id, whether the model wrote it here

    `messages` must end where the model's turn comes next, as for Encoding.prompt_ids. ValueError names the message
    that is wrong.
    """

    def __init__(
        self,
        encoding: Encoding,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        mode: str = "chat",
        *,
        keep_reasoning: bool = False,
    ) -> None:
        self.encoding, self.tokenizer = encoding, tokenizer
        self.mode, self.keep_reasoning = mode, keep_reasoning
        self.messages: list[Mapping[str, Any]] = list(messages)
        self._pieces = self._render(self.messages)
        check_prompt(messages)
        self.ids = tokenize(tokenizer, self._pieces)[0]
        self.trained = [False] * len(self.ids)
        self._open = True
        self._written: dict[int, _Written] = {}  # by the message's place

    def write(self, ids: Iterable[int]) -> list[Event]:
        """Append what the model wrote, EOS included where it wrote one; returns what is wrong with it.

        The message that its text makes comes last in `messages`: as read by Encoding.parse_tolerant, its tool
        calls with the ids "call_0", "call_1" and so on, counted over the conversation, and `wo_eos` where EOS is
        missing. A special token whose string it spelled with other tokens is text here as anywhere (our choice).
        ValueError if the model's turn is not open.
        """
        if not self._open:
            raise ValueError("the model's turn is not open; add messages first")
        ids = [int(i) for i in ids]
        written = _Written(ids, self._pieces[-1] == Piece(THINK, special=True))
        message, events = self._read(written)
        known = sum(len(self.messages[place].get("tool_calls") or ()) for place in self._written)
        for i, call in enumerate(message.get("tool_calls", ()), start=known):
            call["id"] = f"call_{i}"
        if any(event.name == "no_eos" for event in events):
            message["wo_eos"] = True
        self._written[len(self.messages)] = written
        self.messages.append(message)
        self._pieces = self._render(self.messages)
        self.ids += ids
        self.trained += [True] * len(ids)
        self._open = False
        return events

    def add(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Append messages after the model's, up to where its turn comes again; returns their ids.

        ValueError names a wrong message by its place in the whole conversation. HistoryRewritten where the rules
        would change what stands before.
        """
        everything, pieces = self._extended(messages)
        old = len(self._pieces)
        if [piece[:2] for piece in pieces[:old]] != [piece[:2] for piece in self._pieces]:
            raise HistoryRewritten(
                f"mode {self.mode!r} drops or restores the reasoning of earlier turns here; restart() begins a new "
                "sequence, and tools declared from the first or keep_reasoning keep it"
            )
        new = tokenize(self.tokenizer, pieces[old:])[0]
        self.messages, self._pieces, self._open = everything, pieces, True
        self.ids += new
        self.trained += [False] * len(new)
        return new

    def restart(self, messages: Sequence[Mapping[str, Any]], mode: str | None = None) -> "Conversation":
        """A new conversation that goes on with messages, where `add` cannot: earlier turns as the rules have them.

        `mode`: another one from here on. The model's own ids stay, less those of a dropped reasoning. None of them
        is trained here: they were in the sequence that this one follows.
        """
        new = copy.copy(self)
        new.mode = mode or self.mode
        new.messages, new._pieces = new._extended(messages)
        new._written, new._open = dict(self._written), True
        new.ids = []
        for place, group in groupby(new._pieces, key=lambda piece: piece.turn):
            pieces = list(group)
            written = self._written.get(-1 if place is None else place)
            new.ids += tokenize(self.tokenizer, pieces)[0] if written is None else self._kept(written, pieces)
        new.trained = [False] * len(new.ids)
        return new

    def _read(self, written: _Written) -> tuple[dict[str, Any], list[Event]]:
        return read_ids(self.tokenizer, written.ids, written.thought)

    def _kept(self, written: _Written, pieces: Sequence[Piece]) -> list[int]:
        """The model's ids of a turn, without its reasoning if `pieces`, its rendering, has none."""
        end_think, eos = (self.tokenizer.token_to_id(token) for token in (END_THINK, EOS))
        ids = written.ids
        reasons = any(piece[:2] == (END_THINK, True) for piece in pieces)
        if reasons and not written.thought:  # it answered at once, and stands after <think> now
            return tokenize(self.tokenizer, [Piece(END_THINK, special=True)])[0] + ids
        if reasons or not written.thought:
            return ids
        if end_think in ids:
            return ids[ids.index(end_think) + 1 :]
        return ids[-1:] if ids[-1:] == [eos] else []  # it never came to an answer

    def _extended(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Piece]]:
        if self._open:
            raise ValueError("the model's turn is open; write what it wrote first")
        everything = [*self.messages, *messages]
        pieces = self._render(everything)
        check_prompt(everything)
        return everything, pieces

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> list[Piece]:
        return self.encoding.pieces(messages, self.mode, keep_reasoning=self.keep_reasoning)


def read_ids(tokenizer: Tokenizer, ids: Sequence[int], thinks: bool) -> tuple[dict[str, Any], list[Event]]:
    """`read_tolerant` of what the model wrote, in which a special token's string that others spell is text."""
    specials = {tokenizer.token_to_id(token) for token in SPECIALS}
    runs = groupby(ids, key=specials.__contains__)
    texts = [(special, tokenizer.decode(list(run), skip_special_tokens=False)) for special, run in runs]
    hidden = "".join(text if special else _hide(text) for special, text in texts)
    message, events = read_tolerant(hidden, thinks)
    return _shown(message) if hidden != "".join(text for _, text in texts) else message, events


def _hide(text: str) -> str:
    return "".join(part[0] + _HIDDEN + part[1:] if special else part for part, special in split_specials(text))


def _shown(value: Any) -> Any:
    """What `_hide` hid, back in every string of a message."""
    if isinstance(value, dict):
        return {key: _shown(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_shown(each) for each in value]
    for special in SPECIALS:
        value = value.replace(_hide(special), special)
    return value
