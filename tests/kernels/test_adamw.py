"""AdamW's step: the reference is torch's own; the kernels over lists against it in float64, in Triton's interpreter."""

from typing import Any

import pytest
import torch

from amalgam.kernels.adamw import adamw_step, gradient_norm

SETTINGS: Any = {"lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1, "clip": 2.0}
SHAPES = [(3, 5), (4097,), (1,), (64, 130)]  # in the kernels' table: less than a block, one and a number, ...


def made(dtype: torch.dtype) -> Any:
    """Masters, gradients in `dtype` (one of them in fp32 in any case), moments, and weights where they are bf16."""
    masters, firsts = ([torch.randn(shape) for shape in SHAPES] for _ in range(2))
    seconds = [torch.rand(shape) for shape in SHAPES]
    gradients = [torch.randn(shape).to(dtype if i else torch.float32) for i, shape in enumerate(SHAPES)]
    weights = [None if g.dtype == torch.float32 else p.bfloat16() for p, g in zip(masters, gradients, strict=True)]
    return masters, gradients, firsts, seconds, weights


def clones(lists: Any, dtype: torch.dtype | None = None) -> Any:
    return [[None if x is None else x.to(dtype or x.dtype, copy=True) for x in each] for each in lists]


def test_the_reference_is_torchs_adamw():
    """To the bit, over three steps of fp32, with clipping."""
    masters, gradients, firsts, seconds, _ = made(torch.float32)
    for x in (*firsts, *seconds):
        x.zero_()
    theirs = [torch.nn.Parameter(p.clone()) for p in masters]
    optimizer = torch.optim.AdamW(theirs, lr=0.03, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, foreach=False)
    for step in (1, 2, 3):
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g.clone() / step**2
        found = gradient_norm([p.grad for p in theirs])  # pyright: ignore[reportArgumentType]
        ours = [g / step**2 for g in gradients]
        adamw_step(masters, ours, firsts, seconds, [None] * 4, found, step=step, **SETTINGS)
        assert torch.equal(torch.nn.utils.clip_grad_norm_(theirs, 2.0), found)
        optimizer.step()
        assert all(torch.equal(ours, p) for ours, p in zip(masters, theirs, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter, on machines without a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    lists = made(dtype)
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")
    norm = gradient_norm(lists[1])
    whole = torch.cat([g.double().flatten() for g in lists[1]])
    assert abs(norm - whole.norm()) <= 1e-6 * whole.norm()
    ours = clones(lists)
    adamw_step(*ours, norm=norm, step=3, **SETTINGS)
    monkeypatch.setenv("AMALGAM_KERNELS", "reference")
    wide = clones(lists[:4], torch.float64)
    adamw_step(*wide, weights=[None] * 4, norm=norm.double(), step=3, **SETTINGS)
    for found, expected in zip(ours[:4], wide, strict=True):
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() <= 1e-6 * b.abs().max()
    assert all(torch.equal(a, b) for a, b in zip(ours[1], lists[1], strict=True))
    assert all(w is None or torch.equal(w, p.bfloat16()) for w, p in zip(ours[4], ours[0], strict=True))
    assert sum(w is not None for w in ours[4]) == (3 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_nothing_changes_where_the_gradient_is_not_finite(wrong: float, kernels: str, monkeypatch: pytest.MonkeyPatch):
    if kernels == "triton" and torch.cuda.is_available():
        pytest.skip("for Triton's interpreter")
    monkeypatch.setenv("AMALGAM_KERNELS", kernels)
    lists = made(torch.bfloat16)
    lists[1][2].fill_(wrong)
    ours = clones(lists)
    adamw_step(*ours, norm=gradient_norm(ours[1]), step=3, **SETTINGS)
    for found, before in zip(ours, lists, strict=True):
        assert all(a is None or torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, before, strict=True))


def test_tensors_with_gaps_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AMALGAM_KERNELS", "triton")
    with pytest.raises(ValueError, match=r"contiguous tensors; one has strides \(1, 4\)"):
        gradient_norm([torch.ones(4, 4).T])
