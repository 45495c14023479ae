"""Are a request's tokens and log-probs its own? 256 ragged requests, once in peace and once in trouble.

    python benchmarks/responses.py [--device cuda] [--requests 256]

In peace: all at once, in one batch. In trouble: on three engines, where requests of 64 groups arrive at random, whose
caches are so small that requests are preempted, dropped and swapped, and whose prompts are prefilled in small chunks
beside what decodes; two of the engines die on the way, each with its last frame torn, and what they had is taken up
from their journals by the third. Then the learner's forward on the finished sequences, in packs.

On a GPU (the model of 729 million parameters, random weights, bf16) tokens and log-probs have to be equal bit for bit.
On a CPU (the preset `tiny`, fp32) log-probs to 1e-5, and tokens but where two candidates' noisy scores are closer than
that, or two of the indexer's or the router's: there the rest of the response is left out, and counted. Exit code 1
otherwise.
"""

import argparse
import itertools
import random
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from near_ties import near_ties
from results import machine, print_table, write_result
from training_setting import model_config

from amalgam.kernels.sampling import gumbel
from amalgam.model import DeepseekV4, LanguageModel, initialize, load
from amalgam.model.config import PRESETS
from amalgam.model.tokenizer import load as load_tokenizer
from amalgam.pipelines.corpus import document
from amalgam.rl.engine import Engine
from amalgam.rl.journal import Journal, recover
from amalgam.rl.records import recorded
from amalgam.rl.settings import EngineSettings
from amalgam.rl.trajectory import Request, SamplingParams, Trajectory

BOUND = 1e-5  # of log-probs on a CPU
PACK = 8192  # tokens of the learner's forward, at most, but for a longer sequence alone


@dataclass
class Found:
    """What differs from the responses in peace."""

    requests: int = 0
    tokens: int = 0  # compared
    differing: int = 0  # tokens, or on a GPU bits of log-probs
    largest: float = 0.0  # difference of a log-prob
    near_ties: int = 0  # responses that part behind a choice between two that are closer than rounding
    left_out: int = 0  # tokens behind


def random_requests(count: int, text: np.ndarray, prompt: int, response: int, seed: int) -> list[Request]:
    """Groups of 1 to 7; prompts of 1 to `prompt` tokens from any place of `text`, responses of up to `response`, many
    short and some long; temperatures between 0 and 1.5."""
    draw = np.random.default_rng(seed)
    requests: list[Request] = []
    while len(requests) < count:
        size = _spread(draw, prompt)
        start = int(draw.integers(len(text) - size))
        ids = text[start : start + size].astype(np.int32)
        limit = _spread(draw, response)
        temperature = float(draw.choice([0.0, 0.7, 1.0, 1.5], p=[0.1, 0.2, 0.5, 0.2]))
        params = SamplingParams(temperature=temperature, max_new_tokens=limit, seed=seed)
        group = len(requests)
        members = range(min(int(draw.integers(1, 8)), count - group))
        requests += [Request(1000 * group + i, group, ids, params) for i in members]
    return requests


def _written(tokenizer: Any, tokens: int) -> np.ndarray:
    """Text of the kind that the preset was trained on, under another seed."""
    ids: list[int] = []
    for index in itertools.count():
        ids += tokenizer.encode(document(1, index, frozenset()), add_special_tokens=False).ids
        if len(ids) >= tokens:
            break
    return np.array(ids[:tokens], np.int32)


def _spread(draw: np.random.Generator, most: int) -> int:
    return max(round(most ** draw.random() ** 0.5), 1)


def in_peace(model: LanguageModel, requests: list[Request], context: int) -> list[Trajectory]:
    settings = EngineSettings(max_batch=len(requests), prefill_tokens=2**20, context=context, memory=_memory(model))
    return Engine(model, (1,), settings=settings).generate(requests)


def _memory(model: LanguageModel) -> int | None:
    return None if model.lm_head.weight.is_cuda else 2**31


class Worker:
    def __init__(self, model: LanguageModel, folder: Path, settings: EngineSettings, page: int | None):
        self.folder = folder
        folder.mkdir()
        journal = Journal(folder, "worker", **recorded(model, settings))
        self.engine = Engine(model, (1,), settings=settings, journal=journal, page=page)


