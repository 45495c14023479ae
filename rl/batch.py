"""A step on the device: moves in the cache, a forward over chunks, one over the requests that decode, and the drawing.

Nothing here waits for the device, but for what goes to host memory. A drawn token stays where the next step finds it,
so a step can be launched before the tokens of the last one are read. S slots; one more, without pages, is nobody's.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.sampling import DrawSettings, sample
from ..model import LanguageModel, Output
from ..model.config import CSA
from .plan import Chunk, Clear, CopyPage, Entry, Forget, Fork, Load, Move, Place, Plan, Save, Scrub
from .response import Decisions, Response


class Fed(NamedTuple):
    """What came of feeding a request: the tokens from `start` on, and what was drawn behind the last of them."""

    response: Response
    start: int
    decided: Decisions  # of the tokens that stay
    tokens: list[int]
    logprobs: list[float]
    drafted: bool


class Forward(NamedTuple):
    """A forward in flight. Chunks and decoding requests feed `sizes` tokens, T in all, and R of them draw."""

    responses: list[tuple[Response, int]]  # and the position of the first token fed
    sizes: list[int]
    draws: list[bool]
    host: "Host"  # experts [T, L, k], tokens and log-probs [R, s], how many of these count [R], picks [T, C, K] if any


class Host:
    """Tensors on their way to the host."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._event = None
        if tensors[0].is_cuda:
            tensors = [t.to("cpu", non_blocking=True) for t in tensors]
            self._event = torch.cuda.Event()
            self._event.record()
        self._tensors = tensors

    def arrays(self) -> list[np.ndarray]:
        if self._event is not None:
            self._event.synchronize()
        return [t.numpy() for t in self._tensors]


