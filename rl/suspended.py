"""Requests that gave way and were swapped, on disk beside the journal: after a kill they go on without a prefill.

What is saved is the request's state and its pages, with the decisions of its prompt, as its cache held them. It is of
use if the journal's last token is the one behind what was fed, and to an engine of the same version and sizes; all else
is prefilled.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .batch import Batch
from .plan import Plan, Save
from .response import Decisions, Response

_LOG = logging.getLogger(__name__)


class Suspended:
    """The snapshots in `folder` (rl/journal/snapshots.py); None: there are none. One that cannot be written or read is
    done without, with a line in the log."""

    def __init__(self, folder: Path | None, batch: Batch):
        self._folder, self._batch = folder, batch
        self._here: set[int] = set()

    def save(self, plan: Plan, responses: Mapping[int, Response], version: int) -> None:
        """Those that the plan has swapped."""
        if self._folder is None:
            return
        from .journal import JournalError, save_snapshot

        for move in plan.moves:
            if not isinstance(move, Save) or move.key[0] != "request" or move.key not in self._batch.saved:
                continue
            id, kept = move.key[1], self._batch.saved[move.key][0]
            prompt = responses[id].prompt.rows.all()
            tensors = {f"{i}": tensor for i, tensor in enumerate(kept)} | {"experts": torch.from_numpy(prompt.experts)}
            if prompt.picks is not None:
                tensors["picks"] = torch.from_numpy(prompt.picks)
            try:
                save_snapshot(self._folder, id, move.length, version, tensors, self._batch.signature)
                self._here.add(id)
            except JournalError as error:
                _LOG.warning("a request goes on without a snapshot: %s", error)

    def load(self, response: Response, version: int) -> int:
        """Makes a new request one that is swapped, if its state is here; the bytes of that, or 0."""
        if self._folder is None or response.request.past is None:
            return 0
        from .journal import JournalError, load_snapshot

        entry, fed = response.entry, response.entry.known - 1
        try:
            found = load_snapshot(self._folder, entry.id, fed, version)
        except JournalError as error:
            _LOG.warning("a request is prefilled again: %s", error)
            return 0
        if found is None or found[1] != self._batch.signature:
            return 0
        self._here.add(entry.id)
        tensors: dict[str, Any] = found[0]
        experts, picks = tensors.pop("experts").numpy(), tensors.pop("picks", None)
        decided = Decisions(experts, None if picks is None else picks.numpy())
        response.prompt.rows.add(0, decided, 0, len(experts))
        kept = [tensors[f"{i}"] for i in range(len(tensors))]
        self._batch.saved["request", entry.id] = kept, fed
        entry.fed = entry.most = fed
        return sum(tensor.nbytes for tensor in kept)

    def drop(self, id: int) -> None:
        """A request has ended."""
        if id in self._here:
            from .journal import drop_snapshots

            assert self._folder is not None
            drop_snapshots(self._folder, id)
            self._here.remove(id)
