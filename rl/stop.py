"""The text of a response as it grows, and the first of its stop strings to be found in it."""

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a character's first bytes decode to, until the others come
_MOST_PENDING = 8  # tokens: what is no character by then never will be one (UTF-8 has 4 bytes)


class StopText:
    """Detokenises token by token; `tokenizer` is a `tokenizers.Tokenizer`, `stops` are texts, none of them empty.

    A stop string may lie across tokens, and begin or end inside one. A token's text can depend on the one before it
    (a word's space), so each is decoded behind that.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        self._tokenizer, self._stops, self._longest = tokenizer, tuple(stops), max(map(len, stops))
        self._ids: list[int] = []  # from the last settled token but one on
        self._settled = 0  # of these
        self._text = ""

    def add(self, token: int) -> str | None:
        """The text before the first stop string, if one is complete with this token."""
        self._ids.append(token)
        before, after = self._decode(self._ids[: self._settled]), self._decode(self._ids)
        new, start = after[len(before) :], max(len(self._text) - self._longest + 1, 0)
        shown = self._text[start:] + new.rstrip(_UNFINISHED)
        found = [at for at in (shown.find(stop) for stop in self._stops) if at >= 0]
        if found:
            return self._text[:start] + shown[: min(found)]
        if not new.endswith(_UNFINISHED) or len(self._ids) - self._settled >= _MOST_PENDING:
            self._text += new
            self._ids, self._settled = self._ids[self._settled :], len(self._ids) - self._settled
        return None

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)
