"""A request on its way through the engine: its tokens, and what was decided as they were drawn and fed."""

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .plan import Entry
from .stop import StopText
from .trajectory import Finish, Past, Request, Trajectory

_FEW = 128  # rows: more than these do not keep the steps' arrays, which hold those of other requests too


class Decisions(NamedTuple):
    """Of n tokens, in order."""

    experts: np.ndarray  # int16 [n, L, k]
    picks: np.ndarray | None = None  # int32 [n, C, K]

    def rows(self, which: Any) -> "Decisions":
        return Decisions(self.experts[which], None if self.picks is None else self.picks[which])


class Rows:
    """What was decided for each token fed, by position from `first` on. What is there stays: the first decision counts,
    not what is computed when the token is prefilled again."""

    def __init__(self, first: int):
        self.first, self.count = first, 0
        self._settled: list[Decisions] = []
        self._new: list[tuple[Decisions, int, int]] = []

    def add(self, start: int, decided: Decisions, low: int, high: int) -> int:
        """Rows `low` ... `high` - 1 of `decided` are of the tokens from `start` on; those that are there are left out.
        Returns the first that was not (`high`: none)."""
        missing = self.first + self.count - start
        if missing < 0:
            raise ValueError(f"rows from {start} on, but there are {self.count} from {self.first} on")
        low = min(low + missing, high)
        if low < high:
            self._new.append((decided, low, high))
            self.count += high - low
            if len(self._new) >= _FEW:
                self._settle()
        return low

    def parts(self) -> list[Decisions]:
        self._settle()
        return self._settled

    def all(self) -> Decisions:
        parts = self.parts()
        picks = [part.picks for part in parts if part.picks is not None]
        experts = np.concatenate([part.experts for part in parts]) if parts else np.zeros((0, 0, 0), np.int16)
        return Decisions(experts, np.concatenate(picks) if picks else None)

    def _settle(self) -> None:
        if self._new:
            parts = [decided.rows(slice(low, high)) for decided, low, high in self._new]
            picks = [part.picks for part in parts if part.picks is not None]
            self._settled.append(
                Decisions(np.concatenate([part.experts for part in parts]), np.concatenate(picks) if picks else None)
            )
            self._new = []


class Prompt:
    """A group's prompt, and what was decided for its tokens, once for all members."""

    def __init__(self, ids: np.ndarray):
        self.ids, self.rows = ids, Rows(0)


