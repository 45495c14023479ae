"""A step on the device: moves in the cache, a forward over chunks, one over the requests that decode, and the drawing.

Nothing here waits for the device, but for what goes to host memory. A drawn token stays where the next step finds it,
so a step can be launched before the tokens of the last one are read. S slots; one more, without pages, is nobody's.
"""

import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.sampling import Draw, set_ids
from ..model import LanguageModel, Output
from ..model.config import CSA
from ..model.graph import DecodeGraphs
from .drawing import Drawing
from .plan import Chunk, Clear, CopyPage, Entry, Forget, Fork, Load, Move, Place, Plan, Save, Scrub
from .response import Decisions, Response
from .room import Room
from .settings import EngineSettings


class Fed(NamedTuple):
    """What came of feeding a request: the tokens from position `start` on, and what was drawn behind them."""

    response: Response
    start: int
    low: int  # of the forward's tokens, those that stay are `low` ... `high` - 1
    high: int
    tokens: list[int]
    logprobs: list[float]
    sets: list[np.ndarray | None]  # of int32 [any]: what each was drawn from


class Forward(NamedTuple):
    """A forward in flight. Requests were fed `sizes` tokens, T in all; R of them are `drawing`, s rows each."""

    responses: list[tuple[Response, int]]  # and the position of the first token fed
    sizes: list[int]
    drawing: list[bool]
    drafted: bool  # two rows each
    host: "Host"  # experts [T, L, k], picks [T, C, K]; tokens, logprobs [R s] and sets [R s, words]; counts [R]


class Host:
    """Tensors on their way to the host."""

    def __init__(self, tensors: dict[str, Tensor]):
        self._event = None
        if any(tensor.is_cuda for tensor in tensors.values()):
            tensors = {name: _pinned(tensor) for name, tensor in tensors.items()}
            self._event = torch.cuda.Event()
            self._event.record()
        self._tensors = tensors

    def arrays(self) -> dict[str, np.ndarray]:
        if self._event is not None:
            self._event.synchronize()
        return {name: tensor.numpy() for name, tensor in self._tensors.items()}


