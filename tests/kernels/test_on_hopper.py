"""On a Hopper GPU: products with a weight and losses over the vocabulary beside float64, and their bits."""

from unittest import mock

import pytest
import torch
from torch import Tensor

from amalgam.kernels import losses
from amalgam.kernels.fused import linear, vocabulary

from .test_losses import naive_divergence, naive_masked, naive_scores

pytestmark = pytest.mark.gpu
TOKENS, WIDTH, VOCABULARY = 300, 64, 1200
SHAPES = [(4096, 512, 8192, 1, True), (1000, 1024, 1024, 1, False), (200, 512, 256, 4, False), (65, 48, 32, 1, True)]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


@pytest.mark.parametrize(("rows", "depth", "out", "groups", "wide"), SHAPES)
def test_a_product_has_one_row_s_bits(rows: int, depth: int, out: int, groups: int, wide: bool):
    """With few rows, with many, and with any GPU's kernel."""
    x, weight = random(rows, groups * depth), random(groups * out, depth)
    found = linear.multiply(x, weight, groups, wide)
    few = [linear.multiply(x[a:b], weight, groups, wide) for a, b in ((0, 7), (7, 64))]
    with mock.patch.object(linear, "is_hopper", lambda _: False):
        other = linear.multiply(x, weight, groups, wide)
    assert torch.equal(found, other) and torch.equal(found[:64], torch.cat(few))
    pairs = x.double().unflatten(1, (groups, depth)), weight.double().unflatten(0, (groups, out))
    expected = torch.einsum("tgi,goi->tgo", *pairs).flatten(1)
    assert (found.double() - expected).abs().max() < (1e-5 if wide else 4e-3) * expected.abs().max()


@pytest.mark.parametrize("kept", [0, 1 << 21, 1 << 27])
@pytest.mark.parametrize("kind", ["tokens", "masked", "reverse", "forward", "jensen_shannon"])
def test_losses(kind, kept: int, monkeypatch: pytest.MonkeyPatch):
    """What is kept of logits, and what is computed again; three teachers, and tokens of none."""
    monkeypatch.setattr(vocabulary, "PIECE", 0)
    monkeypatch.setattr(vocabulary, "BLOCK", 512)
    monkeypatch.setattr(vocabulary, "KEPT", kept)
    hidden, head, taught = random(TOKENS, WIDTH), random(VOCABULARY, WIDTH) / 4, random(TOKENS, 128)
    targets = torch.randint(VOCABULARY, (TOKENS,), device="cuda")
    allowed = torch.rand(TOKENS, VOCABULARY, device="cuda") < 0.2
    allowed[5, :700] = False
    allowed[torch.arange(TOKENS), targets] = True
    mask = losses.packed_mask(allowed) if kind == "masked" else None
    heads = {i: random(VOCABULARY, n) / 4 for i, n in enumerate((64, 128, 64))}
    teacher = torch.randint(-1, 3, (TOKENS,), device="cuda")

    def ours(h: Tensor, w: Tensor) -> Tensor:
        if kind in ("tokens", "masked"):
            return torch.stack(losses.token_scores(h, w, targets, 0.7, allowed=mask))
        return losses.divergence(h, w, taught, heads, teacher, kind)

    def naive(h: Tensor, w: Tensor) -> Tensor:
        if kind == "tokens":
            return naive_scores(h, w, targets, 0.7)
        return naive_masked(h, w, targets, allowed) if kind == "masked" else plain_divergence(h, w)

    def plain_divergence(h: Tensor, w: Tensor) -> Tensor:
        return naive_divergence(h, w, taught, heads, teacher, kind)

    leaves = hidden.requires_grad_(), head.detach().requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected, found = naive(*wide), ours(*leaves)
    grad = torch.randn_like(found)
    of_expected = torch.autograd.grad((expected * grad).sum(), wide)
    first = [x.clone() for x in torch.autograd.grad(found, leaves, grad, retain_graph=True)]
    again = torch.autograd.grad(found, leaves, grad)
    assert (found.double() - expected).abs().max() < 1e-5 * expected.abs().max()
    for one, two, exact in zip(first, again, of_expected, strict=True):
        for x in (one, two):
            assert (x.double() - exact).abs().max() < 1e-2 * exact.abs().max()
    repeated = ours(*leaves)
    assert torch.equal(repeated, found)
    for one, two in zip(first, torch.autograd.grad(repeated, leaves, grad), strict=True):
        assert torch.equal(one, two)
    if kind in ("tokens", "masked"):
        for n in (1, 64, 65):
            of_some = None if mask is None else mask[:n]
            chosen = losses.chosen_logprobs(losses.logits(hidden[:n], head), targets[:n], 0.7, allowed=of_some)
            assert torch.equal(chosen, found[0, :n])
