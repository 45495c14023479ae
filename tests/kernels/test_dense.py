"""Causal attention with grouped heads: both ways of computing it against a sum over the visible keys in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amalgam.kernels.dense import attend_causal, reference_attend_causal


def naive(q: Tensor, k: Tensor, v: Tensor, position: Tensor, scaling, window, softcap, sinks) -> Tensor:
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b, h, n in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).reshape(-1, 3).tolist():
        at, group = int(position[b, n]), h * k.shape[1] // q.shape[1]
        keys = range(max(0, at - window + 1) if window else 0, at + 1)
        scores = [float(q[b, h, n].double() @ k[b, group, j].double()) * scaling for j in keys]
        if softcap:
            scores = [softcap * float(torch.tensor(s / softcap, dtype=torch.float64).tanh()) for s in scores]
        weights = torch.tensor(scores, dtype=torch.float64).exp()
        total = weights.sum() + (sinks[h].double().exp() if sinks is not None else 0)
        out[b, h, n] = sum(w * v[b, group, j].double() for w, j in zip(weights, keys, strict=True)) / total
    return out


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 2),
    repeats=st.integers(1, 3),
    keys=st.integers(1, 9),
    queries=st.integers(1, 9),
    window=st.none() | st.integers(1, 10),
    softcap=st.none() | st.just(0.7),
    with_sinks=st.booleans(),
    whole=st.booleans(),
    seed=st.integers(0, 99),
)
def test_against_a_naive_sum(groups, repeats, keys, queries, window, softcap, with_sinks, whole, seed):
    g = torch.Generator().manual_seed(seed)
    heads, batch = groups * repeats, 2
    queries = keys if whole else queries
    q = torch.randn(batch, heads, queries, 4, generator=g)
    k, v = torch.randn(batch, groups, keys, 4, generator=g), torch.randn(batch, groups, keys, 6, generator=g)
    sinks = torch.randn(heads, generator=g) if with_sinks else None
    position = torch.arange(keys).expand(batch, -1) if whole else torch.randint(keys, (batch, queries), generator=g)
    numbers = {"scaling": 0.3, "window": window, "softcap": softcap, "sinks": sinks}
    expected = naive(q, k, v, position, **numbers)
    for given_position in [position, None] if whole else [position]:
        for function in (attend_causal, reference_attend_causal):
            found = function(q, k, v, given_position, **numbers)
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("numbers", [{}, {"window": 3}, {"softcap": 0.5}, {"sinks": torch.randn(4)}])
def test_gradients(numbers: Any):
    made = [torch.randn(1, h, 6, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    plain: Any = {"window": None, "softcap": None, "sinks": None} | numbers
    q, k, v = made
    loss = attend_causal(q, k, v, scaling=0.5, **numbers).pow(3).sum()
    other = reference_attend_causal(q, k, v, None, scaling=0.5, **plain).pow(3).sum()
    for one, two in zip(torch.autograd.grad(loss, made), torch.autograd.grad(other, made), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