class Batch:
    """The cache of an engine with that room, and what runs on it."""

    slack = 0  # tokens that a step may take back
    stride = 1  # tokens that a request is fed when it decodes

    @staticmethod
    def extra_bytes(model: LanguageModel) -> int:
        """Of a slot, beside the cache's."""
        return 0

    def __init__(self, model: LanguageModel, room: Room, settings: EngineSettings):
        self.model: Any = model
        self.device = model.lm_head.weight.device
        self.experts, self.picks = settings.experts, Picks(model) if settings.picks else None
        self.drawing = Drawing(self.device, model.lm_head.weight.shape[0], settings.sets)
        self.cache = self.model.new_cache(room.slots + 1, room.capacity, self.slack, room.pages + 1, room.page)
        self.graphs = DecodeGraphs(model, self.cache) if self.device.type == "cuda" else None
        self._allocate()
        self.last = torch.zeros(room.slots + 1, dtype=torch.int64, device=self.device)  # tokens drawn, by slot
        self.saved: dict[Any, tuple[list[Tensor], int]] = {}
        self.seconds_per_byte = 1e-10  # of copies to the host; before the first, our guess

    @property
    def signature(self) -> dict[str, Any]:
        """Engines that have this in common can take over each other's requests."""
        return {"kind": type(self).__name__, "page": self.cache.page, "slack": self.slack}

    @torch.inference_mode()
    def _allocate(self) -> None:
        """Takes all the memory that there will ever be use for: a token of nobody's makes the cache's tensors."""
        nobody = self.to_device([self.cache.length.numel() - 1])
        self.model.extend(torch.zeros_like(nobody), self.to_device([0, 1]), self.cache, nobody)
        self.cache.length.zero_()
        self.cache.held.zero_()

    @torch.inference_mode()
    def run(self, plan: Plan, responses: Mapping[int, Response]) -> list[Forward]:
        """Does what is planned."""
        for move in plan.moves:
            self.move(move)
        # Shapes follow from the longest of the requests that are fed. The host knows it.
        self.cache.longest = max([start for _, start in plan.decodes] + [c.start for c in plan.chunks], default=0)
        forwards = []
        if plan.decodes:
            forwards.append(self.decode(plan.decodes, responses))
        if plan.chunks:
            forwards.append(self.prefill(plan.chunks, responses))
        return forwards

    # --- moves

    def move(self, move: Move) -> None:
        cache = self.cache
        match move:
            case Clear(slot):
                cache.length[slot] = cache.held[slot] = 0
            case Place(slot, first, pages):
                cache.table[slot, first : first + len(pages)] = self.to_device(pages, np.int32)
            case Fork(source, targets):
                self.fork(source, self.to_device(targets))
            case CopyPage(source, target):
                cache.copy_pages(self.to_device([source]), self.to_device([target]))
            case Scrub(slots, pages):
                self.scrub(self.to_device(slots), self.to_device(pages))
            case Save(key, slot, pages, length):
                began = time.monotonic()
                kept = [tensor.cpu() for tensor in self.take(slot, self.to_device(pages))]
                each = (time.monotonic() - began) / max(sum(tensor.nbytes for tensor in kept), 1)
                self.seconds_per_byte += 0.2 * (each - self.seconds_per_byte)
                self.saved[key] = kept, length
            case Load(key, slot, pages):
                self.put(slot, self.to_device(pages), *self.saved[key])
            case Forget(key):
                del self.saved[key]

    def fork(self, source: int, targets: Tensor) -> None:
        self.cache.copy_state(source, targets)

    def scrub(self, slots: Tensor, pages: Tensor) -> None:
        self.cache.scrub(slots, pages)

    def take(self, slot: int, pages: Tensor) -> list[Tensor]:
        """What a request holds, as copies."""
        return self.cache.take(slot, pages)

    def put(self, slot: int, pages: Tensor, kept: list[Tensor], length: int) -> None:
        self.cache.put(slot, pages, kept, length)

    # --- forwards

    def prefill(self, chunks: list[Chunk], responses: Mapping[int, Response]) -> Forward:
        mine = [responses[chunk.entry.id] for chunk in chunks]
        host = np.concatenate([r.known(c.start, c.stop) for r, c in zip(mine, chunks, strict=True)])
        tokens, slots = self.to_device(host), self.to_device(slots_of(c.entry for c in chunks))
        sizes = [c.stop - c.start for c in chunks]
        cu_seqlens = self.to_device(np.cumsum([0, *sizes]))
        output = self.model.extend(tokens, cu_seqlens, self.cache, slots)
        self.prefilled(chunks, tokens, sizes, output)
        drawn, drawing = None, [c.draws for c in chunks]
        if any(drawing):
            which = self.to_device([i for i, draws in enumerate(drawing) if draws])
            hidden = output.hidden[cu_seqlens[which + 1] - 1]
            rows = [(r, c.stop) for r, c in zip(mine, chunks, strict=True) if c.draws]
            drawn = self.draw(hidden, [r for r, _ in rows], [stop for _, stop in rows])
            self.last[slots[which]] = drawn.tokens
        fed = [(r, c.start) for r, c in zip(mine, chunks, strict=True)]
        positions = np.concatenate([np.arange(c.start, c.stop) for c in chunks])
        return self.forward(fed, sizes, output, positions, drawing, drawn)

    def prefilled(self, chunks: list[Chunk], tokens: Tensor, sizes: list[int], output: Output) -> None:
        """For what else keeps a cache of its own."""

    def decode(self, decodes: list[tuple[Entry, int]], responses: Mapping[int, Response]) -> Forward:
        mine = [responses[entry.id] for entry, _ in decodes]
        slots = self.to_device(slots_of(entry for entry, _ in decodes))
        tokens, positions = self.tokens(decodes, responses, slots), [position for _, position in decodes]
        output = self.graphs.decode(tokens, slots) if self.graphs else self.model.decode(tokens, self.cache, slots)
        drawn = self.draw(output.hidden, mine, [position + 1 for position in positions])
        self.last[slots] = drawn.tokens
        fed = list(zip(mine, positions, strict=True))
        return self.forward(fed, [1] * len(mine), output, np.array(positions), [True] * len(mine), drawn)

    def tokens(self, decodes: list[tuple[Entry, int]], responses: Mapping[int, Response], slots: Tensor) -> Tensor:
        """int64 [B]: the tokens to feed, from the host where it knows them, and else from where they were drawn."""
        known = [responses[entry.id].at(position) for entry, position in decodes]
        if None not in known:
            return self.to_device(known)
        host = self.to_device([-1 if token is None else token for token in known])
        return torch.where(host < 0, self.last[slots], host)

    def draw(self, hidden: Tensor, responses: list[Response], positions: list[int]) -> Draw:
        """The tokens at `positions`, behind states [B, d]."""
        return self.drawing.draw(self.model.logits(hidden), responses, positions)

    def forward(
        self,
        responses: list[tuple[Response, int]],
        sizes: list[int],
        output: Output,
        positions: np.ndarray,
        drawing: list[bool],
        drawn: Draw | None,
        counts: Tensor | None = None,
    ) -> Forward:
        """Sends what came of a forward to the host. `drawn` is for the requests that are `drawing`, as many rows for
        each, of which the first `counts` int64 [R] are its tokens (None: all)."""
        tensors: dict[str, Tensor] = {}
        if self.experts:
            tensors["experts"] = output.experts.to(torch.int16)
        if self.picks is not None:
            tensors["picks"] = self.picks.of(output, self.to_device(positions))
        if drawn is not None:
            tensors |= {"tokens": drawn.tokens, "logprobs": drawn.logprobs}
            tensors |= {} if drawn.allowed is None else {"sets": drawn.allowed}
            tensors |= {} if counts is None else {"counts": counts}
        return Forward(responses, sizes, drawing, counts is not None, Host(tensors))

    def to_device(self, values: Any, dtype: Any = np.int64) -> Tensor:
        return self.drawing.to_device(values, dtype)


