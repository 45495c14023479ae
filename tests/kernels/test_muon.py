"""Muon's update against singular value decompositions in float64, one matrix at a time."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from amalgam.kernels import muon
from amalgam.kernels.adamw import gradient_norm
from amalgam.kernels.fused.symmetric import product
from amalgam.kernels.muon import muon_step, newton_schulz, runs_of, step_with, to_updates

in_fp32 = partial(to_updates, dtype=torch.float32)


def naive(x: Tensor) -> Tensor:
    """The same polynomials of the singular values alone, for one matrix in float64."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(8):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    for _ in range(2):
        s = 2 * s - 1.5 * s**3 + 0.5 * s**5
    return (u * s) @ v


@pytest.mark.parametrize("shape", [(3, 24, 40), (2, 2, 40, 24), (32, 32)], ids=str)
def test_newton_schulz(shape):
    x = torch.randn(shape)
    expected = torch.stack([naive(each) for each in x.view(-1, *shape[-2:])]).view(shape)
    assert (newton_schulz(x, torch.float32) - expected).norm() <= 1e-4 * expected.norm()
    assert newton_schulz(x.double(), torch.float64).sub(expected).norm() <= 1e-12 * expected.norm()
    assert not newton_schulz(torch.zeros(shape)).any()


def test_in_bf16_singular_values_are_near_one():
    u, _, v = torch.linalg.svd(torch.randn(4, 64, 96), full_matrices=False)
    x = u * torch.logspace(0, -1, 64) @ v  # a condition of 10
    found = newton_schulz(x)
    assert found.dtype == torch.bfloat16
    assert (torch.linalg.svdvals(found.double()) - 1).abs().max() < 0.01


@pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter, on machines without a GPU")
@pytest.mark.parametrize("tall", [False, True])
def test_symmetric_products(tall: bool):
    x = torch.randn(2, 384, 192).div(14).bfloat16()
    x = x.mT.contiguous().mT if tall else x
    gram = product(x)
    assert (gram - x.double() @ x.double().mT).abs().max() <= 2**-8 * gram.abs().max()
    found, wide = product(gram, 0.5, -1.5, 2.0), gram.double()
    assert (found - (0.5 * torch.eye(384) - 1.5 * wide + 2 * wide @ wide)).abs().max() <= 2**-8 * found.abs().max()
    for symmetric in (gram, found):
        assert torch.equal(symmetric, symmetric.mT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter, on machines without a GPU")
@pytest.mark.parametrize("shape", [(2, 128, 192), (192, 128)])
def test_newton_schulz_with_symmetric_products(shape, monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(shape)
    expected = newton_schulz(x)
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")
    found = newton_schulz(x)
    assert not torch.equal(found, expected)
    assert (found - expected).float().norm() <= 0.02 * expected.float().norm()


@pytest.mark.parametrize("batch", [1 << 28, 1])
def test_steps_are_those_of_each_matrix_by_itself(batch: int, monkeypatch: pytest.MonkeyPatch):
    """Experts and the halves of their fused projections each by themselves; several tensors of one shape together."""
    monkeypatch.setattr(muon, "BATCH", batch)
    gate_up, down, other, square = torch.randn(3, 16, 12), torch.randn(3, 12, 8), torch.randn(8, 12), torch.randn(6, 6)
    held = [gate_up, down, other, square]
    expected = [x.double().clone() for x in held]
    momenta = [torch.zeros_like(x) for x in held]
    before = [torch.zeros_like(x) for x in expected]
    for _ in range(3):
        gradients = [torch.randn_like(x) for x in held]
        overwritten = [x.clone() for x in gradients]
        arguments = ([x[0].unflatten(1, (2, -1)), *x[1:]] for x in (held, overwritten, momenta))
        step_with(in_fp32, *arguments, lr=0.1)
        for weight, gradient, moment in zip(expected, gradients, before, strict=True):
            moment.mul_(0.95).add_(gradient)
            height = 8 if weight.shape[-2] == 16 else weight.shape[-2]  # gate_up's halves lie one after another
            matrices = (x.view(-1, height, weight.shape[-1]) for x in (weight, gradient + 0.95 * moment))
            for w, g in zip(*matrices, strict=True):
                w.mul_(1 - 0.1 * 0.1).sub_(naive(g) * (0.1 * 0.18 * max(w.shape) ** 0.5))
    for found, want in zip(held, expected, strict=True):
        assert (found - want).norm() <= 1e-4 * want.norm()


def test_an_update_has_adamws_size():
    """A root mean square of 0.18, whatever the shape."""
    for shape in ((64, 64), (32, 128), (128, 32)):
        weight = torch.zeros(shape)
        step_with(in_fp32, [weight], [torch.randn(shape)], [torch.zeros(shape)], lr=1.0)
        assert weight.square().mean().sqrt().item() == pytest.approx(0.18, rel=0.02)


MATRICES = [[(16, 24)] * 6, [(8, 24), (8, 24), (3, 24)], [(24, 16)], [(7, 5)]]  # the last in no multiples of 16 bytes
RUNS = [runs_of(each) for each in MATRICES]
SETTINGS: Any = {"runs": RUNS, "lr": 0.03, "weight_decay": 0.2, "clip": 2.0, "dtype": torch.float32}


def made() -> Any:
    """Masters, gradients and momenta, and weights; one parameter is fp32."""
    sizes = [sum(n * m for n, m in each) for each in MATRICES]
    masters, gradients, momenta = ([torch.randn(size) for size in sizes] for _ in range(3))
    gradients = [g.bfloat16() if i != 1 else g for i, g in enumerate(gradients)]
    weights = [p.bfloat16() if i != 1 else None for i, p in enumerate(masters)]
    return masters, gradients, momenta, weights


@pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter, on machines without a GPU")
@pytest.mark.parametrize("batch", [1 << 28, 1])
def test_kernels(batch: int, monkeypatch: pytest.MonkeyPatch):
    """Against the reference in float64; and the reference against one matrix at a time."""
    monkeypatch.setattr(muon, "BATCH", batch)
    lists = made()
    ours: Any = [[None if x is None else x.clone() for x in each] for each in lists]
    wide: Any = [[None if x is None else x.double() for x in each] for each in lists]
    norm = gradient_norm(lists[1])
    muon_step(*wide, norm=norm.double(), **(SETTINGS | {"dtype": torch.float64}))
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")
    muon_step(*ours, norm=norm, **SETTINGS)
    for i in (0, 2):
        for found, expected in zip(ours[i], wide[i], strict=True):
            assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert all(torch.equal(a, b) for a, b in zip(ours[1], lists[1], strict=True))
    assert all(w is None or torch.equal(w, p.bfloat16()) for w, p in zip(ours[3], ours[0], strict=True))
    for old, g, held, new, shapes in zip(*lists[:3], wide[0], MATRICES, strict=True):
        clipped = g.double() * (2 / (norm.double() + 1e-6))
        ahead = (clipped + 0.95 * (0.95 * held.double() + clipped)).split([n * m for n, m in shapes])
        parts = zip(ahead, shapes, strict=True)
        updates = [naive(x.view(shape)).flatten() * (0.18 * max(shape) ** 0.5) for x, shape in parts]
        expected = old.double() * (1 - 0.03 * 0.2) - 0.03 * torch.cat(updates)
        assert (new - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_nothing_changes_where_the_gradient_is_not_finite(kernels: str, monkeypatch: pytest.MonkeyPatch):
    if kernels == "triton" and torch.cuda.is_available():
        pytest.skip("for Triton's interpreter")
    monkeypatch.setenv("AMALGAM_KERNELS", kernels)
    lists = made()
    lists[1][0][3] = float("nan")
    before: Any = [[None if x is None else x.clone() for x in each] for each in lists]
    muon_step(*lists, norm=gradient_norm(lists[1]), **SETTINGS)
    for i in (0, 2, 3):
        assert all(a is None or torch.equal(a, b) for a, b in zip(lists[i], before[i], strict=True))
