"""The rollout engine: requests come and go while others decode, over a paged cache; reproducible request by request.

A request's tokens depend on its prompt, its counter and the weights alone: not on its neighbors, on the batch's size,
on preemption or on what was known of it before (on a CPU up to fp32 rounding, which a near-tie can turn into another
token). The parts: scheduler.py decides what a step feeds, batch.py feeds it and draws, response.py keeps what comes of
it. On a GPU a step is launched before the tokens of the last one are read: what a request that has ended gets in it is
thrown away.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..model import LanguageModel
from .batch import Batch, Forward, landed
from .check import request_problem
from .meter import Meter
from .pages import Pages
from .plan import Entry
from .records import Records
from .response import Prompt, Response, Update, updates
from .room import room
from .scheduler import Scheduler
from .settings import EngineSettings
from .stop import StopText
from .suspended import Suspended
from .trajectory import Request, Trajectory


class Flight(NamedTuple):
    """A step that was launched."""

    forwards: list[Forward]
    prefilled: int  # tokens


class Engine:
    """Samples from one model replica. Each of `end_ids` ends a response. Calls have to come from one thread.

    `tokenizer` (a `tokenizers.Tokenizer`) gives trajectories their text, and is needed for stop strings. A `journal`
    (rl/journal) gets every token at the end of its step, the folder `snapshots` the states of requests that gave way.
    `lag`: whether a step is launched before the one before is read; `page`: tokens of a page; None: what is best.
    ValueError for a cache without room for one request, and for drafts without an MTP block.
    """

    def __init__(
        self,
        model: LanguageModel,
        end_ids: Sequence[int],
        *,
        tokenizer: Any = None,
        settings: EngineSettings | None = None,
        journal: Any = None,
        snapshots: Path | None = None,
        lag: bool | None = None,
        page: int | None = None,
    ):
        settings = settings or EngineSettings()
        self.model, self.end_ids, self.tokenizer, self.settings = model, tuple(end_ids), tokenizer, settings
        self.version = 0
        self._snapshots, self._page = snapshots, page
        self._counts: Counter[str] = Counter()
        self.restore()
        # A drafted step's outcome decides what the next one feeds.
        self._lag = self._batch.stride == 1 and (self._batch.device.type == "cuda" if lag is None else lag)
        self._responses: dict[int, Response] = {}
        self._groups: dict[int, list[Response]] = {}
        self._flights: deque[Flight] = deque()
        self._news: dict[Response, None] = {}  # of which something is to be told
        self._records, self._meter = Records(journal, settings.sets), Meter()

    # --- memory comes and goes

    def release(self) -> None:
        """Gives up the cache and the graphs, until `restore`. ValueError while requests are under way."""
        if self.busy:
            raise ValueError("release() while requests are under way: their cache is in use")
        self._land(0)
        self._batch = self._suspended = None

    def restore(self) -> None:
        """Makes the cache, of the memory that is free now; graphs are recorded as they are needed. No request's tokens
        depend on it. ValueError for one without room for one request."""
        model, settings, kind = self.model, self.settings, Batch
        if settings.draft == "mtp":
            from .draft import DraftedBatch as kind  # which is built from Batch
        found = room(model, settings, kind.slack, kind.extra_bytes(model), self._page)
        self.context = found.capacity  # most tokens of a request, prompt and response
        self._batch: Any = kind(model, found, settings)
        self._suspended: Any = Suspended(self._snapshots, self._batch)
        self._scheduler = Scheduler(
            found.slots,
            Pages(found.pages, found.page),
            found.capacity,
            settings.prefill_tokens,
            stride=kind.stride,
            state_bytes=found.state_bytes,
            page_bytes=found.page_bytes,
            swap=settings.swap,
        )
        self._scheduler.counts = self._counts

    # --- requests come and go

    def submit(self, request: Request) -> None:
        """Takes a request on. ValueError, in one line, for one that could never run, or whose id is in use."""
        if self._batch is None:
            raise RuntimeError(f"request {request.id}: the engine has given up its cache; restore() it first")
        params, prompt = request.params, request.prompt_ids
        known = len(prompt) + (0 if request.past is None else len(request.past.response_ids))
        entry = Entry(request.id, request.group, len(prompt), known, len(prompt) + params.max_new_tokens)
        group = self._groups.get(request.group, [])
        vocabulary, tokenizes = self.model.lm_head.weight.shape[0], self.tokenizer is not None
        problem = request_problem(request, vocabulary, tokenizes, self.settings.sets)
        if request.id in self._responses:
            problem = "there is an unfinished request of that id"
        elif group and not np.array_equal(group[0].prompt.ids, prompt):
            problem = f"its prompt is not that of the others in group {request.group}"
        if problem := problem or self._scheduler.problem(entry.prompt, entry.limit):
            raise ValueError(f"request {request.id}: {problem}")
        shared = group[0].prompt if group else Prompt(prompt)
        stop = StopText(self.tokenizer, params.stop) if params.stop else None
        ends = frozenset(self.end_ids + params.stop_ids)
        response = Response(request, entry, shared, ends, stop, self.settings.picks)
        self._groups.setdefault(request.group, []).append(response)
        self._responses[request.id] = response
        self._records.begin(request)
        if response.finish is None:
            self._scheduler.add(entry, saved=self._suspended.load(response, self.version))
        else:  # its past was all of it
            self._end(response)
            self._records.flush()

    def cancel(self, id: int) -> bool:
        """Ends a request: its trajectory, "cancelled", comes with the next step. False if there is none of that id."""
        response = self._responses.get(id)
        if response is None:
            return False
        response.finish = "cancelled"
        self._end(response)
        self._records.flush()
        return True

    @property
    def busy(self) -> bool:
        """Whether a request is unfinished, or has news."""
        return bool(self._responses or self._news)

    def step(self) -> list[Update]:
        """One iteration; what is new of each request that something is new of. With nothing to do, [] at once."""
        if self._responses:
            self._launch()
        else:
            self._land(0)
        news, self._news = self._news, {}
        return updates(list(news))

    def update(
        self, load: Callable[[LanguageModel], Any], version: int, cache: Literal["keep", "rebuild"] = "keep"
    ) -> None:
        """New weights between two steps: `load` puts them into the model, in place. Later tokens are of `version`.

        Requests go on, with the cache that the old weights made, or with one that is rebuilt by prefill.
        """
        self._land(0)
        load(self.model)
        self.version = version
        if cache == "rebuild":
            self._scheduler.rebuild()

    def generate(self, requests: Sequence[Request], version: int = 0) -> list[Trajectory]:
        """A trajectory for each request, in order; their tokens are of that version."""
        if self.busy:
            raise ValueError("generate() while other requests are under way: submit() and step() are for that")
        self.version, found = version, {}
        try:
            for request in requests:
                self.submit(request)
            while self.busy:
                found |= {update.id: update.finished for update in self.step() if update.finished}
        finally:
            self._abandon()
        return [found[request.id] for request in requests]

    def stream(self, request: Request) -> Iterator[np.ndarray]:
        """What `generate` samples for one request, step by step: the new ids, int32, the end token too.

        RuntimeError if the request fails."""
        if self.busy:
            raise ValueError("stream() while other requests are under way: submit() and step() are for that")
        try:
            self.submit(request)
            while self.busy:
                for update in self.step():
                    if len(update.token_ids):
                        yield update.token_ids
                    if update.finished and update.finished.finish == "failed":
                        raise RuntimeError(f"request {request.id} failed: {update.finished.error}")
        finally:
            self._abandon()

    def record(self, journal: Any) -> None:
        """What comes from now on is written to another journal. ValueError while a request is under way."""
        if self.busy:
            raise ValueError("record() while requests are under way: they are in the journal that they began in")
        self._records = Records(journal, self.settings.sets)

    def metrics(self) -> dict[str, float]:
        """Now: requests `running` and `waiting`, the share of the cache's pages that is in use. Since the engine was
        made: counts. Since the last call: rates, and mean seconds to a request's first token."""
        s = self._scheduler
        return {
            "running": float(len(s.running)),
            "waiting": float(len(s.waiting)),
            "cache_use": 1 - s.pool.free / s.pool.size,
            "journal_lost": float(self._records.lost),
            **{name: float(s.counts[name]) for name in ("preemptions", "swaps", "forks", "refed_tokens")},
            **self._meter.read(),
        }

    # --- steps

    def _launch(self) -> None:
        """Launches a step and reads those that are behind; with nothing to launch, all."""
        plan = self._scheduler.plan()
        forwards = self._batch.run(plan, self._responses)
        self._suspended.save(plan, self._responses, self.version)
        if forwards:
            self._flights.append(Flight(forwards, sum(chunk.stop - chunk.start for chunk in plan.chunks)))
        self._land(int(self._lag) if forwards else 0)

    def _land(self, most: int) -> None:
        """Reads the steps in flight until `most` are left."""
        while len(self._flights) > most:
            flight = self._flights.popleft()
            drawn = sum(self._read(forward) for forward in flight.forwards)
            self._records.flush()
            self._meter.step(drawn, flight.prefilled)
            self._scheduler.seconds_per_token = self._meter.seconds_per_token
            self._scheduler.seconds_per_byte = self._batch.seconds_per_byte

    def _read(self, forward: Forward) -> int:
        """Writes down what came of a forward; how many tokens it drew. Quick, as it is for every token."""
        decided, results = landed(forward)
        recorded, drawn = self._records.wanted, 0
        ids: list[int] = []  # of the requests whose responses' tokens were fed for the first time
        rows: list[int] = []
        for response, start, low, high, tokens, logprobs, sets in results:
            new = response.feed(start, decided, low, high)  # also of one that has ended: others may share its prompt
            if response.finish is not None:
                continue
            id = response.request.id
            if recorded and new < high:
                ids += [id] * (high - new)
                rows += range(new, high)
            if not tokens:
                continue
            if not response.tokens:
                self._meter.first(response.age)
            for token, logprob, among in zip(tokens, logprobs, sets, strict=True):
                if logprob - logprob != 0:  # NaN or infinite
                    response.fail(
                        f"its logits at position {len(response.prompt.ids) + len(response.tokens)} are not finite"
                    )
                    break
                response.draw(token, logprob, self.version, among)
                drawn += 1
                if recorded:
                    self._records.draw(id, token, logprob, self.version, among)
                if response.finish is not None:
                    break
            self._news[response] = None
            if forward.drafted:
                response.drafted, response.accepted = response.drafted + 1, response.accepted + len(tokens) - 1
            if response.finish is not None:
                self._end(response)
            elif len(tokens) > 1:
                self._scheduler.accept(response.entry)
        if rows:
            self._records.feed(ids, decided.rows(rows))
        return drawn

    def _end(self, response: Response) -> None:
        """Lets go of a request that has its `finish`."""
        if response.entry.order >= 0:
            self._scheduler.remove(response.entry, clean=response.finish in ("stop", "length"))
        del self._responses[response.request.id]
        group = self._groups[response.request.group]
        group.remove(response)
        if not group:
            del self._groups[response.request.group]
        response.trajectory = response.made(self.tokenizer)
        self._records.finish(response.trajectory)
        self._suspended.drop(response.request.id)
        self._news[response] = None

    def _abandon(self) -> None:
        """Ends what is left of a call that was broken off."""
        for id in list(self._responses):
            self.cancel(id)
        self._news.clear()
