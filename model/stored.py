"""Weights as deployment stores them, in place of their masters, for models that only run forward.

A stored weight is a module under its master's name. Codes and scales are buffers of bytes, which a cast of the model
leaves as they are.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from ..kernels.formats import fp4_blocks, quantize_fp4
from ..kernels.low_precision import Fp4, Fp8, quantize_weight, rounded_weight

_NUMBERS = 2**26  # of a master, which are rounded at once
_SCALES = torch.float8_e8m0fnu


class Stored(nn.Module):
    """What is kept of a master, a matrix [o, i] or experts' [E, o, i]; of the latter `halves` parts are tiled apart."""

    def __init__(self, master: Tensor, halves: int = 1):
        super().__init__()
        self.shape, self.dtype = master.shape, master.dtype
        self._tiled = (-1, halves, master.shape[-2] // halves, master.shape[-1])
        matrices = master.detach().view(self._tiled)
        for name, part in self.encode(matrices[:1]).items():
            self.register_buffer(name, part.new_empty(matrices.shape[0], *part.shape[1:]))
        self.take(master)

    @torch.no_grad()
    def take(self, master: Tensor) -> None:
        """Becomes what is kept of `master`, in place."""
        matrices = master.to(next(self.buffers()).device).view(self._tiled)
        some = max(_NUMBERS // matrices[0].numel(), 1)
        for start in range(0, len(matrices), some):
            for name, part in self.encode(matrices[start : start + some]).items():
                self.get_buffer(name)[start : start + some] = part

    @abstractmethod
    def encode(self, matrices: Tensor) -> dict[str, Tensor]:
        """Of some matrices [n, halves, o, i], the buffers' rows."""


class StoredFp8(Stored):
    codes: Tensor
    scales: Tensor

    def encode(self, matrices: Tensor) -> dict[str, Tensor]:
        return {name: part.view(torch.uint8) for name, part in quantize_weight(matrices)._asdict().items()}

    def experts(self) -> Fp8:
        """[E, 2, I, d] where there are halves, else [E, d, I]."""
        codes, scales = (_without_halves(part) for part in (self.codes, self.scales))
        return Fp8(codes.view(torch.float8_e4m3fn), scales.view(_SCALES))

    def matrix(self) -> Fp8:
        return Fp8(self.codes[0, 0].view(torch.float8_e4m3fn), self.scales[0, 0].view(_SCALES))


class StoredFp4(Stored):
    """`take` is a ValueError where a group holds a NaN or an infinity."""

    packed: Tensor
    groups: Tensor
    scales: Tensor

    def encode(self, matrices: Tensor) -> dict[str, Tensor]:
        packed, groups = quantize_fp4(matrices)
        parts = {"packed": packed, "groups": groups, "scales": fp4_blocks(groups)}
        return {name: part.view(torch.uint8) for name, part in parts.items()}

    def experts(self) -> Fp4:
        packed, groups, scales = (_without_halves(part) for part in (self.packed, self.groups, self.scales))
        return Fp4(packed.view(torch.int8), groups.view(_SCALES), scales.view(_SCALES))


class StoredRounded(Stored):
    """A matrix of numbers that FP8 holds."""

    numbers: Tensor

    def encode(self, matrices: Tensor) -> dict[str, Tensor]:
        return {"numbers": rounded_weight(matrices)}


def _without_halves(part: Tensor) -> Tensor:
    return part if part.shape[1] > 1 else part.squeeze(1)
