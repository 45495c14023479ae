"""Teachers: hidden states of the last layer for given trajectories, one teacher in memory at a time."""

from pathlib import Path
from typing import Any

import numpy as np

from ..rl.cluster import log_to_stderr, resources, wait
from ..rl.memory import Span
from ..rl.packing import Row, collate, plan
from ..rl.settings import DEADLINE
from ..settings import FULL, Precision


class TeacherWorker:
    """The actor: holds the teacher that was asked for last."""

    def __init__(self, device: str, threads: int, precision: Precision = FULL):
        import torch

        log_to_stderr()
        torch.set_num_threads(threads)
        self.device, self.precision, self.path, self.model = device, precision, "", None
        self.memory = Span()

    def _load(self, path: str) -> Any:
        from ..model import load

        if path != self.path:
            self.model, self.path = None, ""  # the one before goes before the next one comes
            self.model = load(path, device=self.device, precision=self.precision, stored=True)
            self.path = path
        return self.model

    def head(self, path: str) -> np.ndarray:
        """fp32 [V, d']."""
        return self._load(path).lm_head.weight.detach().float().cpu().numpy()

    def hidden(self, path: str, documents: list[np.ndarray], max_tokens: int) -> list[np.ndarray]:
        """fp32 [n, d'] for each document of n token ids, after the final norm."""
        import torch

        model, results = self._load(path), [np.empty(0)] * len(documents)
        rows: list[Row] = [{"tokens": d} for d in documents]
        for batch in plan([len(d) for d in documents], max_tokens, 1)[0]:
            packed = collate([rows[i] for i in batch], self.device)
            with torch.inference_mode():
                states = model(packed["tokens"], packed["cu_seqlens"]).hidden.float().cpu().numpy()
            for i, part in zip(batch, np.split(states, packed["cu_seqlens"].cpu().numpy()[1:-1]), strict=True):
                results[i] = part
        return results


class Teachers:
    """The driver's side: teachers by index, in one process. A context manager; every wait has a deadline."""

    def __init__(
        self,
        paths: list[Path],
        *,
        gpus_per_actor: float = 0.0,
        group: Any = None,
        threads: int = 1,
        precision: Precision = FULL,
        deadline: float = DEADLINE,
    ):
        import ray

        self.paths, self.deadline = [str(p.absolute()) for p in paths], deadline
        actor = ray.remote(TeacherWorker).options(**resources(gpus_per_actor, group, 0))
        self.worker: Any = actor.remote("cuda" if gpus_per_actor else "cpu", threads, precision)

    def heads(self) -> dict[str, np.ndarray]:
        """ "head.I": fp32 [V, d'] of each teacher I."""
        return {
            f"head.{i}": wait(self.worker.head.remote(path), f"the head of teacher {path}", self.deadline)
            for i, path in enumerate(self.paths)
        }

    def hidden(self, documents: list[np.ndarray], teacher: list[int], max_tokens: int) -> list[np.ndarray]:
        """Each document's hidden states under its teacher, in the documents' order; computed teacher by teacher."""
        results = [np.empty(0)] * len(documents)
        for index in sorted(set(teacher)):
            mine = [i for i, t in enumerate(teacher) if t == index]
            call = self.worker.hidden.remote(self.paths[index], [documents[i] for i in mine], max_tokens)
            what = f"teacher {self.paths[index]} on {len(mine)} documents"
            for i, states in zip(mine, wait(call, what, self.deadline), strict=True):
                results[i] = states
        return results

    def __enter__(self) -> "Teachers":
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        ray.kill(self.worker)
