"""The run's processes: learners and rollout workers, lent to stages and kept for the next one.

Starting a process that imports torch costs seconds; a stage takes idle processes of the right kind and loads its own
model into them. Stages that run side by side get different ones.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..settings import FULL, Precision
from .cluster import gpu_group
from .learner import Learner
from .rollout import ENGINE, Rollouts
from .settings import DEADLINE, EngineSettings, Optimization


class Fleet:
    """A context manager that ends all its processes, also where ending one fails.

    `gpus_per_actor`, `threads`, `precision` and `deadline` (seconds of one call) are those of every process.
    `colocated`: so many GPUs are shared: the i-th is that of every learner's rank i and of every rollout worker i. On
    a CPU there is none to share, but all else is alike: whoever is idle is offloaded, and whoever is lent takes turns.
    """

    def __init__(
        self,
        gpus_per_actor: float = 0.0,
        threads: int = 1,
        precision: Precision = FULL,
        deadline: float = DEADLINE,
        colocated: int = 0,
    ):
        self.colocated = colocated > 0
        self._group = gpu_group(colocated, deadline) if colocated and gpus_per_actor else None
        self.place: dict[str, Any] = {
            "gpus_per_actor": gpus_per_actor, "group": self._group,
            "threads": threads, "precision": precision, "deadline": deadline,
        }  # fmt: skip
        self._idle: dict[Any, list[Any]] = {}
        self._all: list[Any] = []
        self._lock = threading.Lock()

    @contextmanager
    def learner(
        self, path: Path, optimization: Optimization, total_steps: int, unfreeze: tuple[str, ...] = ()
    ) -> Iterator[Learner]:
        """A learner with the model at `path` and a new optimizer; `unfreeze` as for `Learner.load`."""
        with self.lend(
            ("learner", optimization.ranks),
            make=lambda: Learner(optimization, total_steps, path, unfreeze, **self.place),
            again=lambda learner: learner.load(path, optimization, total_steps, unfreeze),
        ) as learner:
            yield learner
            if self.colocated:
                learner.offload()

    @contextmanager
    def rollouts(self, path: Path, workers: int, journal: Path, engine: EngineSettings = ENGINE) -> Iterator[Rollouts]:
        """`workers` rollout workers with the model at `path`, and their journals in the folder `journal`."""
        with self.lend(("rollouts", workers), lambda: Rollouts(workers, **self.place)) as rollouts:
            rollouts.load(path, journal=journal, settings=engine)
            yield rollouts
            if self.colocated:
                rollouts.offload()

    @contextmanager
    def lend(
        self, key: Any, make: Callable[[], Any], again: Callable[[Any], Any] = lambda member: None
    ) -> Iterator[Any]:
        """An idle member of this key after `again`, or a new one from `make`; `__exit__` closes it."""
        with self._lock:
            idle = self._idle.setdefault(key, [])
            member = idle.pop() if idle else None
        if member is None:
            member = make()
            with self._lock:
                self._all.append(member)
        else:
            again(member)
        yield member
        # Only after a stage that ended well: processes of one that failed may be in any state, and are not lent again.
        with self._lock:
            idle.append(member)

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as ends:
            for member in self._all:
                ends.callback(member.close)
            if self._group is not None:
                from ray.util import remove_placement_group

                remove_placement_group(self._group)
