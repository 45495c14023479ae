"""fp32 masters of the weights that a model computes with: gradients and optimizer are theirs, the weights follow."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .optimizer import AdamW


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
        pairs = list(zip(self.trained.values(), self._held, strict=True))
        for p, master in pairs:
            if not is_narrow(p) and p.data_ptr() != master.data_ptr():  # DeepSpeed has moved it
                p.data = master.data
        if narrow := [pair for pair in pairs if is_narrow(pair[0])]:
            torch._foreach_copy_([p for p, _ in narrow], [master for _, master in narrow])  # pyright: ignore

    def collect(self) -> None:
        """Adds the weights' gradients, of one micro-batch, to the masters'; they stay, as a CUDA graph's have to."""
        for p, master in zip(self.trained.values(), self._held, strict=True):
            if p.grad is not None and master.grad is None:
                master.grad = p.grad.to(master.dtype, copy=True)
            elif p.grad is not None:
                master.grad.add_(p.grad)

    def fill(self) -> None:
        """Zeros as the gradients of masters that no loss reached."""
        for master in self._held:
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad

    def update(self, optimizer: AdamW, step: int, clip: float, alone: bool) -> Tensor:
        """`AdamW.update`, from the gradients of `alone` one micro-batch, which are the weights' own, or the masters'.

        The gradients' norm fp32 []. The masters' gradients are gone then.
        """
        found, weights = {}, {}
        for p, master in zip(self.trained.values(), self._held, strict=True):
            gradient = p.grad if alone else master.grad
            found[master] = torch.zeros_like(p) if gradient is None else gradient
            weights[master] = p.detach() if is_narrow(p) else None
        norm = optimizer.update(found, weights, step, clip)
        self.forget()
        return norm

    def forget(self) -> None:
        """Lets go of the masters' gradients."""
        for master in self._held:
            master.grad = None


def is_narrow(p: Tensor) -> bool:
    return p.dtype != torch.float32
