"""The Triton kernels against the reference in float64, forward and every gradient, in Triton's interpreter on a CPU.

That a stack of them has the same bits in every way of computing it is tests/benchmarks/test_bits.py's."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from amalgam.kernels import attention, compress, embedding, indexer, norm, project, rope
from amalgam.kernels.fused import compress as fused_compress
from amalgam.kernels.fused import embedding as fused_embedding
from amalgam.kernels.fused import hopper_indexer
from amalgam.kernels.fused import indexer as fused_indexer
from amalgam.kernels.fused.attention import attend_forward
from amalgam.kernels.fused.attention_backward import attend_backward

from . import naive

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter, on machines without a GPU")

BOUND = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "") -> None:
    error, size = (found.double() - expected).abs().max(), expected.abs().max()
    assert error <= BOUND[dtype] * size, f"{what}: {error:.1e} of {size:.1e}"


def compare(function: Callable[..., Tensor], dtype: torch.dtype, *inputs: Tensor, fp32: tuple[int, ...] = ()) -> None:
    """`function` with Triton in `dtype` (inputs `fp32` stay) against itself with the reference in float64."""
    rounded = [x if i in fp32 else x.to(dtype) for i, x in enumerate(inputs)]
    weight = None
    results = []
    for wish, wide in (("reference", True), ("triton", False)):
        os.environ["AMALGAM_KERNELS"] = wish
        leaves = [(x.double() if wide else x.clone()).requires_grad_() for x in rounded]
        out = function(*leaves)
        weight = torch.randn_like(out.detach()) if weight is None else weight
        results.append([out.detach(), *torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves)])
    for i, (expected, found) in enumerate(zip(*results, strict=True)):
        close(found, expected, dtype, f"gradient {i - 1}" if i else "value")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "lengths, heads, width, window, ratio, topk",
    [
        ([5, 1, 9], 2, 16, 6, 0, 0),
        ([5, 1, 19], 2, 16, 6, 4, 0),
        ([3, 17], 20, 32, 8, 4, 3),
        ([4, 30], 3, 16, 5, 1, 20),
        ([70, 9], 2, 16, 20, 2, 0),
    ],
)
def test_attention(lengths, heads, width, window, ratio, topk, dtype: torch.dtype):
    place = naive.layout(lengths, window, ratio)
    seen, total = place.seen(ratio), sum(lengths)
    chosen = naive.random_choice(seen, topk).t().contiguous().t() if topk else None  # in any order of memory
    inputs = [torch.randn(total, heads, width), torch.randn(total, width), torch.randn(heads)]
    inputs += [torch.randn(naive.entries_of(place, ratio), width)] if ratio else []
    rotation = torch.polar(torch.ones(total, 3), torch.randn(total, 3)) if heads > 2 else None

    def attend(q, rows, sinks, entries=None):
        return attention.attend(q, rows, entries, sinks, seen, chosen, rotation)[0]

    compare(attend, dtype, *inputs, fp32=(2,))


def test_splits_of_many_entries_and_atomics(monkeypatch: pytest.MonkeyPatch):
    """A document with more entries than a program sums up, beside one with fewer: right, and each with its own bits."""
    monkeypatch.setattr("amalgam.kernels.fused.attention.SPLIT", 4)
    place = naive.layout([23, 5], 3, 2)
    seen = place.seen(2)
    q, rows, entries, sinks = torch.randn(28, 2, 16), torch.randn(28, 16), torch.randn(13, 16), torch.randn(2)
    out, lse = attend_forward(q, rows, entries, sinks, seen, None)
    wide = [x.double() for x in (q, rows, entries, sinks)]
    close(out, naive.attend(*wide, seen=seen, chosen=None), torch.float32)
    alone = naive.layout([5], 3, 2).seen(2)
    own, own_lse = attend_forward(q[23:], rows[23:], entries[11:], sinks, alone, None)
    assert torch.equal(own, out[23:]) and torch.equal(own_lse, lse[23:])
    chosen = naive.random_choice(seen, 4)
    out, lse = attend_forward(q, rows, entries, sinks, seen, chosen)
    grad = torch.randn_like(out)
    inputs = grad, q, rows, entries, sinks, out, lse, seen, chosen
    for found, expected in zip(attend_backward(*inputs), attend_backward(*inputs, atomic=True), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products(dtype: torch.dtype):
    compare(project.project, dtype, torch.randn(3, 7, 32), torch.randn(48, 32))
    compare(project.project_wide, dtype, torch.randn(70, 64), torch.randn(32, 64))
    compare(project.project_groups, dtype, torch.randn(9, 2, 32), torch.randn(2 * 16, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_table(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """A token that comes often, one that never comes, the last one; tiles that divide neither runs nor rows."""
    monkeypatch.setattr(fused_embedding, "TILE", 64)
    monkeypatch.setattr(fused_embedding, "CHANNELS", 16)
    tokens = torch.tensor([3, 0, 8, 3, 3, 1, 3, 3, 3, 8])
    compare(lambda table: embedding.embed(tokens, table, 2), dtype, torch.randn(9, 40))


def test_a_product_s_row_is_its_own():
    x, weight = torch.randn(130, 48).bfloat16(), torch.randn(64, 48).bfloat16()
    whole = project.project(x, weight)
    for rows in (slice(0, 1), slice(5, 21), slice(60, 125)):
        assert torch.equal(project.project(x[rows], weight), whole[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_and_rope(dtype: torch.dtype):
    rotation = rope.rotations(torch.arange(5), rope.inverse_frequencies(8, {"rope_theta": 100.0}))
    x, weight = torch.randn(5, 3, 16), torch.randn(16)
    compare(lambda x, w: norm.rms_norm(x, w, 1e-6), dtype, torch.randn(5, 24), torch.randn(24), fp32=(1,))
    compare(lambda x, w: norm.norm_rope(x, w, rotation, 1e-6), dtype, x, weight, fp32=(1,))
    compare(lambda x: norm.norm_rope(x, None, rotation, 1e-6), dtype, x)
    compare(lambda x: rope.apply_rope(x, rotation, inverse=True), dtype, x)


@pytest.mark.parametrize("ratio, channels", [(4, 32), (5, 16), (1, 32)])
def test_compression(ratio: int, channels: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused_compress, "SHARE", 16)  # several of them, where the ratio is 1
    place = naive.layout([19, 2, 3 * ratio], 4, ratio)
    windows, total = place.entries[ratio].windows, int(place.start.numel())

    def entries(values, scores, bias, weight):
        return compress.compress(values, scores, bias, weight, windows, 1e-6, values.dtype)

    values, scores = torch.randn(total, channels), 2 * torch.randn(total, channels)
    compare(entries, torch.float32, values, scores, torch.randn(ratio, channels), torch.randn(16))


def test_no_entry_is_zeros(monkeypatch: pytest.MonkeyPatch):
    """Attention multiplies what no query sees by 0, which may not be what memory happened to hold."""
    windows = naive.layout([12], 4, 4).entries[4].windows
    windows = windows._replace(number=windows.number.index_fill(0, torch.tensor([1]), -1))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *size, **like: x.new_full(size, 1e9, **like))
    found = compress.compress(
        torch.randn(12, 32), torch.randn(12, 32), torch.randn(4, 32), torch.ones(16), windows, 1e-6, torch.float32
    )
    assert found[1].eq(0).all() and found[0].ne(0).all() and found[2].ne(0).all()


@pytest.mark.parametrize("storage, width", [("fp8", 128), ("fp4", 32)])
def test_compressed_as_stored(storage: compress.Storage, width: int, monkeypatch: pytest.MonkeyPatch):
    """A value near two codes' border may fall on either side: nearly all are equal, none is off by over a step."""
    place = naive.layout([40, 9], 4, 4)
    windows = place.entries[4].windows
    inputs = torch.randn(49, 2 * width), torch.randn(49, 2 * width), torch.randn(4, 2 * width), torch.rand(width) + 0.5
    found = compress.compress(*inputs, windows, 1e-6, torch.float32, storage)
    monkeypatch.setenv("AMALGAM_KERNELS", "reference")
    expected = compress.compress(*inputs, windows, 1e-6, torch.float32, storage)
    same = (found - expected).abs() <= 1e-5 * expected.abs().max()
    assert same.float().mean() > 0.98
    assert (found - expected).abs().max() <= (0.07 if storage == "fp8" else 0.5) * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_indexer(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused_indexer, "KEYS", 16)  # several tiles
    place = naive.layout([30, 1, 45], 4, 2)
    seen = place.seen(2)
    q, weights, keys = torch.randn(76, 3, 16), torch.randn(76, 3), torch.randn(naive.entries_of(place, 2), 16)
    rounded = q.to(dtype), weights, keys.to(dtype)
    chosen = indexer.select(*rounded, seen, 5)
    monkeypatch.setenv("AMALGAM_KERNELS", "reference")
    assert torch.equal(chosen, indexer.select(*(x.double() for x in rounded), seen=seen, topk=5))
    tied = indexer.select(rounded[0], torch.zeros(76, 3), rounded[2], seen, 5)
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")
    assert torch.equal(tied, indexer.select(rounded[0], torch.zeros(76, 3), rounded[2], seen, 5))

    def scores(q, weights, keys):
        return indexer.index_scores(q, weights, keys, seen, chosen).masked_fill(chosen < 0, 0.0)

    compare(scores, dtype, q, weights, keys, fp32=(1,))


