"""What an engine writes to its journal: every token at the end of its step. Without a journal: nothing."""

import logging
from typing import Any

import numpy as np

from ..model import DeepseekV4, LanguageModel
from .batch import Picks
from .response import Decisions
from .settings import EngineSettings
from .trajectory import Request, Trajectory

_LOG = logging.getLogger(__name__)


def recorded(model: LanguageModel, settings: EngineSettings) -> dict[str, Any]:
    """What a journal of such an engine is told: the shapes of what it has of each token."""
    if not isinstance(model, DeepseekV4):
        return {}
    experts = (model.config.num_hidden_layers, model.config.num_experts_per_tok) if settings.experts else None
    picks = Picks(model) if settings.picks else None
    return {"experts": experts, "picks": (picks.layers, picks.topk) if picks else None, "sets": settings.sets}


class Records:
    """What `draw`, `feed` and `finish` say of a step is written by `flush`, at its end. A journal that fails (its disk
    is full) is given up, with a line in the log: the engine goes on, and `lost` says so. `sets`: whether tokens come
    with what they were drawn from."""

    def __init__(self, journal: Any, sets: bool = False):
        self._journal, self._with_sets, self.lost = journal, sets, False
        self._clear()

    def begin(self, request: Request) -> None:
        self._write(lambda journal: journal.begin(request))

    @property
    def wanted(self) -> bool:
        return self._journal is not None

    def draw(self, request: int, token: int, logprob: float, version: int, among: np.ndarray | None) -> None:
        self._drawn.append((request, token, logprob, version))
        if among is not None:
            self._sets.append(among)

    def feed(self, requests: list[int], decided: Decisions) -> None:
        """Decisions for further tokens [n] of these requests' responses, if any are recorded."""
        if decided.experts.shape[1:] != (0, 0) or decided.picks is not None:
            self._fed += requests
            self._decided.append(decided)

    def finish(self, trajectory: Trajectory) -> None:
        self._finished.append(trajectory)

    def flush(self) -> None:
        if self._drawn or self._fed:
            columns = list(zip(*self._drawn, strict=True)) or [()] * 4
            kinds = (np.int64, np.int32, np.float32, np.int32)
            arrays = [np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
            more: dict[str, Any] = {
                "fed": np.array(self._fed, np.int64),
                "sets": self._sets if self._with_sets else None,
            }
            if self._decided:
                experts = np.concatenate([decided.experts for decided in self._decided])
                picks = [decided.picks for decided in self._decided if decided.picks is not None]
                more |= {"experts": experts if experts.shape[1:] != (0, 0) else None}
                more |= {"picks": np.concatenate(picks) if picks else None}
            self._write(lambda journal: journal.append(*arrays, **more))
        for trajectory in self._finished:
            self._write(lambda journal, of=trajectory: journal.finish(of))
        self._clear()

    def _clear(self) -> None:
        self._finished: list[Trajectory] = []
        self._drawn: list[tuple[int, int, float, int]] = []
        self._sets: list[np.ndarray] = []
        self._fed: list[int] = []
        self._decided: list[Decisions] = []

    def _write(self, call: Any) -> None:
        if self._journal is None:
            return
        from .journal import JournalError

        try:
            call(self._journal)
        except JournalError as error:
            _LOG.error("the engine goes on without its journal: %s", error)
            self._journal, self.lost = None, True