class Response:
    """`ends`: tokens that end it; `picks`: whether these are written down. `error` is set when it fails."""

    def __init__(
        self,
        request: Request,
        entry: Entry,
        prompt: Prompt,
        ends: frozenset[int],
        stop: StopText | None = None,
        picks: bool = False,
    ):
        past, first = request.past, len(request.prompt_ids)
        self.request, self.entry, self.prompt = request, entry, prompt
        self.finish: Finish | None = None
        self.trajectory: Trajectory | None = None  # once it has ended
        self.error, self.text = "", None
        self.drafted = self.accepted = 0
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.sets: list[np.ndarray] = []
        self.rows = Rows(first)
        self._ends, self._stop = ends, stop
        if past is not None:
            sets = [None] * len(past.response_ids) if past.sets is None else past.sets
            columns = (past.response_ids.tolist(), past.logprobs.tolist(), past.versions.tolist(), sets)
            for token in zip(*columns, strict=True):
                self.draw(*token)
            decided = _decided(past, picks)
            self.rows.add(first, decided, 0, len(decided.experts))
        self._told, self._began = len(self.tokens), time.monotonic()

    @property
    def ends_with_token(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] in self._ends

    def known(self, start: int, stop: int) -> np.ndarray:
        """int64 tokens at positions `start` ... `stop` - 1 of prompt and response."""
        size = len(self.prompt.ids)
        response = self.tokens[max(start - size, 0) : max(stop - size, 0)]
        return np.concatenate([self.prompt.ids[start:stop], np.array(response, np.int32)]).astype(np.int64)

    def at(self, position: int) -> int | None:
        """The token there; None if it is drawn, but has not come to the host."""
        behind = position - len(self.prompt.ids)
        if behind < 0:
            return int(self.prompt.ids[position])
        return self.tokens[behind] if behind < len(self.tokens) else None

    def draw(self, token: int, logprob: float, version: int, among: np.ndarray | None) -> None:
        """Its next token, of which it may be the end (`finish`)."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)
        if among is not None:
            self.sets.append(among)
        if self._stop is not None:
            self.text = self._stop.add(token)
        if self.ends_with_token or self.text is not None:
            self.finish = "stop"
        elif len(self.tokens) >= self.request.params.max_new_tokens:
            self.finish = "length"

    def feed(self, start: int, decided: Decisions, low: int, high: int) -> int:
        """Rows `low` ... `high` - 1 of `decided` are of its tokens from position `start` on. Returns the first that is
        new for its response (`high`: none)."""
        prompt = len(self.prompt.ids) - start
        if prompt > 0:
            end = min(low + prompt, high)
            self.prompt.rows.add(start, decided, low, end)
            start, low = start + end - low, end
        return self.rows.add(start, decided, low, high) if low < high else high

    @property
    def age(self) -> float:
        """Seconds since it was submitted."""
        return time.monotonic() - self._began

    def fail(self, error: str) -> None:
        self.finish, self.error = "failed", error

    def news(self) -> tuple[list[int], list[float]]:
        """Tokens and log-probs since the last call."""
        start, self._told = self._told, len(self.tokens)
        return self.tokens[start:], self.logprobs[start:]

    def made(self, tokenizer: Any = None) -> Trajectory:
        """What has become of it; `text` is empty without a tokenizer."""
        assert self.finish is not None
        text = self.text or ""
        if self.text is None and tokenizer is not None:
            shown = self.tokens[:-1] if self.finish == "stop" else self.tokens
            text = tokenizer.decode(shown, skip_special_tokens=False)
        prompt, response = self.prompt.rows.parts(), self.rows.parts()
        picks = [[p.picks for p in parts if p.picks is not None] for parts in (prompt, response)]
        return Trajectory(
            request=self.request.id,
            group=self.request.group,
            prompt_ids=self.request.prompt_ids,
            response_ids=np.array(self.tokens, np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            experts=self._joined(*([part.experts for part in parts] for parts in (prompt, response))),
            versions=np.array(self.versions, np.int32),
            finish=self.finish,
            text=text,
            picks=self._joined(*picks) if any(picks) else None,
            sets=self.sets if self.tokens and len(self.sets) == len(self.tokens) else None,
            error=self.error,
            drafted=self.drafted,
            accepted=self.accepted,
        )

    def _joined(self, prompt: list[np.ndarray], response: list[np.ndarray]) -> np.ndarray:
        """[P + R, ...]: -1 where nothing is known, and in the last row, which counts as never fed."""
        like = [*prompt, *response, np.zeros((0, 0, 0), np.int16)][0]
        size, count = len(self.prompt.ids), len(self.prompt.ids) + len(self.tokens)
        joined = np.full((count, *like.shape[1:]), -1, like.dtype)
        for start, parts in ((0, prompt), (size, response)):
            if parts:
                rows = np.concatenate(parts)[: max(count - 1 - start, 0)]
                joined[start : start + len(rows)] = rows
        return joined


def _decided(past: Past, picks: bool) -> Decisions:
    """Of the first tokens of a past: up to the last of which something is known, as the journal counts them."""
    rows = past.picks if past.experts is None else past.experts
    known = np.zeros(0) if rows is None else np.nonzero(np.any(rows >= 0, axis=(1, 2)))[0]
    count = 0 if not len(known) or picks and past.picks is None else int(known[-1]) + 1
    experts = np.zeros((count, 0, 0), np.int16) if past.experts is None else past.experts[:count]
    return Decisions(experts, past.picks[:count] if picks and past.picks is not None else None)


@dataclass(eq=False)
class Update:
    """What a step has brought a request."""

    id: int
    token_ids: np.ndarray  # int32 [n]: the new ones
    logprobs: np.ndarray  # float32 [n]
    finished: Trajectory | None = None


def updates(news: list[Response]) -> list[Update]:
    """Views of two arrays: an array for each of many requests would take longer than all else here."""
    told = [response.news() for response in news]
    tokens = np.array([token for some, _ in told for token in some], np.int32)
    logprobs = np.array([logprob for _, some in told for logprob in some], np.float32)
    found, at = [], 0
    for response, (some, _) in zip(news, told, strict=True):
        part = slice(at, at + len(some))
        found.append(Update(response.request.id, tokens[part], logprobs[part], response.trajectory))
        at += len(some)
    return found
