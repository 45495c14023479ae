"""A rollout worker whose engine counts instead of computing, journals as the real one does, and can be made to hang.
It appends each token's request and position to the file `drawn` in the folder of its policy.

A response's tokens follow from its request's id and seed and their positions; it has between 1 and `max_new_tokens`.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray import cloudpickle

from amalgam.rl.journal import Journal
from amalgam.rl.rollout import Rollouts
from amalgam.rl.rollout_worker import RolloutWorker
from amalgam.rl.settings import EngineSettings
from amalgam.rl.trajectory import Request, SamplingParams, Trajectory

# A worker's process cannot import this file: what it runs of it travels by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

WINDOW = 1000


def requests(groups: int, members: int, limit: int = 50, seed: int = 0) -> list[Request]:
    """Ids are neither small nor in a row."""
    params = SamplingParams(max_new_tokens=limit, seed=seed)
    prompts = [np.arange(1 + g, dtype=np.int32) for g in range(groups)]
    return [
        Request(7 * (g * members + i) + 2**33, g, prompts[g], params) for g in range(groups) for i in range(members)
    ]


def length(request: Request) -> int:
    """Of its response, from 1 on; more of them are short."""
    drawn = np.random.default_rng([request.id, request.params.seed]).random()
    return 1 + int(drawn**2 * request.params.max_new_tokens)


def token(request: Request, position: int) -> int:
    return (request.id + 31 * request.params.seed + position * 977) % 509


def response(request: Request) -> list[int]:
    return [token(request, position) for position in range(length(request))]


class Engine:
    """`seconds` a step. `folder`/hang, a number of steps: hangs after so many, once."""

    def __init__(self, folder: Path, journal: Journal, max_batch: int, seconds: float):
        self.folder, self.journal, self.max_batch, self.seconds = folder, journal, max_batch, seconds
        self.version, self.steps, self.held = 0, 0, {"weights", "cache"}
        self._known: dict[int, tuple[Request, list[int], list[int]]] = {}
        self._cancelled: set[int] = set()

    @property
    def busy(self) -> bool:
        return bool(self._known)

    def submit(self, request: Request) -> None:
        if len(request.prompt_ids) > WINDOW:
            raise ValueError(f"a prompt of {len(request.prompt_ids)} tokens, the window has {WINDOW}")
        past = request.past
        tokens, versions = ([], []) if past is None else (past.response_ids.tolist(), past.versions.tolist())
        self.journal.begin(request)
        self._known[request.id] = (request, tokens, versions)

    def record(self, journal: Journal) -> None:
        self.journal = journal

    def cancel(self, id: int) -> None:
        if id in self._known:
            self._cancelled.add(id)

    def update(self, load: Callable[[Any], None], version: int, cache: str = "keep") -> None:
        self.version = version

    def metrics(self) -> dict[str, float]:
        running = min(len(self._known), self.max_batch)
        waiting = len(self._known) - running
        use = {"cache_use": running / self.max_batch, "preemptions": self.steps // 2}
        use["journal_lost"] = float((self.folder / "lost").exists())
        return {"running": running, "waiting": waiting, **use}

    def step(self) -> list[Any]:
        assert self.held == {"weights", "cache"}
        time.sleep(self.seconds)
        self._hang()
        self.steps += 1
        drawn: dict[int, int] = {}
        running = list(self._known.values())[: self.max_batch]
        for request, tokens, versions in running:
            if len(tokens) < length(request) and request.id not in self._cancelled:
                drawn[request.id] = token(request, len(tokens))
                tokens.append(drawn[request.id])
                versions.append(self.version)
        ids, new = np.array(list(drawn), np.int64), np.array(list(drawn.values()), np.int32)
        self.journal.append(ids, new, new.astype(np.float32), np.full(len(new), self.version, np.int32))
        with open(self.folder / "drawn", "a") as file:
            file.write("".join(f"{each} {len(self._known[each][1]) - 1}\n" for each in drawn))
        updates = []
        for request, *_ in running:
            tokens = [drawn[request.id]] if request.id in drawn else []
            updates.append(SimpleNamespace(id=request.id, token_ids=tokens, finished=self._finished(request)))
        return updates

    def _finished(self, request: Request) -> Trajectory | None:
        _, tokens, versions = self._known[request.id]
        if len(tokens) < length(request) and request.id not in self._cancelled:
            return None
        del self._known[request.id]
        ids = np.array(tokens, np.int32)
        trajectory = Trajectory(
            request.id, request.group, request.prompt_ids, ids, ids.astype(np.float32), np.zeros((0, 0, 0), np.int16),
            np.array(versions, np.int32), "cancelled" if request.id in self._cancelled else "stop", "",
        )  # fmt: skip
        self.journal.finish(trajectory)
        return trajectory

    def _hang(self) -> None:
        file = self.folder / "hang"
        if file.exists() and self.steps >= int(file.read_text()):
            file.unlink()
            time.sleep(600)


class Worker(RolloutWorker):
    def make_engine(self, path: str, settings: EngineSettings) -> Engine:
        wanted = json.loads((Path(path) / "config.json").read_text())
        if wanted.get("fails"):
            print("one\nno memory left", file=sys.stderr, flush=True)
            sys.exit(1)
        return Engine(Path(path), self.new_journal(), settings.max_batch, wanted["seconds"])

    def update(self, handle: Any, cache: str = "keep") -> None:
        def take(engine: Engine) -> None:
            assert "weights" in engine.held
            engine.update(lambda _: None, handle, cache)

        self._call(take)

    def offload(self) -> int:
        return self._call(lambda engine: engine.held.clear()) or 0

    def reload(self) -> None:
        self._call(lambda engine: engine.held.add("weights"))

    def restore(self) -> None:
        self._call(lambda engine: engine.held.add("cache"))


class FakeRollouts(Rollouts):
    kind = Worker


def policy(folder: Path, seconds: float) -> Path:
    """What such a worker loads."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"seconds": seconds}))
    return folder
