"""Requests in any slots and on any pages, with shared prompts, moved away and back: their log-probs are as alone."""

import math
import random
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amalgam.kernels.indexer import select
from amalgam.model import DeepseekV4
from amalgam.model.cache import probe

from ..tiny import CSA, HCA, SWA
from .test_cache import MODELS, alone, borders, distributions, made, random_documents, same


class Pool:
    """A cache of 6 slots whose pages are given out in a random order, as tokens need them."""

    def __init__(self, model: DeepseekV4, pages: int, page: int, capacity: int, draw: random.Random):
        self.model = model
        self.cache = model.new_cache(6, capacity, 2, pages=pages, page=page)
        self.free = draw.sample(range(1, pages), pages - 1)
        self.pages: dict[int, list[int]] = {}

    def grow(self, slot: int, tokens: int) -> None:
        own = self.pages.setdefault(slot, [])
        while len(own) * self.cache.page < tokens:
            own.append(self.free.pop())
        self.cache.table[slot, : len(own)] = torch.tensor(own, dtype=torch.int32)

    def feed(self, parts: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        slots = list(parts)
        for slot in slots:
            self.grow(slot, int(self.cache.length[slot]) + len(parts[slot]))
        pieces = list(parts.values())
        out = self.model.extend(torch.cat(pieces), borders(pieces), self.cache, torch.tensor(slots))
        return list(distributions(self.model, out.hidden).split([len(p) for p in pieces]))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(model=MODELS, seed=st.integers(0, 1000))
@torch.no_grad()
def test_any_slots_and_any_pages(model: DeepseekV4, seed: int):
    draw = random.Random(seed)
    documents = random_documents([draw.randint(1, 50) for _ in range(4)])
    expected, _ = alone(model, documents)
    ratios = {ratio for ratio, _ in model.compressors}
    page = math.lcm(*ratios) * draw.randint(1, 3)
    pool = Pool(model, 250, page, 60, draw)
    slot_of = dict(enumerate(draw.sample(range(6), 4)))
    at = [0] * 4
    while any(at[i] < len(d) for i, d in enumerate(documents)):
        some = [i for i in range(4) if at[i] < len(documents[i]) and draw.random() < 0.7]
        parts = {i: documents[i][at[i] : at[i] + draw.choice([1, 1, 2, 3, 20])] for i in some}
        if not parts:
            continue
        found = pool.feed({slot_of[i]: part for i, part in parts.items()})
        for (i, part), logprobs in zip(parts.items(), found, strict=True):
            same(logprobs, expected[i][at[i] : at[i] + len(part)])
            at[i] += len(part)
        if draw.random() < 0.3:  # one goes away, and comes back to another slot and other pages
            i = draw.choice(list(parts))
            _move(pool, slot_of, i, at[i], draw)


def _move(pool: Pool, slot_of: dict[int, int], i: int, length: int, draw: random.Random) -> None:
    old, new = slot_of[i], draw.choice([s for s in range(6) if s not in slot_of.values()])
    pages = pool.pages.pop(old)
    kept = pool.cache.take(old, torch.tensor(pages))
    pool.cache.clear(torch.tensor([old]))
    pool.free = pages + pool.free
    pool.grow(new, length)
    pool.cache.put(new, torch.tensor(pool.pages[new]), kept, length)
    slot_of[i] = new


@torch.no_grad()
@pytest.mark.parametrize("length", [3, 16, 29, 32])
def test_forks_share_the_pages_of_their_prompt(length: int):
    model = made(1, (SWA, CSA, HCA), hca=8)
    pool = Pool(model, 20, 16, 64, random.Random(length))
    (prompt,) = random_documents([length])
    rests = [torch.randint(61, (25,)) for _ in range(3)]
    pool.feed({2: prompt})
    full = length // 16
    for slot in (0, 5):
        pool.pages[slot] = pool.pages[2][:full]
        pool.grow(slot, length)
        if length % 16:
            pool.cache.copy_pages(torch.tensor([pool.pages[2][full]]), torch.tensor([pool.pages[slot][full]]))
    pool.cache.copy_state(2, torch.tensor([0, 5]))
    assert pool.cache.length.tolist() == [length, 0, length, 0, 0, length]
    expected, _ = alone(model, [torch.cat([prompt, rest]) for rest in rests])
    for start in range(0, 25, 5):
        parts = {slot: rest[start : start + 5] for slot, rest in zip([2, 0, 5], rests, strict=True)}
        for found, wanted in zip(pool.feed(parts), expected, strict=True):
            same(found, wanted[length + start : length + start + 5])


@torch.no_grad()
def test_what_a_slot_and_a_page_take():
    model = made(2, (SWA, CSA, HCA), hca=8, sliding_window=5)
    state, page = probe(model, 3)
    size = 4 * model.config.head_dim
    csa, index = 2 * (8 + 3) * 2 * size, 2 * (8 + 3) * 2 * 4 * model.config.index_head_dim
    assert state == 3 * (5 + 3) * size + csa + index + 2 * (8 + 3) * size
    assert page == 64 * (size + 4 * model.config.index_head_dim) + 32 * size
    big = model.new_cache(4, 1000, 3, pages=7)
    model.extend(torch.tensor([1]), torch.tensor([0, 1]), big, torch.tensor([3]))
    assert (big.state_bytes, big.page_bytes) == (state, page)


@torch.no_grad()
def test_a_page_that_a_ratio_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"a page of 20 tokens; want a multiple of \[4, 8\]"):
        made(2, (CSA, HCA), hca=8).new_cache(1, 20, page=20)


@torch.no_grad()
def test_what_a_failed_request_leaves_is_scrubbed():
    model = made(3, (SWA, CSA, HCA), hca=8)
    pool = Pool(model, 9, 16, 32, random.Random(0))
    pool.feed({1: torch.randint(61, (20,))})
    for layer in pool.cache.layers:
        for name, tensor in layer.items():
            tensor[pool.pages[1] if name in ("entries", "index_keys") else 1] = torch.nan
    pool.cache.scrub(torch.tensor([1]), torch.tensor(pool.pages[1]))
    pool.cache.clear(torch.tensor([1]))
    assert all(tensor.isfinite().all() for layer in pool.cache.layers for tensor in layer.values())


@torch.no_grad()
def test_picks_are_what_the_indexers_chose():
    """The learner's choice for the same tokens, from chunks and steps; none while everything visible is chosen."""
    model = made(5, (CSA, SWA, CSA), index_topk=4)
    (document,) = random_documents([40])
    chosen: list[torch.Tensor] = []
    with patch("amalgam.model.attention.select", lambda *args: chosen.append(select(*args)) or chosen[-1]):
        model(document, torch.tensor([0, 40]))
        whole, cache = torch.stack(chosen, dim=1), model.new_cache(1, 40)
        first = model.extend(document[:19], torch.tensor([0, 19]), cache)
        parts = [model.extend(document[19:33], torch.tensor([0, 14]), cache).picks]
        parts += [model.decode(token.view(1), cache).picks for token in document[33:]]
    assert first.picks is None
    assert whole.shape == (40, 2, 4) and torch.equal(torch.cat(parts), whole[19:])
