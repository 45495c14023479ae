"""Rollout workers: Ray actors in their own processes that sample from the policy, and the pool that drives them."""

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from ..settings import FULL, Precision
from .cluster import last_words, log_to_stderr, wait
from .memory import Span
from .settings import DEADLINE, Draft, EngineSettings
from .trajectory import Request, SamplingParams, Trajectory

MAX_DEATHS = 3
"""A pool replaces a dead worker and samples its requests again; with this many deaths in one stage the run stops."""


class RolloutWorker:
    """The actor: one model replica and its engine."""

    def __init__(self, device: str, threads: int, precision: Precision = FULL):
        import torch

        log_to_stderr()
        torch.set_num_threads(threads)
        self.device, self.precision, self.version = device, precision, 0
        self.engine: Any = None
        self.receiver: Any = None
        self.offloaded: Any = None

    def load(self, path: str) -> None:
        """The policy of a checkpoint's folder, as version 0."""
        from tokenizers import Tokenizer

        from ..model import end_ids, load
        from .engine import Engine

        self.engine = self.offloaded = None  # the policy before goes before the next one comes
        self.memory = Span()
        model = load(path, device=self.device, precision=self.precision, stored=True)
        self.tokenizer = Tokenizer.from_file(str(Path(path) / "tokenizer.json"))
        self.end_ids = end_ids(Path(path))
        self.engine = Engine(model, self.end_ids, tokenizer=self.tokenizer)
        self.version = 0

    def place(self) -> Any:
        """Of `Learner.weights`' receivers."""
        from .transport import here

        return here("a rollout worker", self.device)

    def update(self, handle: Any) -> None:
        """New weights for the loaded policy, in place, checked by their checksums (`Learner.weights`' handle)."""
        from .transport import Receiver

        self.receiver = self.receiver or Receiver(self.place())
        self.receiver.receive(self.engine.model, handle)
        self.version = handle.version

    def offload(self) -> int:
        """The device memory of the policy's weights goes to the host's, until `reload`; the bytes."""
        from .offload import Offload, tensors_of

        self.offloaded = self.offloaded or Offload(tensors_of(self.engine.model))
        return self.offloaded.out()

    def reload(self) -> None:
        self.offloaded.back()

    def generate(
        self,
        requests: list[Request],
        temperature: float,
        max_new_tokens: int,
        seed: int,
        version: int,
        draft: Draft = "off",
    ) -> list[Trajectory]:
        if version != self.version:
            raise RuntimeError(
                f"asked to sample with version {version} of the policy, but this worker has {self.version}"
            )
        if draft != self.engine.settings.draft:
            from .engine import Engine

            settings = EngineSettings(draft=draft)
            self.engine = Engine(self.engine.model, self.end_ids, tokenizer=self.tokenizer, settings=settings)
        params = SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
        return self.engine.generate([replace(request, params=params) for request in requests], version)


class Rollouts:
    """The driver's side: `workers` replicas of one policy. Every wait has a deadline and says what it waits for."""

    def __init__(
        self,
        workers: int,
        *,
        gpus_per_actor: float = 0.0,
        threads: int = 1,
        precision: Precision = FULL,
        deadline: float = DEADLINE,
    ):
        self._gpus, self._threads, self._precision, self._deadline = gpus_per_actor, threads, precision, deadline
        self.workers = [self._start() for _ in range(workers)]
        self.deaths = 0

    def load(self, path: str | Path) -> None:
        """Every worker takes the policy of this checkpoint's folder, or preset, as version 0."""
        from ..model.config import resolve

        self._path, self._bundle, self._version, self.deaths = str(resolve(path).absolute()), None, 0, 0
        self._each(lambda worker, _: worker.load.remote(self._path), f"rollout workers to load {path}")

    def sync(self, bundle: Any, version: int) -> None:
        """Every worker takes the learner's weights (`Learner.weights`' reference, of that version)."""
        self._bundle, self._version = bundle, version
        self._each(lambda worker, _: worker.update.remote(bundle), f"rollout workers to take version {version}")

    def generate(
        self, requests: list[Request], *, temperature: float, max_new_tokens: int, seed: int, draft: Draft = "off"
    ) -> list[Trajectory]:
        """A trajectory for each request, in order. Whole groups go to a worker; tokens do not depend on which."""
        parts = _shares(requests, len(self.workers))
        results = self._each(
            lambda worker, i: worker.generate.remote(parts[i], temperature, max_new_tokens, seed, self._version, draft),
            f"rollout workers to sample {len(requests)} responses",
        )
        return [trajectory for part in results for trajectory in part]

    def close(self) -> None:
        import ray

        for worker in self.workers:
            ray.kill(worker)
        self.workers = []

    def _start(self) -> Any:
        import ray

        actor = ray.remote(RolloutWorker).options(num_cpus=0, num_gpus=self._gpus)
        return actor.remote("cuda" if self._gpus else "cpu", self._threads, self._precision)

    def _each(self, call: Callable[[Any, int], Any], what: str) -> list[Any]:
        """The results of call(worker, index) on all workers at once; the part of one that dies is called again."""
        from ray.exceptions import RayActorError

        calls = [call(worker, i) for i, worker in enumerate(self.workers)]
        results = []
        for i in range(len(calls)):
            while True:
                try:
                    results.append(wait(calls[i], what, self._deadline))
                    break
                except RayActorError as death:
                    self._replace(i, death)
                    calls[i] = call(self.workers[i], i)
        return results

    def _replace(self, index: int, death: Exception) -> None:
        """A new worker with the current policy in place of one that died; the third death in a stage is raised."""
        from ray.exceptions import RayActorError

        self.deaths += 1
        if self.deaths >= MAX_DEATHS:
            why = last_words(death) or death  # Ray's text, which is that a process ended
            raise RuntimeError(f"rollout workers died {self.deaths} times in this stage; the last: {why}") from death
        worker = self.workers[index] = self._start()
        try:
            wait(worker.load.remote(self._path), f"a new rollout worker to load {self._path}", self._deadline)
            if self._bundle is not None:
                wait(worker.update.remote(self._bundle), f"it to take version {self._version}", self._deadline)
        except RayActorError as next_death:
            self._replace(index, next_death)


def _shares(requests: list[Request], count: int) -> list[list[Request]]:
    """`requests` in `count` runs of nearly equal length that cut no group."""
    shares: list[list[Request]] = [[] for _ in range(count)]
    done = 0
    for _, members in groupby(requests, key=lambda request: request.group):
        group = list(members)
        shares[done * count // len(requests)] += group
        done += len(group)
    return shares
