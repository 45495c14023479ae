"""A document's log-probs are the same alone, in any chunks from a cache, and after tokens that were taken back."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amalgam.model import DeepseekV4
from amalgam.model.layout import packed

from .. import tiny
from ..tiny import CSA, HCA, SWA

VOCABULARY = 61
LARGEST = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Differences of log-probs: fp32 is what V4 computes in, and float64 shows that only rounding differs."""


def made(
    seed: int, layers: tuple[str, ...], dtype: torch.dtype = torch.float32, csa: int = 4, hca: int = 7, **changes
) -> DeepseekV4:
    """Many heads for the indexer, so that its ties are rare."""
    fields = {
        "num_hidden_layers": len(layers), "layer_types": list(layers), "compress_rates": {CSA: csa, HCA: hca},
        "mlp_layer_types": ["hash_moe", *["moe"] * (len(layers) - 1)], "vocab_size": VOCABULARY, "index_n_heads": 16,
    }  # fmt: skip
    return tiny.model(seed, **(fields | changes)).to(dtype).eval()


def random_documents(lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]


def borders(parts: list[Tensor]) -> Tensor:
    return torch.tensor([0, *map(len, parts)]).cumsum(0).int()


def distributions(model: DeepseekV4, hidden: Tensor) -> Tensor:
    return torch.log_softmax(model.logits(hidden), -1)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=LARGEST[expected.dtype])


