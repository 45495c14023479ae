"""Has a token the same bits in training, in another pack, prefilled in chunks and decoded? And a gradient in every run?

    python benchmarks/bits.py

A stack of 12 attention blocks of all three kinds at V4-Flash's width (projections, compressors, indexers, RoPE; random
bf16 weights; residuals and norms between them), on 64 documents of 1 to 4,500 tokens, some of them long enough that CSA
has to choose. The forward of all of them in one pack, as in training, against: each document `alone`; all `in another
order`; `in chunks` with random borders, from a cache; then `token by token`, in a batch from which documents leave as
they end; and the same step `from a CUDA graph`, whose shapes are those of a full cache. Every bf16 number of every
token is compared. `gradients` runs the backward of a part of the pack 10 times, and compares every gradient with the
first. The exit code is 1 if a bit differs.

It needs a CUDA device. Tests run the same functions on a small stack in Triton's interpreter.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from attention_stack import decode, extend, flash_config, parameters, random_stack, train
from results import machine, print_table, write_result
from torch import Tensor

from amalgam.model import DeepseekV4
from amalgam.model.cache import Cache
from amalgam.model.config import CSA
from amalgam.model.graph import DecodeGraph

DOCUMENTS, LONGEST = 64, 4500
TAIL = 64  # tokens of a document that are decoded, at most
CHUNK = 700  # tokens of a document that are prefilled at once, at most
TRAINED, RUNS = 8192, 10  # tokens of the backward, and how often it runs


@dataclass
class Count:
    numbers: int = 0
    differing: int = 0

    def add(self, found: Tensor, expected: Tensor) -> None:
        self.numbers += found.numel()
        self.differing += differing(found, expected)


class Ways(NamedTuple):
    """How rows [T, ...] are drawn and become results [T, ...]: in a pack, with a cache, and a token of each request."""

    inputs: Callable[[DeepseekV4, int, int], Tensor]  # (model, T, seed)
    train: Callable[..., tuple[Tensor, object]]  # (model, rows, cu_seqlens)
    extend: Callable[[DeepseekV4, Tensor, Tensor, Cache], Tensor]
    decode: Callable[[DeepseekV4, Tensor, Cache], Tensor]


def differing(a: Tensor, b: Tensor) -> int:
    """How many numbers differ in a bit, as 0 and -0 do, or are not finite."""
    assert a.dtype == b.dtype and a.shape == b.shape
    as_bits = {2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return int(((a.contiguous().view(as_bits) != b.contiguous().view(as_bits)) | ~a.isfinite()).sum())


def random_lengths(count: int, longest: int, draw: random.Random) -> list[int]:
    """1, the longest, and others whose logarithms are evenly spread between."""
    return [1, longest, *(round(longest ** draw.random()) for _ in range(count - 2))]


@torch.no_grad()
def forward_counts(
    model: DeepseekV4, lengths: Sequence[int], tail: int, largest: int, seed: int, ways: Ways | None = None
) -> dict[str, Count]:
    """By way of computing documents of these lengths, what differs from the forward of all in one pack.

    Up to `tail` tokens of each are decoded; those before them go to the cache in chunks of up to `largest` a document.
    """
    ways = ways or Ways(inputs, train, extend, decode)
    draw, x = random.Random(seed), ways.inputs(model, sum(lengths), seed)
    whole, device = ways.train(model, x, borders(lengths, x.device))[0], x.device
    counts = {way: Count() for way in ("alone", "in another order", "in chunks", "token by token", "from a CUDA graph")}
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    ends = [start + n for start, n in zip(starts, lengths, strict=True)]
    for start, end in zip(starts, ends, strict=True):
        counts["alone"].add(ways.train(model, x[start:end], borders([end - start], device))[0], whole[start:end])
    order = draw.sample(range(len(lengths)), len(lengths))
    rows = torch.cat([torch.arange(starts[i], ends[i], device=device) for i in order])
    mixed = ways.train(model, x[rows], borders([lengths[i] for i in order], device))[0]
    counts["in another order"].add(mixed, whole[rows])

    cache, at = model.new_cache(len(lengths), max(lengths), slack=1), list(starts)
    stops = [end - draw.randint(1, min(tail, n)) if n > tail else end - n for end, n in zip(ends, lengths, strict=True)]
    while at != stops:
        most = draw.choice([2, largest, largest])  # two: a token and its draft, which the rings have room for
        sizes = [draw.randint(0, min(stop - a, most)) for stop, a in zip(stops, at, strict=True)]
        if any(sizes):
            rows = torch.cat([torch.arange(a, a + n, device=device) for a, n in zip(at, sizes, strict=True)])
            counts["in chunks"].add(ways.extend(model, x[rows], borders(sizes, device), cache), whole[rows])
            at = [a + n for a, n in zip(at, sizes, strict=True)]
    copy = cache.select(torch.arange(len(lengths), device=device))
    for rows, found in leaving(model, x, at, ends, copy, ways.decode):
        counts["token by token"].add(found, whole[rows])
    for rows, found in replayed(model, x, at, ends, cache, ways.decode):
        counts["from a CUDA graph"].add(found, whole[rows])
    return counts


def leaving(
    model: DeepseekV4, x: Tensor, at: list[int], ends: list[int], cache: Cache, decode: Callable[..., Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of x from `at` up to `ends` for each request, a token a step, and what they become; who ends leaves."""
    while at:
        rows = torch.tensor(at, device=x.device)
        yield rows, decode(model, x[rows], cache)
        stay = [i for i, (a, end) in enumerate(zip(at, ends, strict=True)) if a + 1 < end]
        if stay and len(stay) < len(at):
            cache = cache.select(torch.tensor(stay, device=x.device))
        at, ends = [at[i] + 1 for i in stay], [ends[i] for i in stay]