class Batch:
    """The cache of `slots` requests in `pages` pages (the model's size if `page` is None), and what runs on it."""

    slack = 0  # tokens that a step may take back
    stride = 1  # tokens that a request is fed when it decodes

    @staticmethod
    def extra_bytes(model: LanguageModel) -> int:
        """Of a slot, beside the cache's."""
        return 0

    def __init__(
        self,
        model: LanguageModel,
        slots: int,
        capacity: int,
        pages: int,
        page: int | None = None,
        *,
        experts: bool = True,
        picks: bool = False,
    ):
        self.model: Any = model
        self.device = model.lm_head.weight.device
        self.experts, self.picks = experts, Picks(model) if picks else None
        self.cache = self.model.new_cache(slots + 1, capacity, self.slack, pages + 1, page)
        self.last = torch.zeros(slots + 1, dtype=torch.int64, device=self.device)  # tokens drawn, by slot
        self.saved: dict[Any, tuple[list[Tensor], int]] = {}
        self.seconds_per_byte = 1e-10  # of copies to the host; before the first, our guess

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
        cu_seqlens = torch.tensor([0, *np.cumsum(sizes)])
        output = self.model.extend(tokens, cu_seqlens.to(self.device), self.cache, slots)
        self.prefilled(chunks, tokens, sizes, output)
        draws = [c.draws for c in chunks]
        which = self.to_device([i for i, c in enumerate(chunks) if c.draws])
        hidden = output.hidden[cu_seqlens.to(self.device)[which + 1] - 1]
        drawing = [(r, c.stop) for r, c in zip(mine, chunks, strict=True) if c.draws]
        drawn, logprobs = self.draw(hidden, [r for r, _ in drawing], [stop for _, stop in drawing])
        self.last[slots[which]] = drawn
        fed = [(r, c.start) for r, c in zip(mine, chunks, strict=True)]
        positions = np.concatenate([np.arange(c.start, c.stop) for c in chunks])
        return self.forward(fed, sizes, draws, output, positions, drawn.unsqueeze(1), logprobs.unsqueeze(1))

    def prefilled(self, chunks: list[Chunk], tokens: Tensor, sizes: list[int], output: Output) -> None:
        """For what else keeps a cache of its own."""

    def decode(self, decodes: list[tuple[Entry, int]], responses: Mapping[int, Response]) -> Forward:
        mine = [responses[entry.id] for entry, _ in decodes]
        slots = self.to_device(slots_of(entry for entry, _ in decodes))
        output = self.model.decode(self.tokens(decodes, responses, slots), self.cache, slots)
        positions = [position for _, position in decodes]
        drawn, logprobs = self.draw(output.hidden, mine, [p + 1 for p in positions])
        self.last[slots] = drawn
        fed = list(zip(mine, positions, strict=True)), [1] * len(mine), [True] * len(mine)
        return self.forward(*fed, output, np.array(positions), drawn.unsqueeze(1), logprobs.unsqueeze(1))

    def tokens(self, decodes: list[tuple[Entry, int]], responses: Mapping[int, Response], slots: Tensor) -> Tensor:
        """int64 [B]: the tokens to feed, from the host where it knows them, and else from where they were drawn."""
        known = [responses[entry.id].at(position) for entry, position in decodes]
        if None not in known:
            return self.to_device(known)
        host = self.to_device([-1 if token is None else token for token in known])
        return torch.where(host < 0, self.last[slots], host)

    def draw(self, hidden: Tensor, responses: list[Response], positions: list[int]) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B] at `positions`, behind states [B, d], and their log-probs fp32 [B]."""
        tokens = torch.zeros(len(responses), dtype=torch.int64, device=self.device)
        logprobs = torch.zeros(len(responses), dtype=torch.float32, device=self.device)
        if not responses:
            return tokens, logprobs
        logits = self.model.logits(hidden)
        kinds: dict[tuple[float, int], list[int]] = {}
        for i, response in enumerate(responses):
            kinds.setdefault((response.request.params.temperature, response.request.params.seed), []).append(i)
        for (temperature, seed), rows in kinds.items():
            ids = self.to_device([responses[i].request.id for i in rows])
            at, of = self.to_device([positions[i] for i in rows]), self.to_device(rows)
            found = sample(logits[of], ids, at, DrawSettings.alike(len(rows), temperature, seed, self.device))
            tokens[of], logprobs[of] = found.tokens, found.logprobs
        return tokens, logprobs

    def forward(
        self,
        responses: list[tuple[Response, int]],
        sizes: list[int],
        draws: list[bool],
        output: Output,
        positions: np.ndarray,
        tokens: Tensor,
        logprobs: Tensor,
        counts: Tensor | None = None,
    ) -> Forward:
        counts = torch.ones_like(tokens[:, 0]) if counts is None else counts
        experts = output.experts if self.experts else output.experts.new_zeros(len(positions), 0, 0)
        tensors = [experts.to(torch.int16), tokens, logprobs, counts]
        if self.picks is not None:
            tensors.append(self.picks.of(output, self.to_device(positions)))
        return Forward(responses, sizes, draws, Host(tensors))

    def to_device(self, values: Any, dtype: Any = np.int64) -> Tensor:
        tensor = torch.from_numpy(np.asarray(values, dtype))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


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


def fed(forward: Forward) -> list[Fed]:
    """Waits for a forward, and takes it apart."""
    experts, tokens, logprobs, counts, *picks = forward.host.arrays()
    results, start, row = [], 0, 0
    for (response, position), size, draws in zip(forward.responses, forward.sizes, forward.draws, strict=True):
        count = int(counts[row]) if draws else 0
        stop = start + (size if tokens.shape[1] == 1 else count)  # a draft that was wrong does not stay
        drawn = (tokens[row, :count].tolist(), logprobs[row, :count].tolist()) if draws else ([], [])
        decided = Decisions(experts[start:stop], picks[0][start:stop] if picks else None)
        results.append(Fed(response, position, decided, *drawn, drafted=tokens.shape[1] > 1))
        start, row = start + size, row + draws
    return results


def slots_of(entries: Iterable[Entry]) -> list[int]:
    return [entry.slot for entry in entries if entry.slot is not None]
