"""Muon's update against singular value decompositions in float64, one matrix at a time."""

from functools import partial

import pytest
import torch
from torch import Tensor

from amalgam.kernels import muon
from amalgam.kernels.muon import muon_step, newton_schulz, to_updates

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
        muon_step(*arguments, lr=0.1, updates=in_fp32)
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
        muon_step([weight], [torch.randn(shape)], [torch.zeros(shape)], lr=1.0, updates=in_fp32)
        assert weight.square().mean().sqrt().item() == pytest.approx(0.18, rel=0.02)
