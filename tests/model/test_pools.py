"""Entries and keys kept as bytes: whatever requests do, the bits of a cache in the model's dtype."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from amalgam.kernels.cache_formats import cache_entry_bytes, index_key_bytes
from amalgam.model import DeepseekV4, pools
from amalgam.model.attention import Compressor
from amalgam.model.cache import Cache, probe
from amalgam.model.chunks import chunk
from amalgam.model.precision import set_precision, store_weights
from amalgam.model.step import step
from amalgam.settings import Precision

from .. import tiny
from ..tiny import CSA, HCA
from .test_cache import borders
from .test_graph import Trace, through

KEPT = {"entries", "index_keys"}
PAGE = 28  # tokens: 7 entries and keys of CSA, 4 entries of HCA


def made(dtype: torch.dtype, in_bytes: bool = True) -> DeepseekV4:
    layers = {"num_hidden_layers": 2, "layer_types": [CSA, HCA], "mlp_layer_types": ["hash_moe", "moe"]}
    model = tiny.model(0, **(tiny.FUSED | layers)).eval()
    set_precision(model, Precision(indexer="fp4", kv="fp8"))
    store_weights(model)
    for module in model.modules():
        if isinstance(module, Compressor):
            module.in_bytes &= in_bytes
    return model.to(dtype)


@pytest.fixture(params=["reference", "triton", "triton, few at once"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AMALGAM_KERNELS", request.param.split(",")[0])
    monkeypatch.setattr(pools, "TILE", 16)
    if "few" in request.param:  # one request, or so many chosen entries
        monkeypatch.setattr(pools, "SCRATCH", 100)
    return request.param


def attended(model: DeepseekV4, parts: list[Tensor], cache: Cache, slots: Tensor) -> Tensor:
    """Further states [n, d] of requests through the attention of all layers."""
    if all(len(part) == 1 for part in parts):
        place = step(slots, cache, **model.places())
    else:
        place = chunk(borders(parts).long(), slots, cache, **model.places())
    x = through(model, torch.cat(parts).to(model.lm_head.weight.dtype), place, cache)
    cache.advance(slots, place.lengths, place.most)
    return x


def kinds(cache: Cache) -> dict[str, list[torch.dtype]]:
    return {name: [layer[name].dtype for layer in cache.layers if name in layer] for name in KEPT}


class Twins:
    """The same requests in a cache of bytes and in a wide one, in 6 slots, on pages that are given out at random."""

    def __init__(self, dtype: torch.dtype, draw: random.Random):
        self.models = [made(dtype, in_bytes) for in_bytes in (True, False)]
        self.caches = [model.new_cache(6, 112, 2, pages=40, page=PAGE) for model in self.models]
        self.free, self.pages = draw.sample(range(1, 40), 39), {slot: [] for slot in range(6)}
        self.length = dict.fromkeys(range(6), 0)

    def grow(self, slot: int, tokens: int) -> None:
        own = self.pages[slot]
        while len(own) * PAGE < tokens:
            own.append(self.free.pop())
        for cache in self.caches:
            cache.table[slot, : len(own)] = torch.tensor(own, dtype=torch.int32)

    def feed(self, counts: dict[int, int]) -> list[Tensor]:
        """Random states: what the two models give."""
        parts = [torch.randn(count, 32) for count in counts.values()]
        for slot, count in counts.items():
            self.length[slot] += count
            self.grow(slot, self.length[slot])
        pairs = zip(self.models, self.caches, strict=True)
        return [attended(model, parts, cache, torch.tensor(list(counts))) for model, cache in pairs]

    def fork(self, source: int, target: int) -> None:
        full = self.length[source] // PAGE
        self.pages[target], self.length[target] = self.pages[source][:full], self.length[source]
        self.grow(target, self.length[source])
        for cache in self.caches:
            cache.copy_state(source, torch.tensor([target]))
            if self.length[source] % PAGE:
                last = [torch.tensor([self.pages[slot][full]]) for slot in (source, target)]
                cache.copy_pages(*last)

    def move(self, source: int, target: int) -> None:
        old, self.pages[source] = self.pages[source], []
        kept = [cache.take(source, torch.tensor(old)) for cache in self.caches]
        for cache in self.caches:
            cache.clear(torch.tensor([source]))
        self.length[target], self.length[source] = self.length[source], 0
        self.grow(target, self.length[target])
        for cache, state in zip(self.caches, kept, strict=True):
            cache.put(target, torch.tensor(self.pages[target]), state, self.length[target])


@torch.no_grad()
def test_the_bits_of_a_wide_cache(kernels: str):
    """Long chunks of one and of several, short ones, steps, forks, moves. In fp32 entries stay wide, keys do not."""
    dtype = torch.float32 if kernels == "triton, few at once" else torch.bfloat16
    twins = Twins(dtype, random.Random(3))
    for counts in ({2: 19}, {0: 9, 5: 11}, {2: 1, 0: 1, 5: 1}, {5: 3, 2: 2, 0: 0}):
        assert torch.equal(*twins.feed(counts)), counts
    twins.fork(2, 4)
    twins.move(0, 3)
    for counts in ({4: 1, 2: 1, 3: 1, 5: 1}, {4: 2, 3: 3}, {4: 1, 3: 1}):
        assert torch.equal(*twins.feed(counts)), counts
    wide = {name: [torch.uint8 if name == "index_keys" or dtype == torch.bfloat16 else dtype] for name in KEPT}
    assert kinds(twins.caches[0]) == {"entries": 2 * wide["entries"], "index_keys": wide["index_keys"]}
    assert kinds(twins.caches[1]) == {"entries": 2 * [dtype], "index_keys": [dtype]}


@torch.no_grad()
def test_what_is_not_finite_stays_with_its_request(kernels: str):
    """Of two requests beside each other the one whose entries become NaN is NaN, the other goes on as if alone."""
    model, found = made(torch.bfloat16), []
    for bad in (False, True):
        cache, both = model.new_cache(2, 60, page=PAGE), torch.arange(2)
        torch.manual_seed(5)
        attended(model, [torch.randn(13, 32), torch.randn(14, 32)], cache, both)
        if bad:
            for layer in cache.layers:
                for name in layer.keys() & {"values", "index_values"}:
                    layer[name][0] = torch.nan
        found.append(torch.stack([attended(model, list(torch.randn(2, 1, 32)), cache, both) for _ in range(3)]))
        cache.scrub(torch.tensor([0]), cache.table[0].long())
        assert all(tensor.isfinite().all() for layer in cache.layers for tensor in layer.values())
    fine, spoilt = found
    assert torch.equal(fine[:, 1], spoilt[:, 1]) and fine.isfinite().all()
    assert spoilt[-1, 0].isnan().any()


@torch.no_grad()
def test_a_step_asks_for_nothing_and_has_one_shape(kernels: str, monkeypatch: pytest.MonkeyPatch):
    """So it may be recorded, with a part of the requests at a time too."""
    if kernels == "reference":
        pytest.skip("the reference is never recorded")
    launch = GridExecutor.__call__

    def untraced(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():  # the interpreter computes bf16 and FP8 with PyTorch
            launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", untraced)
    model, traces = made(torch.bfloat16), []
    for lengths in ([27, 1, 6], [3, 13, 20]):
        cache = model.new_cache(3, 30, page=PAGE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AMALGAM_KERNELS", "reference")
            attended(model, [torch.randn(n, 32) for n in lengths], cache, torch.arange(3))
        cache.longest = cache.capacity - 1
        with Trace() as trace:
            attended(model, list(torch.randn(3, 1, 32)), cache, torch.arange(3))
        traces.append(trace.operations)
    assert len(traces[0]) > 100 and traces[0] == traces[1]


@torch.no_grad()
def test_bytes_of_a_page():
    entry, key = cache_entry_bytes(16, 8), index_key_bytes(16)
    assert (entry, key) == (32, 9)  # 8 codes, 8 times bf16, a scale, up to a multiple of 8; half of 16 and a scale
    assert probe(made(torch.bfloat16), 0, PAGE)[1] == (7 + 4) * entry + 7 * key
    assert probe(made(torch.float32), 0, PAGE)[1] == (7 + 4) * 16 * 4 + 7 * key
    assert probe(made(torch.bfloat16, in_bytes=False), 0, PAGE)[1] == (7 + 4) * 16 * 2 + 7 * 16 * 2


@torch.no_grad()
def test_only_models_that_hold_what_is_stored_keep_bytes():
    """And nothing that is kept in full."""
    learner, full = tiny.model(0, **tiny.FUSED), tiny.model(0, **tiny.FUSED)
    set_precision(learner, Precision(indexer="fp4", kv="fp8"))
    store_weights(full)
    for model in (learner, full):
        _, cache = model.bfloat16().prefill(torch.arange(9), torch.tensor([0, 9]), 9)
        assert kinds(cache) == {"entries": 2 * [torch.bfloat16], "index_keys": [torch.bfloat16]}