class Picks:
    """What indexers chose, also where they had no choice: `layers` of them choose `topk` entries of `ratio` tokens."""

    def __init__(self, model: LanguageModel):
        self.layers = (getattr(model.config, "layer_types", None) or []).count(CSA)
        if not self.layers:
            raise ValueError("picks: the model has no CSA layer, and so no indexer that picks anything")
        self.topk, self.ratio = model.config.index_topk, model.config.compress_rates[CSA]

    def of(self, output: Output, positions: Tensor) -> Tensor:
        """int32 [T, C, K], -1 behind the last."""
        if output.picks is not None:
            return output.picks
        numbers = torch.arange(self.topk, dtype=torch.int32, device=positions.device)
        seen = torch.where(numbers < ((positions + 1) // self.ratio).unsqueeze(1), numbers, -1)
        return seen.unsqueeze(1).expand(-1, self.layers, -1)


def landed(forward: Forward) -> tuple[Decisions, list[Fed]]:
    """Waits for a forward, and takes it apart: what was decided for its tokens, and each request's part."""
    host = forward.host.arrays()
    experts = host.get("experts", np.zeros((sum(forward.sizes), 0, 0), np.int16))
    tokens, logprobs = (host[name].tolist() if name in host else [] for name in ("tokens", "logprobs"))
    rows = sum(forward.drawing)
    stride = len(tokens) // rows if rows else 1
    counts = host["counts"].tolist() if "counts" in host else [stride] * rows
    sets: list[Any] = set_ids(torch.from_numpy(host["sets"])) if "sets" in host else [None] * len(tokens)
    results, low, row = [], 0, 0
    for (response, start), size, draws in zip(forward.responses, forward.sizes, forward.drawing, strict=True):
        count = counts[row] if draws else 0
        high = low + (count if stride > 1 else size)  # a draft that was wrong does not stay
        at = slice(row * stride, row * stride + count)
        results.append(Fed(response, start, low, high, tokens[at], logprobs[at], sets[at]))
        low, row = low + size, row + draws
    return Decisions(experts, host.get("picks")), results


def _pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def slots_of(entries: Iterable[Entry]) -> list[int]:
    return [entry.slot for entry in entries if entry.slot is not None]