def replayed(
    model: DeepseekV4, x: Tensor, at: list[int], ends: list[int], cache: Cache, decode: Callable[..., Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same by a step of one shape: who ends stays, empty, and is fed what does not matter."""
    next_tokens = widest_step(model, x[at], cache, decode)
    running = list(range(len(at)))
    while running:
        found = next_tokens(x[at])
        yield torch.tensor(at, device=x.device)[running], found[running]
        ended = [i for i in running if at[i] + 1 == ends[i]]
        at = [a + 1 if i in running and i not in ended else a for i, a in enumerate(at)]
        running = [i for i in running if i not in ended]
        if ended:
            cache.clear(torch.tensor(ended, device=x.device))


def widest_step(
    model: DeepseekV4, x: Tensor, cache: Cache, decode: Callable[..., Tensor]
) -> Callable[[Tensor], Tensor]:
    """A replayed graph; on a CPU, which has none, the step that it would record."""

    def step(x: Tensor) -> Tensor:
        return decode(model, x, cache)

    def without_graph(x: Tensor) -> Tensor:
        cache.longest = cache.capacity - 1
        return step(x)

    return DecodeGraph(step, x, cache).replay if x.is_cuda else without_graph


def gradient_count(model: DeepseekV4, lengths: Sequence[int], runs: int, seed: int) -> Count:
    """The gradients of inputs and parameters, the indexers' by their own loss, in `runs` runs against the first."""
    if sparse := CSA in (model.config.layer_types or ()):
        model.unfreeze("indexer")
    x = inputs(model, sum(lengths), seed).requires_grad_()
    weight = inputs(model, sum(lengths), seed + 1)
    leaves, count, first = [x, *parameters(model).values()], Count(), None
    for _ in range(runs):
        out, losses = train(model, x, borders(lengths, x.device), index_loss=sparse)
        found = torch.autograd.grad((out * weight).sum() + sum(loss.sum() for loss in losses), leaves)
        first = first or found
        if found is not first:
            for one, expected in zip(found, first, strict=True):
                count.add(one, expected)
    return count


def inputs(model: DeepseekV4, tokens: int, seed: int) -> Tensor:
    """Random [T, d]."""
    weight = model.model.embed_tokens.weight
    generator = torch.Generator(weight.device).manual_seed(seed)
    return torch.randn(tokens, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)


def borders(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=12, help="12; with 1, 2 and 3 it shows which kind differs")
    layers = parser.parse_args().layers
    model = random_stack(flash_config(layers), torch.bfloat16, "cuda", seed=0)
    lengths = random_lengths(DOCUMENTS, LONGEST, random.Random(0))
    counts = forward_counts(model, lengths, TAIL, CHUNK, seed=0)
    few = [n for i, n in enumerate(lengths) if sum(lengths[: i + 1]) <= TRAINED]
    counts["gradients"] = gradient_count(model, few, RUNS, seed=0)
    print_table(["way", "numbers", "differing"], [[w, f"{c.numbers:,}", f"{c.differing:,}"] for w, c in counts.items()])
    result = {"layers": layers, "documents": lengths, "counts": {way: asdict(c) for way, c in counts.items()}}
    named = machine(("torch", "transformers", "triton")) | {"gpu": torch.cuda.get_device_name()}
    print(write_result("bits", {"machine": named, **result}).read_text())
    sys.exit(any(c.differing for c in counts.values()))


if __name__ == "__main__":
    main()
