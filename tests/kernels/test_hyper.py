"""The Triton kernels of hyper-connections against the definition in float64, in Triton's interpreter on a CPU."""

import unittest.mock
from functools import partial

import pytest
import torch
from torch import Tensor

from amalgam.kernels import hyper
from amalgam.kernels.fused import hyper as fused_hyper
from amalgam.kernels.fused import hyper_backward
from amalgam.kernels.hyper import Update

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter, on machines without a GPU")

BOUND = {torch.float32: 3e-6, torch.bfloat16: 1e-2}
NAMES = "streams output post comb fn base scale weight".split()
OPTIONS = {"norm_eps": 1e-6, "eps": 1e-6}


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch):
    """And several groups and slices of each, several programs for tokens, more than one turn of each."""
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")
    monkeypatch.setattr(fused_hyper, "CHANNELS", 32)
    monkeypatch.setattr(fused_hyper, "STEP", 16)
    monkeypatch.setattr(fused_hyper, "ROWS", 16)
    monkeypatch.setattr(fused_hyper, "GROUP", 32)
    monkeypatch.setattr(fused_hyper, "LAG", 8)
    monkeypatch.setattr(hyper_backward, "PROGRAMS", 6)


def inputs(tokens: int, n: int, d: int, head: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """By name; the gates are far from their ends, and comb far from any fixed point."""
    logits = n if head else (2 + n) * n
    made = {
        "streams": torch.randn(tokens, n, d).to(dtype), "output": torch.randn(tokens, d).to(dtype),
        "post": torch.rand(n, tokens) * 2, "comb": torch.randn(n, n, tokens).softmax(0),
        "fn": torch.randn(logits, n * d) * (n * d) ** -0.5, "base": torch.randn(logits),
        "scale": torch.rand(1 if head else 3) + 0.5, "weight": torch.rand(d) + 0.5,
    }  # fmt: skip
    return made


def run(given: dict[str, Tensor], pending: bool, iterations: int) -> list[Tensor]:
    """Streams, x and, for a sublayer, post and comb."""
    streams, *update = (given[name] for name in NAMES[:4])
    weights = [given[name] for name in NAMES[4:]]
    made = Update(*update) if pending else None
    if iterations == 0:
        return list(hyper.leave(streams, made, *weights, **OPTIONS))
    return list(hyper.enter(streams, made, *weights, iterations=iterations, **OPTIONS))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("iterations", [0, 3])
def test_one_launch_has_the_bits_of_two(iterations: int, dtype: torch.dtype):
    """Its first, which splits fn and clears what programs count in, is spared."""
    given = inputs(70, 4, 48, iterations == 0, dtype)
    streams, *update = (given[name] for name in NAMES[:4])
    weights = [given[name] for name in NAMES[4:]]
    site = partial(hyper.enter, iterations=iterations) if iterations else hyper.leave
    expected = site(streams, Update(*update), *weights, **OPTIONS)
    with unittest.mock.patch.object(fused_hyper, "_prepare", None):
        for counts in hyper.counters(streams, 2):
            found = site(streams, Update(*update), *weights, **OPTIONS, counts=counts)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "tokens, n, d, pending, iterations",
    [
        (70, 4, 80, True, 6),
        (5, 4, 32, False, 3),
        (33, 2, 48, True, 1),
        (33, 1, 16, True, 2),
        (67, 4, 48, True, 0),
        (3, 2, 32, False, 0),
    ],
)
def test_values_and_gradients(tokens, n, d, pending, iterations, dtype, monkeypatch: pytest.MonkeyPatch):
    """In bf16 the definition has an error of its own, of sums over tokens that cancel: so much is ours too."""
    given = inputs(tokens, n, d, iterations == 0, dtype)
    used = [name for name in NAMES if pending or name not in ("output", "post", "comb")]
    found: list[dict[str, Tensor]] = []
    weights: list[Tensor] = []
    for wish, wide in (("reference", True), ("reference", False), ("triton", False)):
        monkeypatch.setenv("AMALGAM_KERNELS", wish)
        leaves = {name: (x.double() if wide else x.clone()).requires_grad_() for name, x in given.items()}
        outs = run(leaves, pending, iterations)
        weights = weights or [torch.randn_like(out.detach()) for out in outs]
        loss = sum((out * weight.to(out.dtype)).sum() for out, weight in zip(outs, weights, strict=True))
        gradients = torch.autograd.grad(loss, [leaves[name] for name in used])  # pyright: ignore
        values = {f"value {i}": out.detach() for i, out in enumerate(outs)}
        found.append(values | dict(zip(used, gradients, strict=True)))
    expected, plain, ours = found
    for name, value in expected.items():
        error, own = ((x[name].double() - value).abs().max() for x in (ours, plain))
        size = value.abs().max()
        print(f"{name}: {error:.1e}, the definition {own:.1e}, of {size:.1e}")
        assert ours[name].shape == value.shape and ours[name].dtype == plain[name].dtype
        assert error <= BOUND[dtype] * size + own, f"{name}: {error:.1e}, the definition {own:.1e}, of {size:.1e}"


def test_a_token_s_bits_are_its_own():
    """Alone, and anywhere in a batch: of the streams, x, post and comb."""
    given = inputs(70, 4, 80, False, torch.bfloat16)
    whole = run(given, True, 3)
    for tokens in (slice(0, 1), slice(69, 70), slice(3, 40)):
        cut = {"streams": 0, "output": 0, "post": -1, "comb": -1}
        part = {
            name: x[tokens] if cut.get(name) == 0 else x[..., tokens] if name in cut else x for name, x in given.items()
        }
        streams, x, post, comb = run(part, True, 3)
        assert torch.equal(streams, whole[0][tokens]) and torch.equal(x, whole[1][tokens])
        assert torch.equal(post, whole[2][:, tokens]) and torch.equal(comb, whole[3][:, :, tokens])


def test_no_token():
    given = {name: x.requires_grad_() for name, x in inputs(0, 4, 32, False, torch.float32).items()}
    outs = run(given, True, 3)
    assert [out.shape for out in outs] == [(0, 4, 32), (0, 32), (4, 0), (4, 4, 0)]
    sum(out.sum() for out in outs).backward()  # pyright: ignore
    assert not any(x.grad.any() for x in given.values() if x.grad is not None)


def test_what_the_kernels_do_not_take_is_named():
    for n, d, want in ((3, 32, "streams: 3"), (4, 24, "channels: 24")):
        with pytest.raises(ValueError, match=want):
            run(inputs(2, n, d, False, torch.float32), True, 3)
