"""The clamped SwiGLU between an expert's products."""

import torch.nn.functional as F
from torch import Tensor

from .dispatch import fused
from .upcast import upcast


def swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clip(up, -limit, limit) of gate_up [..., 2I] -> [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def gated(gate_up: Tensor, limit: float) -> Tensor:
    """`swiglu` of gate_up [T, 2I] in fp32, rounded to its dtype: what the shared expert has between its products."""
    if fused(gate_up):
        from .fused.swiglu import Gated

        return Gated.apply(gate_up, limit)  # pyright: ignore[reportReturnType]
    return swiglu(upcast(gate_up), limit).to(gate_up.dtype)