@pytest.mark.parametrize(
    "widest, counts",
    [(16, [61, 40, 16, 3, 0, 17]), (4096, [2500, 1024, 1025, 512, 9, 0])],
    ids=["parts", "a part of several sizes"],
)
def test_the_choice_among_many_scores(widest: int, counts: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused_indexer, "WIDEST", widest)
    scores = torch.randint(-3, 4, (6, max(counts))).float()  # many ties
    scores[0] = torch.randn(max(counts))
    chosen = torch.full((6, 4), 77, dtype=torch.int32)
    fused_indexer._best(scores, torch.tensor(counts, dtype=torch.int32) - 1, 1, 4, chosen)
    for row, count, found in zip(scores.tolist(), counts, chosen.tolist(), strict=True):
        want = sorted(sorted(range(count), key=lambda n: (-row[n], n))[:4])
        assert found == want + [-1] * (4 - len(want))


@pytest.mark.parametrize("lengths, group", [([700, 3, 1500, 40], 8), ([2100], 32), ([9, 5, 300], 1)], ids=str)
def test_the_items_of_index_scores(lengths: list[int], group: int, monkeypatch: pytest.MonkeyPatch):
    """They are those with a query that chooses, and has so many entries."""
    monkeypatch.setattr(hopper_indexer, "TILE", 64)
    seen = naive.layout(lengths, 4, 2).seen(2)
    counts, plan = hopper_indexer.planned(seen, 200, -(-seen.most // 64), group)
    complete = [n if n > 200 else 0 for n in ((seen.position + 1) // 2).tolist()]
    groups = [max(complete[start : start + group]) for start in range(0, len(complete), group)]
    tiles = -(-seen.most // 64)
    want = [g * tiles + tile for g, most in enumerate(groups) for tile in range(tiles) if tile * 64 < most]
    assert counts.tolist() == complete
    assert plan[: 1 + len(want)].tolist() == [len(want), *want]


def test_head_mass():
    place = naive.layout([5, 1, 30], 4, 2)
    seen = place.seen(2)
    q, rows, entries, sinks = torch.randn(36, 3, 16), torch.randn(36, 16), torch.randn(17, 16), torch.randn(3)
    chosen = naive.random_choice(seen, 5)
    _, lse = attention.attend(q, rows, entries, sinks, seen, chosen)
    found = attention.head_mass(q, rows, entries, sinks, seen, chosen, lse)
    wide = [x.double() for x in (q, rows, entries, sinks)]
    close(found, naive.head_mass(*wide, seen=seen, chosen=chosen), torch.float32)


@pytest.fixture(scope="module")
def model():
    """Every kind of layer; the indexer has to choose."""
    from .. import tiny

    kinds = [tiny.SWA, tiny.CSA, tiny.HCA]
    return tiny.model(0, layer_types=kinds, vocab_size=64, **tiny.FUSED).eval()


def test_a_model_s_gradients(model, monkeypatch: pytest.MonkeyPatch):
    tokens, cu = torch.randint(64, (25,)), torch.tensor([0, 17, 25])
    found = {}
    for wish in ("triton", "reference"):
        monkeypatch.setenv("AMALGAM_KERNELS", wish)
        model.zero_grad(set_to_none=True)
        model.logprobs(tokens, cu).sum().backward()
        found[wish] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found["triton"].keys() == found["reference"].keys()
    for name, expected in found["reference"].items():
        torch.testing.assert_close(found["triton"][name], expected, rtol=1e-3, atol=1e-4, msg=name)