def in_trouble(
    model: LanguageModel, requests: list[Request], settings: EngineSettings, seed: int, page: int | None = None
) -> tuple[dict[int, Trajectory], Counter[str]]:
    """By request. Counts of preemptions, swaps, forks, tokens fed again, deaths and what was taken up."""
    draw, found, counts = random.Random(seed), dict[int, Trajectory](), Counter[str]()
    groups: dict[int, list[Request]] = {}
    for request in requests:
        groups.setdefault(request.group, []).append(request)
    coming = draw.sample(list(groups.values()), len(groups))
    total, deaths = len(requests), [len(requests) // 4, len(requests) // 2]
    with tempfile.TemporaryDirectory() as folder:
        workers = [Worker(model, Path(folder) / str(i), settings, page) for i in range(3)]
        while len(found) < total:
            for _ in range(draw.randint(1, 12) if draw.random() < 0.1 else 0):  # bursts, with quiet between
                worker = draw.choice(workers)
                for request in coming.pop() if coming else ():
                    worker.engine.submit(request)
            for worker in workers:
                for update in worker.engine.step():
                    if update.finished is not None:
                        found[update.id] = update.finished
            if deaths and len(found) >= deaths[0]:
                deaths.pop(0)
                lost = workers.pop(0)
                _count(counts, lost.engine)
                for request in _left(lost.folder, draw):
                    if request.id not in found:
                        counts["taken up"] += 1
                        counts["tokens taken up"] += 0 if request.past is None else len(request.past.response_ids)
                        workers[-1].engine.submit(request)
                counts["deaths"] += 1
        for worker in workers:
            _count(counts, worker.engine)
    return found, counts


def _count(counts: Counter[str], engine: Engine) -> None:
    for name in ("preemptions", "swaps", "forks", "refed_tokens", "prefilled_tokens"):
        counts[name] += int(engine.metrics()[name])


def _left(folder: Path, draw: random.Random) -> list[Request]:
    """What the journals of a dead engine say; the last bytes of one may be missing."""
    for file in folder.glob("*.journal"):
        data = file.read_bytes()
        file.write_bytes(data[: len(data) - draw.randint(1, 40)])
    return recover(folder)


@torch.no_grad()
def forward(model: LanguageModel, trajectories: list[Trajectory], temperatures: list[float]) -> list[np.ndarray]:
    """The learner's log-probs of the responses' tokens, in packs of one temperature; greedy ones' are at 1."""
    results: list[np.ndarray] = [np.zeros(0)] * len(trajectories)
    for temperature in sorted(set(temperatures)):
        left = [i for i, each in enumerate(temperatures) if each == temperature]
        while left:
            pack = [left.pop()]
            while left and sum(len(trajectories[i]) for i in [*pack, left[-1]]) <= PACK:
                pack.append(left.pop())
            rows = [np.concatenate([trajectories[i].prompt_ids, trajectories[i].response_ids]) for i in pack]
            tokens = torch.from_numpy(np.concatenate(rows)).long().to(model.lm_head.weight.device)
            cu_seqlens = torch.tensor([0, *map(len, rows)]).cumsum(0)
            logprobs = model.logprobs(tokens, cu_seqlens, temperature=temperature or 1.0).cpu().numpy()
            for i, row in zip(pack, np.split(logprobs, cu_seqlens[1:-1]), strict=True):
                results[i] = row[len(trajectories[i].prompt_ids) :]
    return results


@torch.no_grad()
def gap(model: LanguageModel, request: Request, before: np.ndarray, one: int, other: int) -> float:
    """How far apart the noisy scores of two candidates are behind a prompt and the tokens `before`."""
    tokens = torch.from_numpy(np.concatenate([request.prompt_ids, before])).long().to(model.lm_head.weight.device)
    scores = model.logits(model(tokens, torch.tensor([0, len(tokens)])).hidden[-1:])
    if request.params.temperature:
        at = torch.tensor([len(tokens)], device=tokens.device)
        id, seed = (torch.tensor([x], device=tokens.device) for x in (request.id, request.params.seed))
        scores = scores / request.params.temperature + gumbel(seed, id, at, scores.shape[1])
    return abs(float(scores[0, one] - scores[0, other]))


def near_tie_before(model: LanguageModel, request: Request, before: np.ndarray) -> bool:
    """Whether an indexer or a router had two of a score to choose from, in a prompt or the tokens `before`."""
    assert isinstance(model, DeepseekV4)
    tokens = torch.from_numpy(np.concatenate([request.prompt_ids, before])).long()
    return bool(near_ties(model, tokens, torch.tensor([0, len(tokens)])).any())


def compare(
    model: LanguageModel, requests: list[Request], expected: list[Trajectory], found: list[np.ndarray],
    logprobs: list[np.ndarray], exact: bool,
) -> Found:  # fmt: skip
    """Responses `found` and their log-probs against those `expected`."""
    result = Found(requests=len(requests))
    for request, wanted, ids, own in zip(requests, expected, found, logprobs, strict=True):
        same = min(len(ids), len(wanted.response_ids))
        parts = np.flatnonzero(ids[:same] != wanted.response_ids[:same])
        stop = int(parts[0]) if len(parts) else same
        difference = np.abs(own[:stop] - wanted.logprobs[:stop])
        over = np.flatnonzero(difference > BOUND)
        if len(over) and not exact and near_tie_before(model, request, ids[: over[0]]):
            result.near_ties += 1
            stop = int(over[0])
            result.left_out += len(wanted.response_ids) - stop
            difference = difference[:stop]
        elif stop < max(len(ids), len(wanted.response_ids)):
            pair = (int(ids[stop]), int(wanted.response_ids[stop])) if len(parts) else None
            near = pair and not exact and gap(model, request, ids[:stop], *pair) < BOUND
            result.near_ties += bool(near)
            result.differing += not near
            result.left_out += len(wanted.response_ids) - stop
        result.tokens += stop
        result.largest = max(result.largest, float(difference.max(initial=0.0)))
        if exact:
            bits = own[:stop].astype(np.float32).view(np.int32) != wanted.logprobs[:stop].view(np.int32)
            result.differing += int(bits.sum())
    return result


def measure(
    model: LanguageModel, requests: list[Request], settings: EngineSettings, exact: bool, page: int | None = None
) -> tuple[dict[str, Found], Counter[str]]:
    context = max(len(r.prompt_ids) + r.params.max_new_tokens for r in requests)
    settings = settings.model_copy(update={"context": context})
    expected = in_peace(model, requests, context)
    troubled, counts = in_trouble(model, requests, settings, seed=1, page=page)
    found = [troubled[r.id] for r in requests]
    learned = forward(model, expected, [r.params.temperature for r in requests])
    own = [t.response_ids for t in expected]
    return {
        "in trouble": compare(
            model, requests, expected, [t.response_ids for t in found], [t.logprobs for t in found], exact
        ),
        "the learner's forward": compare(model, requests, expected, own, learned, exact),
    }, counts


def holds(found: Found, exact: bool) -> bool:
    return found.differing == 0 and found.largest <= (0.0 if exact else BOUND)


def small(model: LanguageModel, pages: int, slots: int, page: int | None) -> EngineSettings:
    """A cache of so many pages and slots."""
    from amalgam.rl.room import room

    one = room(model, EngineSettings(memory=2**40, max_batch=1, context=1), 0, 0, page)
    memory = (slots + 1) * one.state_bytes + (pages + 1) * one.page_bytes
    swap = 3 * (one.state_bytes + 8 * one.page_bytes)  # for a few; others are dropped
    return EngineSettings(max_batch=slots, prefill_tokens=96, memory=memory, swap=swap)


def _told(value: float) -> str:
    return f"{value:.1e}" if isinstance(value, float) else f"{value:,}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--requests", type=int, default=256)
    options = parser.parse_args()
    exact = options.device != "cpu"
    if exact:
        model: LanguageModel = initialize(model_config(), seed=0).to(options.device, torch.bfloat16).eval()
        sizes, pages, slots, page = (2_500, 700), 60, 48, None
        text = np.random.default_rng(0).integers(2, model.lm_head.weight.shape[0], 10**6)
    else:
        torch.set_num_threads(1)
        model, sizes, pages, slots, page = load("tiny"), (300, 160), 16, 24, 32
        text = _written(load_tokenizer(PRESETS / "tiny"), 10**5)
    requests = random_requests(options.requests, text, *sizes, seed=0)
    found, counts = measure(model, requests, small(model, pages, slots, page), exact, page)
    table = [
        [way, *(f"{v:.1e}" if isinstance(v, float) else f"{v:,}" for v in asdict(f).values())]
        for way, f in found.items()
    ]
    print_table(["", *(name.replace("_", " ") for name in asdict(next(iter(found.values()))))], table)
    print(", ".join(f"{name} {count:,}" for name, count in counts.items()))
    named: dict[str, Any] = machine(("torch", "transformers", "numpy"))
    if exact:
        named["gpu"] = torch.cuda.get_device_name()
    parts = {way: asdict(each) for way, each in found.items()}
    write_result(f"responses_{options.device}", {"machine": named, "ways": parts, "counts": dict(counts)})
    return 0 if all(holds(each, exact) for each in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
