"""Random requests through a journal, and a twin of it that remembers in lists what each call said."""

import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from amalgam.rl.journal import Journal
from amalgam.rl.trajectory import Finish, Past, Request, SamplingParams, Trajectory

EXPERTS, PICKS = (3, 2), (2, 5)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "experts": {"experts": EXPERTS},
    "picks": {"picks": PICKS},
    "all": {"experts": EXPERTS, "picks": PICKS, "sets": True},
}


@dataclass
class Known:
    """A request, and what a reader must find of it."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    sets: list[np.ndarray] = field(default_factory=list)
    experts: list[np.ndarray] = field(default_factory=list)
    picks: list[np.ndarray] = field(default_factory=list)
    fed: int = 0
    finish: Finish | None = None


class Twin:
    """A journal whose calls are also remembered: `open` by id, and `finished` ones in order."""

    def __init__(self, folder: Path, name: str, seed: int = 0, **recorded: Any):
        self.recorded, self.rng = recorded, np.random.default_rng(seed)
        self.journal = Journal(folder, name, **recorded)
        self.open: dict[int, Known] = {}
        self.finished: list[Known] = []

    def begin(self, request: Request) -> None:
        self.journal.begin(request)
        known = self.open[request.id] = Known(replace(request, past=None))
        if (past := request.past) is not None:
            known.tokens, known.logprobs = past.response_ids.tolist(), past.logprobs.tolist()
            known.versions, known.sets = past.versions.tolist(), list(past.sets or [])
            rows = past.experts if past.experts is not None else past.picks
            if rows is not None:
                while known.fed < len(rows) and (rows[known.fed] >= 0).any():
                    known.fed += 1
            known.experts = [] if past.experts is None else list(past.experts[: known.fed])
            known.picks = [] if past.picks is None else list(past.picks[: known.fed])

    def step(self, ids: Iterable[int] | None = None) -> None:
        """A new token of each, or two, and decisions of as many fed ones as the twin likes."""
        rng, drawn, fed = self.rng, [], []
        for request in list(self.open) if ids is None else ids:
            known = self.open[request]
            count = int(rng.integers(1, 3))
            drawn += [request] * count
            known.tokens += rng.integers(0, 1 << 31, count).tolist()
            known.logprobs += (-rng.random(count, np.float32)).tolist()
            known.versions += rng.integers(0, 1 << 31, count).tolist()
            known.sets += [rng.integers(0, 500, n).astype(np.int32) for n in rng.integers(0, 4, count)]
            feeding = int(rng.integers(0, len(known.tokens) - known.fed + 1)) if self._decides else 0
            known.fed += feeding
            fed += [request] * feeding
            known.experts += [rng.integers(0, 1 << 15, EXPERTS).astype(np.int16) for _ in range(feeding)]
            known.picks += [self._pick() for _ in range(feeding)]
        order = rng.permutation(len(set(drawn)))  # requests come in any order, their rows in theirs
        names = list(dict.fromkeys(drawn))
        drawn = [request for i in order for request in [names[i]] * drawn.count(names[i])]
        arguments = [
            np.array(self._last("tokens", drawn), np.int32),
            np.array(self._last("logprobs", drawn), np.float32),
            np.array(self._last("versions", drawn), np.int32),
        ]
        more: dict[str, Any] = {}
        if self.recorded.get("sets"):
            more["sets"] = self._last("sets", drawn)
        if self._decides:
            more["fed"] = np.array(fed, np.int64)
            for name, dtype in (("experts", np.int16), ("picks", np.int32)):
                if fed and name in self.recorded:
                    more[name] = np.array(self._last(name, fed), dtype)
        self.journal.append(np.array(drawn, np.int64), *arguments, **more)

    def finish(self, request: int, tokens: int | None = None) -> None:
        """With a response of the first `tokens` that were drawn, or of all."""
        known = self.open[request]
        count = len(known.tokens) if tokens is None else tokens
        finish: Finish = self.rng.choice(["stop", "length", "cancelled", "failed"])  # pyright: ignore
        self.journal.finish(trajectory(known.request, known.tokens[:count], finish))
        del self.open[request]
        known.finish = finish
        for name in ("tokens", "logprobs", "versions", "sets"):
            setattr(known, name, getattr(known, name)[:count])
        known.fed = min(known.fed, count)
        self.finished.append(known)

    def anything(self) -> None:
        """One call, at random."""
        what = self.rng.random()
        if not self.open or what < 0.25:
            self.begin(request(self.rng, int(self.rng.integers(-(2**62), 2**62))))
        elif what < 0.35:
            self.finish(int(self.rng.choice(list(self.open))))
        else:
            self.step([each for each in self.open if self.rng.random() < 0.7])

    def found(self) -> list[Request]:
        """What `recover` must say."""
        return [self.request(known) for _, known in sorted(copy.deepcopy(self.open).items())]

    def request(self, known: Known) -> Request:
        count = len(known.tokens)
        if not count:
            return known.request
        experts, picks = (
            np.array([*rows[: known.fed], *[np.full(shape, -1)] * (count - known.fed)], dtype).reshape(count, *shape)
            if name in self.recorded
            else None
            for name, rows, shape, dtype in (
                ("experts", known.experts, EXPERTS, np.int16), ("picks", known.picks, PICKS, np.int32)
            )
        )  # fmt: skip
        tokens, versions = (np.array(each, np.int32) for each in (known.tokens, known.versions))
        sets = known.sets if self.recorded.get("sets") else None
        past = Past(tokens, np.array(known.logprobs, np.float32), versions, experts, picks, sets)
        return replace(known.request, past=past)

    @property
    def _decides(self) -> bool:
        return "experts" in self.recorded or "picks" in self.recorded

    def _last(self, name: str, ids: list[int]) -> list[Any]:
        """The newest values of the requests' lists, one a row."""
        at = {each: len(getattr(self.open[each], name)) - ids.count(each) for each in ids}
        found = []
        for each in ids:
            found.append(getattr(self.open[each], name)[at[each]])
            at[each] += 1
        return found

    def _pick(self) -> np.ndarray:
        """Some entries, -1 behind the last; at times of a context of over 262,144 tokens."""
        picks = np.full(PICKS, -1, np.int32)
        for row in picks:
            n = self.rng.integers(0, PICKS[1] + 1)
            row[:n] = self.rng.integers(0, self.rng.choice([100, 65535, 70000]), n)
        picks[0, 0] = 0  # that the twin can tell it from a row that is not known
        return picks


