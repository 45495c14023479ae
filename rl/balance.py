"""The experts' loads: what an optimizer step sent to each expert, figures of it for the logs, and the balance rule.

Not differentiated, and not part of any loss: hooks on the routers count what they choose, replayed choices too.
"""

from functools import partial

import torch
from torch import Tensor, distributed, nn

from ..model.deepseek_v4 import Router


class Loads:
    """Counts of one model's routers, over the micro-batches between `start` and `take`."""

    def __init__(self, model: nn.Module):
        self.routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
        self.counting = False
        self.real: Tensor | None = None  # int64 [T]: 1 for a token that counts and 0 for one that fills a pack up
        self._counts: dict[str, Tensor] = {}  # by router: int64 [E]
        for name, router in self.routers.items():
            router.register_forward_hook(partial(self._count, name))

    def start(self, device: str) -> None:
        """Forgets what was counted. What routers choose counts while `counting` is true.

        Counts stay where they are: CUDA graphs add to them.
        """
        for name, router in self.routers.items():
            if name not in self._counts:
                self._counts[name] = torch.zeros(router.experts, dtype=torch.int64, device=device)
            self._counts[name].zero_()

    def _count(self, name: str, router: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        if self.counting:
            chosen = output[0]
            ones = torch.ones_like(chosen) if self.real is None else self.real.unsqueeze(1).expand_as(chosen)
            self._counts[name].scatter_add_(0, chosen.flatten(), ones.flatten())

    def take(self) -> dict[str, Tensor]:
        """Each router's counts since `start`, of all ranks together (a collective)."""
        if not self._counts or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return self._counts
        together = torch.stack(list(self._counts.values()))
        distributed.all_reduce(together)
        return dict(zip(self._counts, together, strict=True))

    def balance(self, taken: dict[str, Tensor], speed: float) -> None:
        """Each learned router's correction bias moves by `speed` towards level loads: up where an expert had fewer
        tokens than the mean, down where more (V4 2.1, as in DeepSeek-V3: 0.001 in pretraining)."""
        for name, counts in taken.items():
            if not self.routers[name].hashed:
                load = counts.float()
                self.routers[name].e_score_correction_bias.add_(torch.sign(load.mean() - load), alpha=speed)


def figures(taken: dict[str, Tensor]) -> dict[str, float]:
    """For the logs: "load_max", the busiest expert's load over the mean, and "load_idle", the share without a token.

    Both are means over the layers; 1 and 0 are a perfect balance.
    """
    met = [counts.float() for counts in taken.values() if counts.any()]  # an MTP block may have met nothing
    if not met:
        return {}
    loads = torch.stack(met)
    busiest = loads.amax(1) / loads.mean(1)
    return {"load_max": float(busiest.mean()), "load_idle": float((loads == 0).float().mean())}
