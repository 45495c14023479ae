"""An engine in a thread of its own. Other threads reach it by `call`; what it samples goes to one function.

Nothing here knows asyncio or Ray: a server or an actor hands in the function that takes the updates.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from .trajectory import Request

T = TypeVar("T")


class Steps(Protocol):
    """What is asked of an engine (rl/engine.py)."""

    @property
    def busy(self) -> bool: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, id: int) -> object: ...
    def step(self) -> list[Any]: ...
    def metrics(self) -> dict[str, float]: ...


class EngineThread:
    """Steps `engine` while it is busy, and runs what it is called for between two steps.

    `deliver` gets each step's updates, in the engine's thread: it must be quick and must not raise. Where a step raises
    (a bug, the device's memory), the thread ends, `failed` gets the exception, and every call from then on raises it.
    """

    def __init__(
        self, engine: Steps, deliver: Callable[[list[Any]], None], failed: Callable[[BaseException], None]
    ) -> None:
        self._engine, self._deliver, self._failed = engine, deliver, failed
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[Any], Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._end: BaseException | None = None  # why no call is taken any more
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def call(self, do: Callable[[Any], T]) -> Future[T]:
        """do(engine) between two steps, in the engine's thread: its result, or what it raised."""
        future: Future[T] = Future()
        with self._lock:  # so that nothing is put behind the end, where nobody would take it
            if self._end is None:
                self._calls.put((future, do))
            else:
                future.set_exception(self._end)
        return future

    def submit(self, requests: list[Request]) -> Future[None]:
        """All of them, or none: ValueError of the first that can never run."""

        def submit(engine: Steps) -> None:
            for i, request in enumerate(requests):
                try:
                    engine.submit(request)
                except ValueError:
                    for earlier in requests[:i]:
                        engine.cancel(earlier.id)
                    raise

        return self.call(submit)

    def cancel(self, ids: list[int]) -> Future[None]:
        """Those of them that still run come out with finish "cancelled"."""

        def cancel(engine: Steps) -> None:
            for id in ids:
                engine.cancel(id)

        return self.call(cancel)

    def close(self, seconds: float) -> None:
        """Ends the thread after the step that it is in. TimeoutError where that takes longer."""
        self._finish(RuntimeError("the engine is closed"))
        self._thread.join(seconds)
        if self._thread.is_alive():
            raise TimeoutError(f"waited {seconds:g} s for the engine to end its step")

    def _run(self) -> None:
        try:
            while True:
                while not self._calls.empty() or not self._engine.busy:
                    if (called := self._calls.get()) is None:
                        return
                    _run(*called, self._engine)
                if updates := self._engine.step():
                    self._deliver(updates)
        except BaseException as error:
            self._finish(error)
            self._failed(error)
        finally:
            while not self._calls.empty():
                if (left := self._calls.get()) is not None and left[0].set_running_or_notify_cancel():
                    left[0].set_exception(self._end)

    def _finish(self, why: BaseException) -> None:
        with self._lock:
            if self._end is None:
                self._end = why
                self._calls.put(None)


def _run(future: Future[Any], do: Callable[[Any], Any], engine: Any) -> None:
    if not future.set_running_or_notify_cancel():
        return  # who asked has gone
    try:
        future.set_result(do(engine))
    except Exception as error:
        future.set_exception(error)