def written(folder: Path, seed: int, recorded: str, calls: int) -> tuple[Path, list[tuple[int, list[Request]]]]:
    """A journal of random calls: its file, and after each call the file's size and what must be found."""
    twin = Twin(folder, f"{seed}-{recorded}-{time.monotonic_ns()}", seed, **KINDS[recorded])
    path = twin.journal.path
    states = [(path.stat().st_size, twin.found())]
    for _ in range(calls):
        twin.anything()
        states.append((path.stat().st_size, twin.found()))
    twin.journal.close()
    return path, states


def request(rng: np.random.Generator, id: int, past: Past | None = None) -> Request:
    params = SamplingParams(
        temperature=float(rng.random()),
        max_new_tokens=int(rng.integers(1, 1000)),
        seed=int(rng.integers(0, 2**62)),
        top_k=int(rng.integers(0, 50)),
        top_p=float(rng.random()),
        stop=tuple(rng.choice(["\n\n", "</answer>", "\u2028", "\U0001f600"], rng.integers(0, 3)).tolist()),
        stop_ids=tuple(rng.integers(0, 1000, rng.integers(0, 3)).tolist()),
        allowed=rng.random(rng.integers(1, 40)) < 0.5 if rng.random() < 0.5 else None,
    )
    prompt = rng.integers(0, 1 << 31, rng.integers(0, 6)).astype(np.int32)
    noise = int(rng.integers(0, 2**62)) if rng.random() < 0.5 else None
    return Request(id, int(rng.integers(0, 2**62)), prompt, params, past, noise)


def trajectory(request: Request, tokens: list[int], finish: Finish) -> Trajectory:
    count = len(tokens)
    return Trajectory(
        request=request.id,
        group=request.group,
        prompt_ids=request.prompt_ids,
        response_ids=np.array(tokens, np.int32),
        logprobs=np.zeros(count, np.float32),
        experts=np.zeros((len(request.prompt_ids) + count, *EXPERTS), np.int16),
        versions=np.zeros(count, np.int32),
        finish=finish,
        text="",
        error="why" if finish == "failed" else "",
    )


def same(found: Iterable[Request], expected: Iterable[Request]) -> bool:
    """Equal in every number, and in every array's dtype."""
    return [_plain(each) for each in found] == [_plain(each) for each in expected]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value
