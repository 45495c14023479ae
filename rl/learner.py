"""The learner: DeepSpeed engines in Ray actors, one a rank. It knows batches and losses, and no algorithm."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..settings import FULL, Precision
from .cluster import resources, wait
from .learner_worker import LearnerWorker
from .losses import COMMON, Loss, add
from .packing import Row, plan, stack
from .settings import DEADLINE, Optimization
from .transport import Place, Way, choose

_log = logging.getLogger(__name__)
_STRAGGLER_SECONDS = 10.0


class Learner:
    """The driver's side: owns the ranks' processes, cuts batches for them, adds up what they return.

    A context manager. Every call ends within `deadline` seconds, or in a TimeoutError that says what it
    waited for. An exception in a rank is raised here as itself. Paths must mean the same on every rank's
    machine. `workers` are the Ray actors. `gpus_per_actor`, `group`: `cluster.resources`'.
    """

    def __init__(
        self,
        optimization: Optimization,
        total_steps: int,
        path: str | Path,
        unfreeze: tuple[str, ...] = (),
        *,
        gpus_per_actor: float = 0.0,
        group: Any = None,
        threads: int = 1,
        precision: Precision = FULL,
        deadline: float = DEADLINE,
    ):
        self._gpus, self._group = gpus_per_actor, group
        self._threads, self._precision, self._deadline = threads, precision, deadline
        self.workers: list[Any] = []
        self._places: list[Place] = []
        self._way: Way | None = None
        self._sending: list[Any] = []  # a broadcast's calls
        self._offloaded, self._published = False, -1  # the version that was last
        try:
            self.load(path, optimization, total_steps, unfreeze)
        except BaseException:
            self.close()  # nobody else has the ranks that did start
            raise

    def __enter__(self) -> "Learner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(
        self, path: str | Path, optimization: Optimization, total_steps: int, unfreeze: tuple[str, ...] = ()
    ) -> None:
        """Turns to another model (a checkpoint's folder, or a preset's name), at step 0 of a new schedule.

        `unfreeze`: parts of the model that train only where the loss has a term for them (`DeepseekV4.unfreeze`).
        The processes stay, unless the number of ranks changes: importing torch and DeepSpeed costs each 5 s
        of CPU.
        """
        from ..model.config import resolve

        self._offloaded, self._published = False, -1
        folder = str(resolve(path).absolute())
        if len(self.workers) != optimization.ranks:
            self.close()
            self._start(optimization.ranks)
        self._optimization = optimization
        what = f"the learner to load {path}"
        self._all("load", what, folder, optimization, total_steps, self._precision, unfreeze)

    def share(self, arrays: dict[str, np.ndarray]) -> None:
        """Sends every rank arrays that losses get as `shared`, in place of those before; `load` forgets them."""
        import ray

        self._all("share", f"the learner to take {', '.join(arrays)}", ray.put(arrays))

    def step(self, rows: list[Row], loss: str | Loss, **settings: Any) -> dict[str, float]:
        """One optimizer step on `rows`.

        `loss` names a function of the package ("rl.grpo:loss"), or is one that Ray can send. For each
        micro-batch, it is called as loss(model, batch, shared, **settings) with `collate`'s batch and the
        tensors of `share`, which it must not change, and returns a scalar and metrics. The scalar is divided by
        a denominator of the whole optimizer batch (rows carry weights for that), so that gradients add up over
        micro-batches and ranks. Metrics are sums over tokens, and add up the same way; "grad_norm" (before
        clipping), "lr" and, of a model with experts, "load_max" and "load_idle" (`balance.figures`) join them.
        Trained parameters that the loss does not reach get a gradient of zero. Raises FloatingPointError, and
        changes nothing, if it is not finite.
        """
        return self._on_rows("step", rows, loss, settings)

    def evaluate(self, rows: list[Row], loss: str | Loss, **settings: Any) -> dict[str, float]:
        """The sums of the metrics that `step` would return, without a gradient."""
        return self._on_rows("evaluate", rows, loss, settings)

    def weights(self, version: int, receivers: Sequence[Place] = ()) -> Any:
        """A Ray reference to the `transport.Handle` of the current weights.

        With `receivers`, these take them by the fastest way there is between the learner and them, all at the same
        time and before the learner's next call, which waits for it. Without, whoever has the reference does, at any
        time: the weights stay in the object store. So they get there from an offloaded learner too, if they are those
        that it published last.
        """
        import ray

        if receivers or not (self._offloaded and version == self._published):
            self._settle()
            self._published = version
        what, way = f"the learner to publish version {version} of its weights", choose(self._places, receivers)
        if receivers and way != self._way:
            _log.info("weights go to %d workers by %s (rl/transport.py)", len(receivers), way)
            self._way = way
        calls = [w.weights.options(num_returns=2).remote(version, way, list(receivers)) for w in self.workers]
        self._wait([done for done, _ in calls], what)
        if way == "ipc":  # each rank has lent to those on its GPU
            handles = [each for each in self._wait([handle for _, handle in calls], what) if each]
            return ray.put(replace(handles[0], loans={k: v for each in handles for k, v in each.loans.items()}))
        if way == "broadcast":
            self._sending = [worker.send.remote() for worker in self.workers]
        return calls[0][1]

    def offload(self) -> int:
        """Hands the ranks' device memory over: weights, masters and moments go to the host's, until `reload`; the bytes
        of all ranks. Only `load`, `reload` and `weights` may follow."""
        taken = sum(self._all("offload", "the learner to offload its memory"))
        self._offloaded = True
        return taken

    def reload(self) -> None:
        self._offloaded = False
        self._all("reload", "the learner to take its memory back")

    def save_model(self, path: str | Path) -> None:
        """Writes a checkpoint for `amalgam.model.load`, of the weights in what they compute in; renamed into place."""
        self._all("save_model", f"the learner to save {path}", str(Path(path).absolute()))

    def save_state(self, folder: str | Path) -> int:
        """Saves step, fp32 masters and moments by parameter name; returns that step. The folder keeps the state
        before this one too."""
        return self._all("save_state", f"the learner to save its state in {folder}", str(Path(folder).absolute()))[0]

    def load_state(self, folder: str | Path, step: int | None = None) -> int:
        """Goes on from the loaded model's state after `step` steps (the newest if None); returns that number.

        Ranks and ZeRO stage may differ from when it was saved. If they do not, all that follows is bit-equal
        to a run without interruption. Raises UserError for a state that is missing, torn or another model's.
        """
        what = f"the learner to load its state from {folder}"
        return self._all("load_state", what, str(Path(folder).absolute()), step)[0]

    def close(self) -> None:
        """Ends the ranks' processes."""
        import ray

        for worker in self.workers:
            ray.kill(worker)
        self.workers, self._sending = [], []

    def _start(self, ranks: int) -> None:
        import ray

        device = "cuda" if self._gpus else "cpu"
        actor = ray.remote(LearnerWorker)
        self.workers = [
            actor.options(**resources(self._gpus, self._group, rank)).remote(rank, ranks, device, self._threads)
            for rank in range(ranks)
        ]
        try:
            self._places = self._all("place", f"{ranks} learner processes to start")
            hosts = [place.host for place in self._places]
            listen = self.workers[0].listen.remote(hosts[0], self._deadline)
            (port,) = self._wait([listen], "the learner's first rank to open a port")
            place = (hosts[0], port, len(set(hosts)) == 1)
            self._all("connect", f"{ranks} learner ranks to connect", *place, self._deadline)
        except BaseException:
            self.close()
            raise

    def _on_rows(self, method: str, rows: list[Row], loss: str | Loss, settings: dict[str, Any]) -> dict[str, float]:
        self._settle()
        lengths = [len(row["tokens"]) for row in rows]
        batches = plan(lengths, self._optimization.micro_batch_tokens, self._optimization.ranks)
        arguments = (stack([rows[int(np.argmin(lengths))]]), loss, settings)
        calls = []
        for worker, own in zip(self.workers, batches, strict=bool(self.workers)):
            packed = [stack([rows[i] for i in batch]) if batch else None for batch in own]
            calls.append(getattr(worker, method).remote(packed, *arguments))
        results = self._wait(calls, f"the learner to {method} on {len(rows)} rows, {sum(lengths)} tokens")
        totals: dict[str, float] = {}
        for result in results:
            common = {name: result.pop(name) for name in COMMON if name in result}
            add(totals, result)
            totals |= common
        return totals

    def _all(self, method: str, what: str, *arguments: Any) -> list[Any]:
        self._settle()
        return self._wait([getattr(worker, method).remote(*arguments) for worker in self.workers], what)

    def _settle(self) -> None:
        """Before a call: the broadcast under way has ended, in its own error if it failed; the memory is here."""
        calls, self._sending = self._sending, []
        if calls:
            self._wait(calls, "the learner to broadcast its weights")
        if self._offloaded:
            raise RuntimeError("the learner's memory is offloaded; reload it first")

    def _wait(self, calls: list[Any], what: str) -> list[Any]:
        import ray
        from ray.exceptions import RayActorError

        if not self.workers:
            raise RuntimeError(f"asked {what}, but it is closed")
        try:
            return wait(calls, what, self._deadline)
        except Exception as error:
            # Ranks that fail together are fit for the next call. One that fails alone leaves the others in a
            # collective.
            stuck = ray.wait(calls, num_returns=len(calls), timeout=_STRAGGLER_SECONDS)[1]
            if stuck or isinstance(error, RayActorError):
                self.close()
            raise
