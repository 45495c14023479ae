"""An operation beside its definition in float64, and rows that say how far off it is."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

BOUND = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
Inputs = dict[str, Tensor]
Errors = dict[str, float | None]  # of the value and of each input's gradient; None: not finite


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that PyTorch hands to Python is full of NaN; not that of integers, which may be read as addresses."""

    def filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*args: Any, **more: Any) -> Tensor:
            x = allocate(*args, **more)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return allocated

    with (
        patch.object(torch, "empty", filled(torch.empty)),
        patch.object(torch, "empty_like", filled(torch.empty_like)),
        patch.object(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty)),
    ):
        yield


def by_autograd(function: Callable[..., Tensor], given: Inputs, grad: Tensor) -> list[Tensor]:
    """`function` of the inputs by name, and for `grad` of its value the gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    value = function(**leaves)
    return [value.detach(), *torch.autograd.grad(value, list(leaves.values()), grad)]


@torch.no_grad()
def alone(function: Callable[..., Tensor], given: Inputs, grad: Tensor) -> list[Tensor]:
    """What has no gradients."""
    return [function(**given)]


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest magnitude of what is expected."""
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


def compare(
    given: Inputs,
    ours: Callable[[Inputs, Tensor], list[Tensor]],
    oracle: Callable[..., Tensor],
    dtype: torch.dtype,
    *,
    gradients: bool = True,
    mask: Tensor | None = None,
    value: Callable[[Tensor, Tensor], float] = error,
) -> Errors:
    """Errors of `ours`, which takes inputs and the gradient of its value, in `dtype`, and returns value and gradients.

    `oracle` is its definition, of the same inputs in float64. Where `mask` is False the value gets no gradient.
    """
    leaves = {name: x.double().requires_grad_(gradients) for name, x in given.items()}
    expected = oracle(**leaves)
    grad = torch.randn_like(expected, requires_grad=False).to(dtype)
    grad = grad if mask is None else grad * mask
    of_inputs = torch.autograd.grad(expected, list(leaves.values()), grad.double()) if gradients else ()
    all_expected = dict(zip(["value", *given], [expected.detach(), *of_inputs], strict=False))
    with poisoned():
        found = ours(given, grad)
    errors: Errors = {}
    for (name, b), a in zip(all_expected.items(), found, strict=True):
        assert a.shape == b.shape, f"{name}: {tuple(a.shape)}, want {tuple(b.shape)}"
        assert a.dtype == (dtype if name == "value" else given[name].dtype), f"{name}: {a.dtype}"
        off = value(a, b) if name == "value" else error(a, b)
        errors[name] = off if bool(a.isfinite().all()) else None
    return errors


def told(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def rows(
    name: str, tokens: int, dtype: torch.dtype, errors: Errors, exact: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """A row held to the bound of `dtype`, and if some are fp32 (`exact`) though the operands are not, one for these."""
    bounds = {what: BOUND[torch.float32 if what in exact else dtype] for what in errors}
    for bound in dict.fromkeys(bounds.values()):
        some = {what: each for what, each in errors.items() if bounds[what] == bound}
        kind = told(dtype) if bound == BOUND[dtype] else f"{told(dtype)} to fp32"
        yield row(f"{name}, {kind}", tokens, some, bound)


def row(name: str, tokens: int, errors: Mapping[str, float | None], bound: float) -> dict[str, Any]:
    met = all(each is not None and each <= bound for each in errors.values())
    return {"name": name, "tokens": tokens, "errors": errors, "goal": bound, "met": met}
