"""Each operation against its naive definition in float64, forward and every gradient."""

import math

import pytest
import torch
from torch import Tensor

from amalgam.kernels import attention, compress, hyper, indexer, moe, norm, rope
from amalgam.kernels.project import project_wide

from . import naive


def compare(ours, naive, *inputs: Tensor, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    """ours, in fp32 and in float64, against naive in float64: value and gradient of every floating-point input."""

    def run(function, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() if x.is_floating_point() else x for x in inputs]
        out = function(*leaves)
        assert out.dtype == dtype
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        return [out, *torch.autograd.grad((out * weight).sum(), [x for x in leaves if x.is_floating_point()])]

    expected = run(naive, torch.float64)
    for dtype, r, a in ((torch.float32, rtol, atol), (torch.float64, 1e-10, 1e-12)):
        for i, (found, want) in enumerate(zip(run(ours, dtype), expected, strict=True)):
            torch.testing.assert_close(found.double(), want, rtol=r, atol=a * (10 if i else 1))


def test_rms_norm():
    x, w = torch.randn(5, 3, 24), torch.randn(24)
    compare(lambda a, b: norm.rms_norm(a, b, 1e-6), lambda a, b: norm.reference_rms_norm(a, b, 1e-6), x, w)
    compare(lambda a: norm.rms_norm(a, None, 1e-6), lambda a: norm.reference_rms_norm(a, None, 1e-6), x)


def test_rope_rotates_interleaved_pairs_and_back():
    frequencies = rope.inverse_frequencies(8, {"rope_theta": 100.0})
    positions = torch.tensor([0, 1, 17])
    x = torch.randn(3, 2, 12)
    y = rope.apply_rope(x, rope.rotations(positions, frequencies))
    torch.testing.assert_close(y[..., :4], x[..., :4])
    for t, position in enumerate(positions.tolist()):
        for pair in range(4):
            angle = position * 100.0 ** (-2 * pair / 8)
            a, b = x[t, :, 4 + 2 * pair], x[t, :, 5 + 2 * pair]
            torch.testing.assert_close(y[t, :, 4 + 2 * pair], a * math.cos(angle) - b * math.sin(angle))
            torch.testing.assert_close(y[t, :, 5 + 2 * pair], a * math.sin(angle) + b * math.cos(angle))
    back = rope.apply_rope(y, rope.rotations(positions, frequencies), inverse=True)
    torch.testing.assert_close(back, x)


def test_rope_of_one_row_of_an_odd_width():
    """A single row counts as contiguous wherever its parts begin; pairs of channels may then lie at an odd place."""
    rotation = rope.rotations(torch.tensor([0, 3]), rope.inverse_frequencies(4, {"rope_theta": 100.0}))
    x = torch.randn(2, 7)
    rows = [rope.apply_rope(x[i : i + 1], rotation[i : i + 1]) for i in range(2)]
    assert torch.equal(torch.cat(rows), rope.apply_rope(x, rotation))


def test_yarn_has_v4s_correction_range():
    """facts of V4: 64 rotary dimensions, theta 160000: frequencies below 15 are plain, from 25 on divided by 16."""
    plain = rope.inverse_frequencies(64, {"rope_theta": 160000.0})
    yarn = {"rope_type": "yarn", "rope_theta": 160000.0, "factor": 16, "original_max_position_embeddings": 65536}
    scaled = rope.inverse_frequencies(64, yarn)
    torch.testing.assert_close(scaled[:16], plain[:16])
    torch.testing.assert_close(scaled[25:], plain[25:] / 16)
    assert (scaled[16:25] < plain[16:25]).all() and (scaled[16:25] > plain[16:25] / 16).all()
    with pytest.raises(ValueError, match="linear"):
        rope.inverse_frequencies(64, {"rope_type": "linear", "rope_theta": 1.0})


def test_attention_with_sink():
    """Documents of one token, shorter than a window, longer; no entries, all of them, some; a query that sees none."""
    for lengths, window, ratio, topk in (([1, 9, 2], 3, 0, 0), ([5, 1, 13], 4, 3, 0), ([5, 1, 13], 4, 2, 3)):
        place = naive.layout(lengths, window, ratio)
        seen, total = place.seen(ratio), sum(lengths)
        q, rows, sinks = torch.randn(total, 3, 8), torch.randn(total, 8), torch.randn(3)
        chosen = naive.random_choice(seen, topk) if topk else None
        rotation = torch.polar(torch.ones(total, 2), torch.randn(total, 2)).to(torch.complex128)
        inputs = [q, rows, sinks, *([torch.randn(naive.entries_of(place, ratio), 8)] if ratio else [])]

        def ours(q, rows, sinks, entries=None, place=(seen, chosen, rotation)):
            return attention.attend(q, rows, entries, sinks, *place)[0]

        def loops(q, rows, sinks, entries=None, place=(seen, chosen, rotation)):
            return naive.rope_back(naive.attend(q, rows, entries, sinks, *place[:2]), place[2])

        compare(ours, loops, *inputs)


def test_head_mass_is_the_probability_that_attention_gives_an_entry():
    place = naive.layout([5, 1, 13], 4, 2)
    seen = place.seen(2)
    q, rows, sinks, entries = torch.randn(19, 4, 8), torch.randn(19, 8), torch.randn(4), torch.randn(8, 8)
    chosen = naive.random_choice(seen, 3)
    found = attention.head_mass(q.requires_grad_(), rows, entries, sinks, seen, chosen, None)
    assert not found.requires_grad
    wide = [x.detach().double() for x in (q, rows, entries, sinks)]
    torch.testing.assert_close(found.double(), naive.head_mass(*wide, seen=seen, chosen=chosen), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ratio, channels", [(3, 8), (3, 16), (1, 16), (5, 8)])
def test_compression(ratio: int, channels: int):
    """One window an entry, and two; documents without an entry, with an unfinished window, with none."""
    place = naive.layout([7, ratio - 1 or 1, 2 * ratio], 4, ratio, rope_dim=4)
    total, windows = int(place.start.numel()), place.entries[ratio].windows

    def ours(values, scores, bias, weight):
        return compress.compress(values, scores, bias, weight, windows, 1e-6, values.dtype)

    def loops(values, scores, bias, weight):
        return naive.compress(values, scores, bias, weight, place, ratio)

    values, scores = torch.randn(total, channels), 2 * torch.randn(total, channels)
    compare(ours, loops, values, scores, torch.randn(ratio, channels), torch.randn(8))


def test_indexer_takes_the_highest_scores_and_the_lowest_of_ties():
    place = naive.layout([9, 1, 23], 4, 2)
    seen = place.seen(2)
    q, weights, keys = torch.randn(33, 4, 8), torch.randn(33, 4), torch.randn(naive.entries_of(place, 2), 8)
    everything = torch.arange(11).expand(33, 11).where(torch.arange(11) < ((seen.position + 1) // 2).unsqueeze(1), -1)
    scores = naive.index_scores(q, weights, keys, seen, everything)
    chosen = indexer.select(q, weights, keys, seen, 3)
    for t, row in enumerate(scores.tolist()):
        real = [n for n, score in enumerate(row) if score > float("-inf")]
        want = sorted(sorted(real, key=lambda n: (-row[n], n))[:3])
        assert chosen[t].tolist() == want + [-1] * (3 - len(want))
    tied = indexer.select(q, torch.zeros_like(weights), keys, seen, 3)
    assert tied[32].tolist() == [0, 1, 2] and tied[9].tolist() == [-1, -1, -1]


def test_index_scores_may_be_bf16_before_the_choice():
    """1 and 1 + 2^-10 are one number in bf16, so that the lower entry wins; 1 + 2^-6 is another."""
    keys = torch.tensor([[1.0], [1 + 2**-10], [1 + 2**-6]])
    one, seen = torch.ones(3, 1), naive.layout([3], 4, 1).seen(1)
    picks = [indexer.select(one.unsqueeze(-1), one, keys, seen, 1, dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert [p.flatten().tolist() for p in picks] == [[0, 1, 2], [0, 0, 2]]


def test_index_scores_are_those_of_the_choice():
    place = naive.layout([9, 1, 23], 4, 2)
    seen = place.seen(2)
    q, weights, keys = torch.randn(33, 4, 8), torch.randn(33, 4), torch.randn(naive.entries_of(place, 2), 8)
    chosen = indexer.select(q, weights, keys, seen, 3)

    def finite(scores_of):
        return lambda q, weights, keys: scores_of(q, weights, keys, seen, chosen).masked_fill(chosen < 0, 0.0)

    compare(finite(indexer.index_scores), finite(naive.index_scores), q, weights, keys)
    assert torch.equal(indexer.index_scores(q, weights, keys, seen, chosen) == float("-inf"), chosen < 0)


def test_index_kl():
    """Queries with none, one, some and all of the entries chosen; one whose chosen entries have no mass at all."""
    scores, mass, chosen = 3 * torch.randn(8, 6), torch.rand(8, 6) ** 4, torch.rand(8, 6) < 0.5
    chosen[0], chosen[1], chosen[2] = False, torch.arange(6) == 3, True
    chosen[4:6, :2] = True
    mass[4] = mass[4].masked_fill(chosen[4], 0.0)
    mass[5, chosen[5].nonzero()[0]] = 0.0

    def loops(scores):
        total = torch.zeros(8, dtype=torch.float64)
        for t in range(8):
            own = chosen[t].nonzero().flatten().tolist()
            whole = sum(float(mass[t, s]) for s in own)
            for s in own:
                if p := float(mass[t, s]) / whole if whole else 0.0:
                    q = scores[t, s].exp() / sum(scores[t, other].exp() for other in own)
                    total[t] = total[t] + p * (math.log(p) - q.log())
        return total

    def ours(scores):
        return indexer.index_kl(scores.masked_fill(~chosen, float("-inf")), mass.to(scores.dtype))

    compare(ours, loops, scores)
    found = ours(scores)
    assert (found >= -1e-6).all() and (found[:2] == 0).all() and found[4] == 0
    torch.testing.assert_close(indexer.index_kl(mass.log(), 7 * mass), torch.zeros(8), rtol=0, atol=1e-6)


def naive_mixing(streams, fn, base, scale, iterations):
    n = streams.shape[1]
    flat = streams.flatten(1)
    z = (flat / torch.sqrt(flat.square().mean(1, keepdim=True) + 1e-6)) @ fn.t()
    pre = torch.sigmoid(z[:, :n] * scale[0] + base[:n]) + 1e-6
    post = 2 * torch.sigmoid(z[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = torch.softmax((z[:, 2 * n :] * scale[2] + base[2 * n :]).view(-1, n, n), -1) + 1e-6
    for i in range(iterations):
        comb = comb if i == 0 else comb / (comb.sum(-1, keepdim=True) + 1e-6)
        comb = comb / (comb.sum(-2, keepdim=True) + 1e-6)
    return pre, post, comb


@pytest.mark.parametrize("iterations", [1, 4, 20])
def test_hyper_connection(iterations: int):
    streams, output = torch.randn(6, 4, 10), torch.randn(6, 10)
    fn, base, scale = torch.randn(24, 40) * 0.3, torch.randn(24), torch.rand(3)
    options = {"iterations": iterations, "norm_eps": 1e-6, "eps": 1e-6}

    def ours(x, f, fn, base, scale):
        pre, post, comb = hyper.mixing(x, fn, base, scale, **options)
        return torch.cat([hyper.collapse(x, pre).unsqueeze(1), hyper.expand(x, f, post, comb)], dim=1)

    def naive(x, f, fn, base, scale):
        pre, post, comb = naive_mixing(x, fn, base, scale, iterations)
        new = post.unsqueeze(-1) * f.unsqueeze(1) + torch.einsum("tjk,tjd->tkd", comb, x)
        return torch.cat([(pre.unsqueeze(-1) * x).sum(1, keepdim=True), new], dim=1)

    compare(ours, naive, streams, output, fn, base, scale, rtol=2e-4, atol=1e-5)
    comb = hyper.mixing(streams, fn, base, scale, **options)[2]
    torch.testing.assert_close(comb.sum(0), torch.ones(4, 6), rtol=0, atol=5e-5)


def naive_experts(x, ids, weights, gate_up, down, limit):
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for slot, e in enumerate(ids[t].tolist()):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            hidden = torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
            out[t] = out[t] + down[e] @ (hidden * weights[t, slot])
    return out


@pytest.mark.parametrize("case", ["spread", "all to one", "one token"])
def test_experts(case: str):
    tokens = 1 if case == "one token" else 7
    ids = torch.full((tokens, 2), 3) if case == "all to one" else torch.randint(0, 5, (tokens, 2))
    x, weights = torch.randn(tokens, 6), torch.rand(tokens, 2)
    gate_up, down = torch.randn(5, 8, 6), torch.randn(5, 6, 4)

    def ours(x, weights, gate_up, down):
        return moe.experts(x, ids, weights, gate_up, down, 0.8)

    def naive(x, weights, gate_up, down):
        return naive_experts(x, ids, weights, gate_up, down, 0.8)

    compare(ours, naive, x, weights, gate_up, down)


def test_route():
    x, gate, bias = torch.randn(9, 6), torch.randn(5, 6), torch.randn(5)
    ids, weights = moe.route(project_wide(x, gate), topk=2, scaling=1.5, bias=bias)
    scores = torch.sqrt(torch.log1p(torch.exp(x @ gate.t())))
    for t in range(9):
        want = sorted(range(5), key=lambda e: (-float(scores[t, e] + bias[e]), e))[:2]
        assert ids[t].tolist() == want
        torch.testing.assert_close(weights[t], scores[t, want] / scores[t, want].sum() * 1.5)
    tied, _ = moe.route(project_wide(x, torch.zeros(5, 6)), topk=2, scaling=1.0)
    assert tied.tolist() == [[0, 1]] * 9
    chosen = torch.randint(0, 5, (9, 2))
    chosen[4] = -1
    replayed, _ = moe.route(project_wide(x, gate), topk=2, scaling=1.5, bias=bias, chosen=chosen)
    chosen[4] = ids[4]
    assert torch.equal(replayed, chosen)


def test_the_gradient_of_routing_is_finite_for_any_logit():
    x = torch.tensor([[1.0, 0.0]])
    gate = torch.tensor([[-200.0, 0.0], [-150.0, 0.0], [200.0, 0.0], [-180.0, 0.0]], requires_grad=True)
    _, weights = moe.route(project_wide(x, gate), topk=2, scaling=1.0)
    weights.square().sum().backward()
    assert gate.grad is not None and gate.grad.isfinite().all()
