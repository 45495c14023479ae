"""What ZeRO's stage 3 asks of the learner: DeepSpeed wraps the model itself, whose parameters it shards."""

import functools
import gc
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Objective(nn.Module):
    """Puts a loss, and so any method of the model, into the forward of the module that DeepSpeed wraps.

    The metrics of the last call stay here: DeepSpeed would hook what a forward returns into its backward pass.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.metrics: dict[str, Tensor] = {}

    def forward(self, loss: Callable[..., Any], batch: dict, shared: dict, settings: dict) -> Tensor:
        value, metrics = loss(self.model, batch, shared, **settings)
        self.metrics = detached(metrics)
        return value


def detached(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: metric.detach().double() for name, metric in metrics.items()}


def let_go() -> None:
    """Empties where DeepSpeed would keep every model it has seen: a list, and the caches of methods."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    FWD_MODULE_STACK.clear()
    caches = [thing for thing in gc.get_objects() if isinstance(thing, functools._lru_cache_wrapper)]
    for cache in caches:
        if cache.__module__.startswith("deepspeed."):
            cache.cache_clear()
