"""Sampling: the definition and, in Triton's interpreter, the kernels, against a naive twin that goes token by token."""

import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from amalgam.kernels import losses, sampling
from amalgam.kernels.fused import sampling as fused
from amalgam.kernels.sampling import Draw, DrawSettings, sample, set_ids

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
V = 160
WORD = 2**32 - 1


@pytest.fixture(params=["definition", pytest.param("kernels", marks=interpreted)])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use(request.param, monkeypatch)
    return request.param


def use(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several blocks and tiles of a row, and rows that are gathered and such that are not."""
    monkeypatch.setenv("AMALGAM_KERNELS", "triton" if way == "kernels" else "reference")
    monkeypatch.setattr(fused, "BLOCK", 64)
    monkeypatch.setattr(fused, "TILE", 64)
    monkeypatch.setattr(fused, "ROOM", 40)


def settings(rows: list[tuple]) -> DrawSettings:
    """Of (temperature, seed, top_k, top_p, min_p) each."""
    dtypes = torch.float64, torch.int64, torch.int32, torch.float32, torch.float32
    return DrawSettings(*(torch.tensor(x, dtype=t) for x, t in zip(zip(*rows, strict=True), dtypes, strict=True)))


def naive_noise(seed: int, request: int, position: int, token: int) -> float:
    """Of one token, in Python's integers and float64."""
    c = [token // 4, position, request & WORD, request >> 32]
    k = [seed & WORD, (seed >> 32) & WORD]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & WORD, (a >> 32) ^ c[3] ^ k[1], a & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return -math.log(-math.log(((c[token % 4] >> 9) + 0.5) / 2**23))


def naive_set(
    x: list[float], allowed: list[bool], temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[list[int], float]:
    """The ids, rising, and how close the nearest decision that rounding could turn was; exact ties are none."""
    left = sorted((i for i in range(len(x)) if allowed[i] and x[i] > -math.inf), key=lambda i: (-x[i], i))
    if top_k:
        left = left[:top_k]
    shares = [math.exp((x[i] - x[left[0]]) / (temperature or 1.0)) for i in left]
    total, before, kept, close = math.fsum(shares), 0.0, [], math.inf
    for i, share in zip(left, shares, strict=True):
        if top_p < 1 and kept:
            close = min(close, abs(before / total - top_p))
        if 0 < min_p < share:
            close = min(close, share / min_p - 1)
        if min_p > share:
            close = min(close, 1 - share / min_p)
        if (top_p >= 1 or not kept or before < top_p * total) and share >= min_p:
            kept.append(i)
        elif top_p < 1 and before >= top_p * total:
            break
        before += share
    return sorted(kept), close


def check(draw: Draw, logits: Tensor, at: DrawSettings, request: Tensor, position: Tensor, allowed: Tensor) -> int:
    """Every row against the naive twin, but for those that are close; how many there were to compare."""
    compared = 0
    for i, found in enumerate(set_ids(draw.allowed)):  # pyright: ignore[reportArgumentType]
        t, seed, k, p, share = (x[i].item() for x in at)  # pyright: ignore[reportOptionalIterable, reportOptionalSubscript]
        x = logits[i].tolist()
        ids, close = naive_set(x, allowed[i].tolist(), t, int(k), p, share)
        if close < 1e-5:
            continue
        compared += 1
        assert found.tolist() == ids, (i, len(found), len(ids))
        noise = [naive_noise(int(seed), int(request[i]), int(position[i]), v) if t else 0.0 for v in ids]
        scores = [x[v] / (t or 1.0) + n for v, n in zip(ids, noise, strict=True)]
        assert scores[ids.index(int(draw.tokens[i]))] > max(scores) - 1e-4
        want = x[int(draw.tokens[i])] / (t or 1.0) - math.log(math.fsum(math.exp(x[v] / (t or 1.0)) for v in ids))
        assert abs(float(draw.logprobs[i]) - want) < 1e-4
    assert bool(draw.finite.all())
    return compared


ROWS = [
    (1.0, 0, 0, 1.0, 0.0),
    (0.0, 1, 0, 1.0, 0.0),
    (0.7, 2**40 + 3, 5, 1.0, 0.0),
    (1.0, 2, 1, 1.0, 0.0),
    (1.5, 3, V, 1.0, 0.0),
    (1.5, 3, V + 9, 1.0, 0.0),
    (2.0, -5, 150, 0.95, 0.0),
    (0.8, 4, 0, 0.9, 0.0),
    (1.0, 4, 0, 1e-7, 0.0),
    (1.0, 4, 0, 0.0, 0.0),
    (1.0, 5, 0, 0.99999, 0.0),
    (0.9, 6, 0, 1.0, 0.05),
    (0.9, 6, 0, 1.0, 1.0),
    (1.1, 7, 40, 0.8, 0.02),
    (0.0, 8, 7, 0.6, 0.0),
    (30.0, 9, 100, 0.7, 0.9),
    (0.05, 9, 70, 0.999, 0.0),
    (1.0, 9, 5, 0.99999, 0.0),
]


@pytest.mark.parametrize(("steps", "masked"), [(0, True), (4, False)])  # no ties, or many
def test_rows_of_all_kinds(steps: int, masked: bool, way: str):
    logits = torch.randn(len(ROWS), V) * 4
    if steps:
        logits = (logits * steps / 4).round() / steps
    logits[:, 17] = -math.inf
    logits[:, 5], logits[:, 6] = 0.0, -0.0
    request, position = torch.arange(len(ROWS)) * 2**31, torch.arange(len(ROWS)) * 7
    allowed = torch.rand(len(ROWS), V) < 0.6 if masked else torch.ones(len(ROWS), V, dtype=torch.bool)
    at = settings(ROWS)
    mask = losses.packed_mask(allowed) if masked else None
    draw = sample(logits, request, position, at, mask, sets=True)
    assert check(draw, logits, at, request, position, allowed) >= len(ROWS) - 3
    assert draw.tokens.dtype == torch.int64 and draw.logprobs.dtype == torch.float32
    # The log-prob is that of the losses under the set.
    again = losses.chosen_logprobs(
        logits, draw.tokens, at.temperature.masked_fill(at.temperature == 0, 1.0), allowed=draw.allowed
    )
    assert torch.equal(again, draw.logprobs)
    # Neither other rows nor what else is asked for matter.
    some = torch.tensor([13, 0, 7])
    given = logits[some], request[some], position[some], DrawSettings(*(x[some] for x in at))  # pyright: ignore
    few = sample(*given, None if mask is None else mask[some])
    assert few.allowed is None
    assert torch.equal(few.tokens, draw.tokens[some]) and torch.equal(few.logprobs, draw.logprobs[some])


@interpreted
def test_kernels_choose_what_the_definition_chooses(monkeypatch: pytest.MonkeyPatch):
    """Bit for bit, whether a row's candidates are gathered or not."""
    cuts = [(0, 0.5, 0.0), (0, 0.97, 0.0), (35, 0.9, 0.0), (150, 0.99, 0.0), (5, 0.99999, 0.0), (0, 0.9, 0.2)]
    rows = [(1.0, 0, *cut) for cut in cuts] * 2
    logits = torch.randn(len(rows), V) * torch.tensor([[3.0]] * len(cuts) + [[0.01]] * len(cuts))
    logits[::3] = (logits[::3] * 2).round() / 2
    counter, draws = torch.arange(len(rows)), []
    for way, room in (("definition", 0), ("kernels", 8), ("kernels", 1000)):
        use(way, monkeypatch)
        monkeypatch.setattr(fused, "ROOM", room)
        draws.append(sample(logits, counter, counter, settings(rows), sets=True))
    for draw in draws[1:]:
        assert torch.equal(draw.tokens, draws[0].tokens) and torch.equal(draw.allowed, draws[0].allowed)  # pyright: ignore
        torch.testing.assert_close(draw.logprobs, draws[0].logprobs, rtol=1e-6, atol=1e-6)


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(
    x=st.lists(st.sampled_from([-math.inf, -2.0, -0.5, -0.0, 0.0, 0.25, 1.0, 3.0]) | st.floats(-9, 9, width=32))
    .map(lambda x: (x + [0.5])[:40]),
    row=st.tuples(
        st.sampled_from([0.0, 0.3, 1.0, 2.5]), st.integers(-(2**63), 2**63 - 1), st.integers(0, 45),
        st.floats(0, 1, width=32), st.floats(0, 1, width=32),
    ),
    hidden=st.sets(st.integers(0, 39)),
)  # fmt: skip
def test_any_row(x: list[float], row: tuple, hidden: set[int]):
    logits, allowed = torch.tensor([x]), torch.tensor([[i not in hidden or i == len(x) - 1 for i in range(len(x))]])
    hypothesis.assume(bool((allowed & (logits > -math.inf)).any()))
    counter, at = torch.tensor([len(x)]), settings([row])
    draw = sample(logits, counter, counter, at, losses.packed_mask(allowed), sets=True)
    hypothesis.assume(check(draw, logits, at, counter, counter, allowed) == 1)


def test_ties_at_a_border_go_to_the_lowest_ids(way: str):
    logits = torch.zeros(5, 64)
    logits[:, 40] = 1.0
    logits[3:] = 0.0
    rows = [(1.0, 0, 3, 1.0, 0.0), (1.0, 0, 0, 1e-3, 0.0), (1.0, 0, 0, 1.0, 1.0), (1.0, 0, 0, 0.25, 0.0)]
    rows.append((1.0, 0, 32, 0.5, 0.0))
    counter = torch.arange(5)
    draw = sample(logits, counter, counter, settings(rows), sets=True)
    found = [ids.tolist() for ids in set_ids(draw.allowed)]  # pyright: ignore[reportArgumentType]
    assert found == [[0, 1, 40], [40], [40], list(range(16)), list(range(16))]


def test_broken_rows_are_their_own(way: str):
    """NaN, +inf, nothing allowed, nothing but -inf; and the rows between them as if they were alone."""
    logits = torch.randn(9, V)
    logits[1, 140], logits[3, 0], logits[7] = math.nan, math.inf, -math.inf
    allowed = torch.rand(9, V) < 0.5
    allowed[5], allowed[4] = False, torch.arange(V) == 123
    allowed[1, 140] = False  # a NaN is one even so
    counter = torch.arange(9)
    mask = losses.packed_mask(allowed)
    for at in (
        DrawSettings.alike(9, 1.0, 3, logits.device),
        settings([(1.0, 3, 20, 0.9, 0.01)] * 4 + [(0.0, 3, 0, 0.9, 0.0)] * 5),
    ):
        draw = sample(logits, counter, counter, at, mask, sets=True)
        assert draw.finite.tolist() == [True, False, True, False, True, False, True, False, True]
        bad = ~draw.finite
        assert bool((draw.tokens[bad] == 0).all()) and bool(draw.logprobs[bad].isnan().all())
        sets = set_ids(draw.allowed)  # pyright: ignore[reportArgumentType]
        assert [len(sets[i]) == 0 for i in range(9)] == bad.tolist()
        assert sets[4].tolist() == [123] and int(draw.tokens[4]) == 123 and float(draw.logprobs[4]) == 0.0
        few = [2, 4]
        alone = sample(
            logits[few], counter[few], counter[few],
            DrawSettings(*(None if x is None else x[few] for x in at)), mask[few],  # pyright: ignore
        )  # fmt: skip
        assert torch.equal(alone.tokens, draw.tokens[few]) and torch.equal(alone.logprobs, draw.logprobs[few])


def test_tokens_are_what_they_were(way: str):
    """As they were drawn before tokens could be left out; so are they where a cut leaves all of them."""
    logits = torch.arange(40.0).mul(0.7).sin().mul(3).repeat(6, 1)
    request = torch.tensor([0, 1, 7, 123456789, 2**33 + 5, 2**40])
    position = torch.tensor([0, 5, 1000, 17, 3, 99999])
    for temperature, seed, tokens in (
        (0.8, 2**35 + 11, [11, 2, 21, 18, 12, 29]),
        (1.0, 3, [28, 39, 11, 29, 10, 38]),
    ):
        whole = DrawSettings.alike(6, temperature, seed, logits.device)
        assert sample(logits, request, position, whole).tokens.tolist() == tokens
        top_k = torch.tensor([0, 40, 41, 0, 0, 0]).int()
        all_of = whole._replace(top_k=top_k, top_p=torch.ones(6), min_p=torch.tensor([0, 0, 0, 0, 1e-9, 0]))
        assert sample(logits, request, position, all_of).tokens.tolist() == tokens


@pytest.mark.parametrize("cut", [(0, 1.0, 0.0), (5, 1.0, 0.0), (9, 0.8, 0.0), (0, 1.0, 0.1)], ids=str)
def test_the_distribution(cut: tuple):
    n = 40_000
    x = torch.randn(12)
    draw = sample(x.expand(n, 12), torch.arange(n), torch.full((n,), 5), settings([(0.8, 3, *cut)] * n), sets=True)
    ids, close = naive_set(x.tolist(), [True] * 12, 0.8, *cut)
    assert close > 1e-5
    p = torch.softmax(x[ids] / 0.8, 0)
    found = torch.bincount(draw.tokens, minlength=12)
    assert int(found.sum()) == int(found[ids].sum())
    chi_square = float(((found[ids] / n - p) ** 2 / p).sum() * n)
    assert chi_square < 40  # up to 11 degrees of freedom: exceeded once in 30,000 seeds
    torch.testing.assert_close(draw.logprobs, p.log()[torch.tensor([ids.index(t) for t in draw.tokens.tolist()])])


def test_other_counters_draw_other_tokens():
    logits, n = torch.zeros(64, 500), torch.arange(64)

    def tokens(seed: int, request: Tensor, position: Tensor) -> Tensor:
        return sample(logits, request, position, DrawSettings.alike(64, 1.0, seed, logits.device)).tokens

    first = tokens(3, n, n * 0)
    for other in (
        tokens(4, n, n * 0),
        tokens(3, n + 2**32, n * 0),
        tokens(3, n, n * 0 + 1),
        tokens(3 + 2**32, n, n * 0),
    ):
        assert int((other == first).sum()) < 8


def test_sets_are_listed():
    rows = [[], [0], [31, 32, V - 1], list(range(V)), []]
    allowed = torch.zeros(5, V, dtype=torch.bool)
    for row, ids in zip(allowed, rows, strict=True):
        row[ids] = True
    found = set_ids(losses.packed_mask(allowed))
    assert [ids.tolist() for ids in found] == rows and all(ids.dtype == np.int32 for ids in found)
    assert set_ids(torch.zeros(0, 3, dtype=torch.int32)) == []


def test_no_rows(way: str):
    nothing = torch.zeros(0, dtype=torch.int64)
    draw = sample(torch.zeros(0, V), nothing, nothing, DrawSettings.alike(0, 1.0, 0, nothing.device), sets=True)
    assert draw.tokens.shape == (0,) and draw.allowed is not None and draw.allowed.shape == (0, -(-V // 32))


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """At V4's vocabulary: the definition's sets, bit for bit, its tokens where nothing is cut, the learner's log-probs,
    and the same from a CUDA graph."""
    rows, vocabulary = len(ROWS) * 2, 129_280
    hidden, head = (
        torch.randn(rows, 512, device="cuda").bfloat16(),
        torch.randn(vocabulary, 512, device="cuda").bfloat16(),
    )
    head /= 8
    at = DrawSettings(*(x.cuda() for x in settings(ROWS * 2)))  # pyright: ignore[reportOptionalMemberAccess]
    counter, draws = torch.arange(rows, device="cuda"), []
    logits = losses.logits(hidden, head)
    for kernels in ("reference", "triton"):
        monkeypatch.setenv("AMALGAM_KERNELS", kernels)
        draws.append(sample(logits, counter, counter, at, sets=True))
    expected, found = draws
    assert found.allowed is not None and torch.equal(found.allowed, expected.allowed) and bool(found.finite.all())
    assert torch.equal(found.tokens, expected.tokens)
    for i, (temperature, *_) in enumerate(ROWS):
        given = hidden[i : i + 1], head, found.tokens[i : i + 1], temperature or 1.0
        assert torch.equal(losses.token_logprobs(*given, allowed=found.allowed[i : i + 1]), found.logprobs[i : i + 1])
    graph, held = torch.cuda.CUDAGraph(), logits.clone()
    with torch.cuda.graph(graph):
        again = sample(held, counter, counter, at, sets=True)
    for x in (logits.flip(0), logits):
        held.copy_(x)
        graph.replay()
    assert torch.equal(again.tokens, found.tokens) and torch.equal(again.logprobs, found.logprobs)
    assert again.allowed is not None and torch.equal(again.allowed, found.allowed)


def test_what_does_not_fit_is_named():
    x, n, good = torch.zeros(2, V), torch.arange(2), DrawSettings.alike(2, 1.0, 0, torch.device("cpu"))
    for want, given in {
        "logits: torch.float64": (x.double(), n, n, good),
        "request: torch.int32": (x, n.int(), n, good),
        r"position: torch.int64 \[3\]; want torch.int64 \[2\]": (x, n, torch.arange(3), good),
        "temperature: torch.float32": (x, n, n, good._replace(temperature=torch.ones(2))),
        r"top_k: torch.int64 \[2\]; want torch.int32": (x, n, n, good._replace(top_k=n)),
        "allowed: torch.bool": (x, n, n, good, torch.ones(2, V, dtype=torch.bool)),
    }.items():
        with pytest.raises(ValueError, match=want):
            sample(*given)


def test_philox_known_answers():
    """The vectors published with Random123."""
    cases = [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, want in cases:
        words = sampling.philox(tuple(torch.tensor([c]) for c in counter), key)  # pyright: ignore[reportArgumentType]
        assert tuple(int(w) for w in words) == want


def test_noise_is_finite_for_every_word(monkeypatch: pytest.MonkeyPatch):
    for word in (0, 2**32 - 1):
        monkeypatch.setattr(
            sampling, "philox", lambda counter, key, word=word: (torch.full_like(counter[0], word),) * 4
        )
        one = torch.tensor([1])
        assert sampling.gumbel(one, one, one, 8).isfinite().all()
