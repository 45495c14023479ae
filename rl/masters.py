"""fp32 masters of the weights that a model computes with: gradients and optimizer are theirs, the weights follow."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Masters(nn.Module):
    """A master for each trained parameter, by its name; one that is fp32 shares its memory with its master.

    `values`: the narrower parameters' masters. Weights are only ever written in place, where CUDA graphs read them.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]):
        super().__init__()
        self.trained = dict(trained)
        held = [nn.Parameter(values[name] if is_narrow(p) else p.detach()) for name, p in trained.items()]
        self._held = nn.ParameterList(held)
        self.by_name = dict(zip(trained, held, strict=True))
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """The weights become their masters' values."""
        for p, master in zip(self.trained.values(), self._held, strict=True):
            if is_narrow(p):
                p.copy_(master)
            elif p.data_ptr() != master.data_ptr():  # DeepSpeed has moved it
                p.data = master.data

    def narrow(self) -> list[Tensor | None]:
        """The weights that a step has to write beside their masters; None for each that is its master."""
        return [p.detach() if is_narrow(p) else None for p in self.trained.values()]

    def gradients(self) -> list[Tensor]:
        """The weights' own, of the last micro-batch; zeros where the loss did not reach."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained.values()]

    def collect(self) -> None:
        """Adds the weights' gradients, of one micro-batch, to the masters'. They are copied: a graph's stay in place."""
        for p, master in zip(self.trained.values(), self._held, strict=True):
            if p.grad is not None and master.grad is None:
                master.grad = p.grad.to(master.dtype, copy=True)
            elif p.grad is not None:
                master.grad.add_(p.grad)

    def collected(self) -> list[Tensor]:
        """The masters' gradients; zeros where no loss reached."""
        for master in self._held:
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad
        return [master.grad for master in self._held]

    def forget(self) -> None:
        """Lets go of the masters' gradients."""
        for master in self._held:
            master.grad = None


def is_narrow(p: Tensor) -> bool:
    return p.dtype != torch.float32
