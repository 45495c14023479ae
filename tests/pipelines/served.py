"""A server in a thread of its own, over any engine; and an engine that writes what it is told to."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openai
from aiohttp import web

from amalgam.model.config import PRESETS
from amalgam.pipelines.serving.running import Running
from amalgam.pipelines.serving.server import Server
from amalgam.pipelines.speak import Speaker
from amalgam.rl.trajectory import Request

TOKEN = "a-token-of-the-tests"


@dataclass
class Update:
    id: int
    token_ids: np.ndarray
    logprobs: np.ndarray
    finished: Any = None


@dataclass
class End:
    finish: str
    error: str = ""


@dataclass
class Scripted:
    """Writes write(request), `pace` tokens a step, and then ends: "stop" at an end token, "length" else.

    While `going` is not set, nothing is written. A write that raises RuntimeError fails that request.
    """

    write: Callable[[Request], list[int]]
    ends: tuple[int, ...] = (1,)
    pace: int = 1
    going: threading.Event = field(default_factory=threading.Event)
    seen: list[Request] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    running: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.going.set()

    @property
    def busy(self) -> bool:
        return bool(self.running)

    def submit(self, request: Request) -> None:
        if len(request.prompt_ids) > 3000:
            raise ValueError(f"request {request.id}: a prompt of {len(request.prompt_ids)} tokens is too long here")
        self.seen.append(request)
        self.running[request.id] = [*self.write(request)][: request.params.max_new_tokens]

    def cancel(self, id: int) -> None:
        if self.running.pop(id, None) is not None:
            self.cancelled.append(id)

    def metrics(self) -> dict[str, float]:
        return {"running": float(len(self.running)), "tokens_per_second": 12.5}

    def step(self) -> list[Update]:
        if not self.going.wait(0.001):
            return []
        updates = []
        for id, left in list(self.running.items()):
            new, self.running[id] = left[: self.pace], left[self.pace :]
            ids, end = np.array(new, np.int32), None
            if not self.running[id]:
                del self.running[id]
                end = End("stop" if new and new[-1] in self.ends else "length")
            if -1 in new:
                ids, end = ids[:0], End("failed", "NaN logits")
                self.running.pop(id, None)
            updates.append(Update(id, ids, -0.25 * ids.astype(np.float32), end))
        return updates


class Served:
    """`with Served(...) as served`: `served.client()` is the official client of a server on a free port."""

    def __init__(self, engine: Any, speaks: Speaker | None = None, **settings: Any) -> None:
        self.engine, self.speaks = engine, speaks or Speaker("tiny")
        self._settings = {
            "name": "tiny",
            "token": TOKEN,
            "mode": "chat",
            "local": True,
            "request_seconds": 60.0,
            "context": 4096,
        }
        self._waiting = settings.pop("max_waiting", 1000)
        self._settings |= settings

    def __enter__(self) -> "Served":
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(ready)), daemon=True)
        self._thread.start()
        assert ready.wait(20)
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()

    async def _main(self, ready: threading.Event) -> None:
        self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.running = Running(self.engine, self._waiting)
        self.server = Server(self.speaks, self.running, **self._settings)
        runner = web.AppRunner(self.server.app(), handler_cancellation=True, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        ready.set()
        await self._stop.wait()
        await runner.cleanup()
        await asyncio.to_thread(self.running.close, 10.0)

    def client(self, **more: Any) -> Any:
        """`openai.OpenAI`, whose types are stricter than dicts."""
        settings = {"base_url": f"{self.url}/v1", "api_key": TOKEN, "max_retries": 0, "timeout": 60}
        return openai.OpenAI(**(settings | more))


def preset_prompt(messages: list[dict[str, Any]], mode: str = "chat") -> list[int]:
    speaks = Speaker(str(PRESETS / "tiny"))
    return speaks.prompt(messages, mode).tolist()
