"""An engine's thread: calls between steps, what a refused group leaves, and an engine that fails."""

import threading
import time
from concurrent.futures import wait
from typing import Any

import numpy as np
import pytest

from amalgam.rl.runner import EngineThread
from amalgam.rl.trajectory import Request


class Counting:
    """An engine whose steps count down each request's number of tokens."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.cancelled: list[int] = []
        self.threads = set[int]()
        self.fails = False

    @property
    def busy(self) -> bool:
        return bool(self.left)

    def submit(self, request: Request) -> None:
        if not len(request.prompt_ids):
            raise ValueError(f"request {request.id} has no prompt")
        self.left[request.id] = request.params.max_new_tokens

    def cancel(self, id: int) -> None:
        self.cancelled.append(id)
        self.left.pop(id, None)

    def metrics(self) -> dict[str, float]:
        return {"running": len(self.left)}

    def step(self) -> list[Any]:
        self.threads.add(threading.get_ident())
        if self.fails:
            raise MemoryError("the device is full")
        self.left = {id: n - 1 for id, n in self.left.items() if n > 1}
        return [tuple(self.left)]


def request(id: int, prompt: int = 1) -> Request:
    return Request(id, 0, np.zeros(prompt, np.int32))


def started() -> tuple[Counting, EngineThread, list[Any], list[BaseException]]:
    engine, updates, failures = Counting(), [], []
    return engine, EngineThread(engine, updates.extend, failures.append), updates, failures


def test_requests_run_to_their_end_in_one_thread():
    engine, thread, updates, failures = started()
    wait([thread.submit([request(i)]) for i in range(20)], 5)
    while thread.call(lambda e: e.busy).result(5):
        time.sleep(0.001)
    assert {id for update in updates for id in update} == set(range(20)) and updates[-1] == ()
    assert engine.threads == {thread.call(lambda e: threading.get_ident()).result(5)} != {threading.get_ident()}
    thread.close(5)
    assert failures == []
    with pytest.raises(RuntimeError, match="the engine is closed"):
        thread.submit([request(99)]).result(5)


def test_a_group_is_taken_whole_or_not_at_all():
    engine, thread, _, _ = started()
    with pytest.raises(ValueError, match="request 3 has no prompt"):
        thread.submit([request(1), request(2), request(3, prompt=0), request(4)]).result(5)
    assert engine.cancelled == [1, 2] and not engine.busy
    thread.submit([request(5)]).result(5)
    thread.cancel([5, 6]).result(5)
    assert engine.cancelled == [1, 2, 5, 6]
    thread.close(5)


def test_a_call_that_fails_is_its_callers_alone():
    _, thread, _, failures = started()
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda e: 1 // 0).result(5)
    assert thread.call(lambda e: e.metrics()).result(5) == {"running": 0}
    thread.close(5)
    assert failures == []


def test_an_engine_that_fails_ends_every_call():
    engine, thread, _, failures = started()
    engine.fails = True
    held = threading.Event()
    thread.call(lambda e: held.wait(5))  # until all calls below are in the queue
    thread.submit([request(1)])
    held.set()
    while not failures:
        time.sleep(0.001)
    assert isinstance(failures[0], MemoryError)
    with pytest.raises(MemoryError, match="the device is full"):
        thread.submit([request(2)]).result(5)
    thread.close(5)


def test_close_says_what_it_waits_for():
    _, thread, _, _ = started()
    held = threading.Event()
    thread.call(lambda e: held.wait(5))
    with pytest.raises(TimeoutError, match=r"waited 0.01 s for the engine to end its step"):
        thread.close(0.01)
    held.set()
    thread.close(5)
