"""Losses as the learner takes them: functions by name, and how their metrics add up."""

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""loss(model, batch, shared, **settings) -> (scalar, metrics): see `Learner.step`."""

COMMON = ("grad_norm", "lr", "load_max", "load_idle")
"""Metrics of a step that are the same on all ranks; all others are sums."""

_PACKAGE = __name__.partition(".")[0]


def named(loss: str | Loss) -> Loss:
    """The function `loss` of amalgam.rl.grpo for "rl.grpo:loss"; no name reaches outside the package."""
    if not isinstance(loss, str):
        return loss
    module, _, name = loss.partition(":")
    return getattr(importlib.import_module(f"{_PACKAGE}.{module}"), name)


def add(totals: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        totals[name] = totals.get(name, 0.0) + value
