"""The requests that the engine has, and who waits for each of them: between asyncio's thread and the engine's."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from ...rl.runner import EngineThread, Steps
from ...rl.trajectory import Request
from .protocol import ApiError

RETRY_SECONDS = 2  # what a client is told that comes while too many wait

Inbox = asyncio.Queue[tuple[int, Any] | Exception]  # (a request's place among those run together, the engine's Update)


class Running:
    """To be made and used in asyncio's thread. `max_waiting`: most requests that may wait for their first token."""

    def __init__(self, engine: Steps, max_waiting: int) -> None:
        self._loop, self._max_waiting = asyncio.get_running_loop(), max_waiting
        self._open: dict[int, tuple[Inbox, int]] = {}
        self._waiting: set[int] = set()
        self.broken: asyncio.Future[None] = self._loop.create_future()  # gets the exception that ended the engine
        self._thread = EngineThread(engine, self._deliver, self._failed)

    @asynccontextmanager
    async def run(self, requests: list[Request]) -> AsyncIterator[AsyncIterator[tuple[int, Any]]]:
        """(place, update) of all requests, as they come. Those unfinished at the end are cancelled in the engine.

        ApiError: 400 for what can never run, 429 where too many wait.
        """
        if len(self._waiting) + len(requests) > self._max_waiting:
            raise ApiError(
                429,
                f"{len(self._waiting)} requests wait, and with {len(requests)} more it were over --max-waiting "
                f"{self._max_waiting}; try again",
                code="too_many_waiting",
                Retry_After=str(RETRY_SECONDS),
            )
        inbox: Inbox = asyncio.Queue()
        self._open |= {request.id: (inbox, place) for place, request in enumerate(requests)}
        self._waiting |= {request.id for request in requests}
        try:
            try:
                await asyncio.wrap_future(self._thread.submit(requests))
            except ValueError as error:
                raise ApiError(400, str(error)) from None
            yield _updates(inbox, len(requests))
        finally:
            left = [request.id for request in requests if self._open.pop(request.id, None)]
            self._waiting.difference_update(left)
            if left:
                self._thread.cancel(left)

    async def metrics(self) -> dict[str, float]:
        """The engine's, between two steps, and the requests here."""
        found = await asyncio.wrap_future(self._thread.call(lambda engine: engine.metrics()))
        here: dict[str, float] = {"open_requests": len(self._open), "waiting_requests": len(self._waiting)}
        return {f"engine_{name}": value for name, value in found.items()} | here

    @property
    def count(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def abort(self, error: Exception) -> None:
        """Who still waits gets this error."""
        for inbox in {id(inbox): inbox for inbox, _ in self._open.values()}.values():
            inbox.put_nowait(error)

    def close(self, seconds: float) -> None:
        """Ends the engine's thread; TimeoutError where its step takes longer."""
        self._thread.close(seconds)

    def _deliver(self, updates: list[Any]) -> None:
        self._loop.call_soon_threadsafe(self._take, updates)

    def _take(self, updates: list[Any]) -> None:
        for update in updates:
            self._waiting.discard(update.id)
            if update.id in self._open:  # else who asked has gone
                inbox, place = self._open[update.id]
                inbox.put_nowait((place, update))
                if update.finished is not None:
                    del self._open[update.id]

    def _failed(self, error: BaseException) -> None:
        self._loop.call_soon_threadsafe(self._end, error)

    def _end(self, error: BaseException) -> None:
        self.broken.set_exception(error)
        self.abort(ApiError(500, "the engine has failed; the server ends"))


async def _updates(inbox: Inbox, unfinished: int) -> AsyncIterator[tuple[int, Any]]:
    while unfinished:
        got = await inbox.get()
        if isinstance(got, Exception):
            raise got
        unfinished -= got[1].finished is not None
        yield got