@torch.no_grad()
def alone(model: DeepseekV4, documents: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs of the vocabulary [n, V] and expert ids, document by document."""
    outputs = [model(d, borders([d])) for d in documents]
    return [distributions(model, o.hidden) for o in outputs], [o.experts for o in outputs]


class Reader:
    """Feeds documents to a cache, and compares what comes out with each document alone."""

    def __init__(self, model: DeepseekV4, documents: list[Tensor], slack: int):
        self.model, self.documents = model, documents
        self.logprobs, self.experts = alone(model, documents)
        self.cache = model.new_cache(len(documents), max(map(len, documents)) + 2 * slack, slack)

    @property
    def left(self) -> list[int]:
        return [len(d) - n for d, n in zip(self.documents, self.cache.length.tolist(), strict=True)]

    def feed(self, counts: list[int], wrong: list[int] | None = None) -> None:
        """The next `counts` tokens of each document, and after them `wrong` ones, which are taken back."""
        wrong = wrong or [0] * len(counts)
        at = self.cache.length.tolist()
        right = [d[i : i + n] for d, i, n in zip(self.documents, at, counts, strict=True)]
        other = [torch.randint(VOCABULARY, (n,)) for n in wrong]
        parts = [torch.cat(pair) for pair in zip(right, other, strict=True)]
        output = self.model.extend(torch.cat(parts), borders(parts), self.cache)
        sizes = [len(p) for p in parts]
        found = zip(distributions(self.model, output.hidden).split(sizes), output.experts.split(sizes), strict=True)
        for i, (logprobs, experts) in enumerate(found):
            own = slice(at[i], at[i] + counts[i])
            same(logprobs[: counts[i]], self.logprobs[i][own])
            assert torch.equal(experts[: counts[i]], self.experts[i][own])
        self.cache.rollback(self.cache.length - torch.tensor(wrong))


KINDS = st.sampled_from([SWA, CSA, HCA])
MODELS = st.builds(
    made,
    seed=st.integers(0, 9),
    layers=st.lists(KINDS, min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from([*LARGEST]),
    csa=st.integers(2, 6),
    hca=st.integers(2, 9),
    sliding_window=st.integers(1, 9),
    index_topk=st.integers(1, 5),
    head_dim=st.integers(8, 17),
    index_head_dim=st.integers(8, 11),
)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    model=MODELS, lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4), slack=st.integers(0, 4), data=st.data()
)
@torch.no_grad()
def test_any_chunks_and_any_rollback(model: DeepseekV4, lengths: list[int], slack: int, data: st.DataObject):
    """Chunks of 0 to 20 tokens a request; wrong ones after them are taken back, up to the slack."""
    reader = Reader(model, random_documents(lengths), slack)
    while any(reader.left):
        longest = data.draw(st.sampled_from([1, 2, 20]))
        counts = [data.draw(st.integers(0, min(n, longest))) for n in reader.left]
        if not any(counts):
            counts = [min(n, 1) for n in reader.left]
        wrong = [data.draw(st.integers(0, slack)) if n else 0 for n in counts]
        reader.feed(counts, wrong)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [*LARGEST], ids=str)
@pytest.mark.parametrize(
    "layers", [(SWA,), (CSA, CSA), (HCA, HCA), (HCA, CSA, SWA)], ids=["SWA", "CSA", "HCA", "mixed"]
)
def test_more_than_a_thousand_tokens(layers: tuple[str, ...], dtype: torch.dtype):
    """In large chunks, then by two, one of which is wrong, then by one; the indexer chooses 20 of up to 270."""
    model = made(3, layers, dtype, hca=13, sliding_window=32, index_topk=20, index_n_heads=32)
    reader = Reader(model, random_documents([1, 31, 332, 1087]), 1)
    while max(reader.left) > 60:
        reader.feed([min(n, size) for n, size in zip(reader.left, (1, 7, 100, 257), strict=True)])
    for step in range(60):
        counts = [min(n, 1) for n in reader.left]
        if any(counts):
            reader.feed(counts, [n * (step < 30) for n in counts])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [*LARGEST], ids=str)
def test_packed_at_any_place(dtype: torch.dtype):
    """Documents of 1 to 1,100 tokens in one pack, in two orders."""
    model = made(4, (HCA, CSA, SWA), dtype, sliding_window=11, index_topk=20, index_n_heads=32)
    documents = random_documents([1100, 1, 12, 57, 2, 408])
    expected, _ = alone(model, documents)
    for order in ([0, 1, 2, 3, 4, 5], [3, 1, 5, 0, 4, 2]):
        pack = [documents[i] for i in order]
        found = distributions(model, model(torch.cat(pack), borders(pack)).hidden).split([len(d) for d in pack])
        for i, logprobs in zip(order, found, strict=True):
            same(logprobs, expected[i])


@torch.no_grad()
def test_a_rollback_further_than_the_slack_is_refused():
    model = made(6, (SWA, CSA))
    cache = model.new_cache(2, 20, 3)
    model.extend(torch.arange(13), torch.tensor([0, 10, 13]), cache)
    with pytest.raises(
        ValueError, match=r"request 1 holds 3 tokens, has held 3, and cannot go back to 4: it can to 0 ... 3"
    ):
        cache.rollback(torch.tensor([10, 4]))
    with pytest.raises(ValueError, match=r"request 0 holds 10 tokens.* it can to 7 ... 10"):
        cache.rollback(torch.tensor([6, 3]))
    cache.rollback(torch.tensor([8, 0]))
    forks = cache.select(torch.tensor([1, 0, 0]))
    with pytest.raises(ValueError, match="request 1 holds 8 tokens, has held 10, and cannot go back to 6"):
        forks.rollback(torch.tensor([0, 6, 8]))
    forks.rollback(torch.tensor([0, 7, 8]))
    assert cache.length.tolist() == [8, 0]
    assert forks.length.tolist() == [0, 7, 8]


@torch.no_grad()
def test_a_cache_of_no_requests():
    cache = made(0, (SWA,)).new_cache(2, 8).select(torch.tensor([], dtype=torch.int64))
    assert cache.longest == 0 and cache.length.numel() == 0


def test_a_layout_ends_with_its_last_user():
    """By counting references: what waits for the garbage collector keeps a GPU's memory."""
    gc.disable()
    try:
        layout = packed(torch.tensor([0, 9]), 4, {4}, made(0, (CSA,)).frequencies())
        layout.seen(4).blocks.column(4)
        left = weakref.ref(layout)
        del layout
        assert left() is None
    finally:
        gc.enable()


def test_bad_chunks_are_refused():
    model = made(7, (SWA,))
    cache = model.new_cache(2, 5)
    for cu in ([0, 3], [0, 0, 0], [0, 2, 1], [1, 2, 3]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            model.extend(torch.zeros(3, dtype=torch.long), torch.tensor(cu), cache)
    with pytest.raises(ValueError, match="would hold 6 tokens, there is room for 5"):
        model.extend(torch.zeros(7, dtype=torch.long), torch.tensor([0, 6, 7]), cache)
    assert cache.length.tolist() == [0, 0]
