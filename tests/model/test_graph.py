"""A decoding step can be recorded: it asks the device for nothing, and its shapes do not follow from the lengths.

That a recorded step has the step's bits is tests/benchmarks/test_bits.py's; the learner's are tests/rl's."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from amalgam.model import DeepseekV4
from amalgam.model.chunks import Chunk, chunk
from amalgam.model.graph import DecodeGraph, DecodeGraphs

from .. import tiny

aten: Any = torch.ops.aten


class Asked(Exception):
    pass


class Trace(TorchDispatchMode):
    """What PyTorch computes, with its shapes; Asked for what a recording could not hold: a number or a shape that
    depends on values, and a tensor that comes from the host."""

    def __init__(self):
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None):
        kwargs = kwargs or {}
        depends = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if func in (aten.index.Tensor, aten.index_put_.default):
            depends = any(i is not None and i.dtype == torch.bool for i in args[1])
        elif func is aten.repeat_interleave.Tensor:
            depends = kwargs.get("output_size") is None
        if depends or func is aten.lift_fresh.default:
            raise Asked(func)
        shapes = [tuple(each.shape) for each in args if isinstance(each, torch.Tensor)]
        self.operations.append((str(func), *shapes))
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def model() -> DeepseekV4:
    return tiny.model(0, **tiny.FUSED).eval()


def through(model: DeepseekV4, x: torch.Tensor, place: Chunk, cache) -> torch.Tensor:
    for block, kept in zip(model.model.layers, cache.layers, strict=True):
        x = x + block.self_attn.extend(x, place, kept)[0]  # pyright: ignore
    return x


def filled(model: DeepseekV4, lengths: list[int]):
    cache = model.new_cache(len(lengths), 30)
    place = chunk(torch.tensor([0, *lengths]).cumsum(0), None, cache, **model.places())
    through(model, torch.randn(sum(lengths), 32), place, cache)
    cache.advance(None, place.lengths, place.most)
    return cache


@torch.no_grad()
def test_a_step_asks_for_nothing_and_has_one_shape(model: DeepseekV4, monkeypatch: pytest.MonkeyPatch):
    """Of requests that finish entries of both kinds, of one kind, and of none."""
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")
    traces = []
    for lengths in ([27, 0, 6], [2, 12, 9], [29, 3, 29]):
        cache, tokens = filled(model, lengths), torch.randint(512, (3,))
        cache.longest = cache.capacity - 1
        with Trace() as trace:
            model.decode(tokens, cache)
        assert cache.length.tolist() == [n + 1 for n in lengths]
        traces.append(trace.operations)
    assert len(traces[0]) > 100
    assert traces[0] == traces[1] == traces[2]


@torch.no_grad()
def test_what_asks_is_seen(model: DeepseekV4):
    """The chunk of any lengths asks, and so does the reference of the experts, which runs here."""
    cache = filled(model, [3, 4])
    with Trace(), pytest.raises(Asked):
        chunk(torch.arange(3), None, cache, **model.places())
    with Trace(), pytest.raises(Asked):
        model.model.layers[1].mlp(torch.randn(2, 32), torch.zeros(2, dtype=torch.int64), None)  # pyright: ignore


def test_a_graph_needs_a_cuda_device(model: DeepseekV4):
    cache = model.new_cache(2, 5)
    with pytest.raises(ValueError, match="needs a CUDA device; the inputs are on cpu"):
        DecodeGraph(lambda x: x, torch.zeros(2), cache)


@torch.no_grad()
def test_a_cleared_request_begins_again(model: DeepseekV4):
    documents = torch.randint(512, (3, 12))
    _, cache = model.prefill(documents[:2, :9].flatten(), torch.tensor([0, 9, 18]), 12)
    cache.clear(torch.tensor([0]))
    assert cache.length.tolist() == [0, 9] and cache.longest == 9
    for i in range(3):
        out = model.decode(torch.stack([documents[2, i], documents[1, 9 + i]]), cache)
        for row, document in zip(out.hidden, (documents[2, : i + 1], documents[1, : 10 + i]), strict=True):
            alone = model(document, torch.tensor([0, len(document)])).hidden[-1]
            torch.testing.assert_close(row, alone, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="would hold 13 tokens, there is room for 12"):
        model.decode(documents[:2, 0], cache)


class Replayed:
    """What stands for a CUDA graph on a CPU: the step of the inputs that a replay copies in."""

    def __init__(self, step, inputs, cache, pool):
        self.step, self.inputs = step, [each.clone() for each in inputs]
        step(*self.inputs)

    def replay(self, *inputs):
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        return self.step(*self.inputs)


@torch.no_grad()
def test_a_batch_is_filled_up_to_a_graphs_size(model: DeepseekV4):
    """Batches of any slots, one larger than all graphs, beside the step without graphs."""
    lengths, tables = [5, 9, 1, 13, 4], torch.randperm(10).view(5, 2) + 1
    documents = [torch.randint(512, (n + 8,)) for n in lengths]
    caches = []
    for _ in range(2):
        cache = model.new_cache(6, 56, pages=11, page=28)
        cache.table[:5] = tables
        start = torch.cat([document[:n] for document, n in zip(documents, lengths, strict=True)])
        model.extend(start, torch.tensor([0, *lengths]).cumsum(0), cache, torch.arange(5))
        caches.append(cache)
    graphs = DecodeGraphs(model, caches[0], (1, 2, 4), Replayed)
    at = list(lengths)
    for slots in ([3], [0, 4], [2, 1, 0], [4, 3, 2, 1, 0], [1], [0, 2, 3], [4]):
        tokens, which = torch.stack([documents[i][at[i]] for i in slots]), torch.tensor(slots)
        found, plain = graphs.decode(tokens, which), model.decode(tokens, caches[1], which)
        torch.testing.assert_close(found.hidden, plain.hidden, rtol=0, atol=1e-5)
        assert found.experts.tolist() == plain.experts.tolist()
        assert caches[0].length.tolist() == caches[1].length.tolist()
        for i in slots:
            at[i] += 1
    assert sorted(graphs._graphs) == [1, 2, 4]
