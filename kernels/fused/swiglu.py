"""Triton kernels of `kernels.moe.gated`: the clamped SwiGLU of a product's rows, in one pass over memory each way."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import SAME_BITS, check_dtypes, next_power
from .moe import clamped

TILE = 2048  # numbers of a tile


@triton.jit
def _gated(gate_up, out, limit, rows, inner, R: tl.constexpr, C: tl.constexpr):
    r = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
    c = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    real, at = (r < rows) & (c < inner), r * 2 * inner + c
    gate = tl.load(gate_up + at, mask=real, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + inner, mask=real, other=0.0).to(tl.float32)
    g, sigmoid, u = clamped(gate, up, limit)
    tl.store(out + r * inner + c, g * sigmoid * u, mask=real)


@triton.jit
def _gated_backward(gate_up, grad, out, limit, rows, inner, R: tl.constexpr, C: tl.constexpr):
    r = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
    c = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    real, at = (r < rows) & (c < inner), r * 2 * inner + c
    gate = tl.load(gate_up + at, mask=real, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + inner, mask=real, other=0.0).to(tl.float32)
    of = tl.load(grad + r * inner + c, mask=real, other=0.0).to(tl.float32)
    g, sigmoid, u = clamped(gate, up, limit)
    of_gate = tl.where(gate <= limit, of * u * sigmoid * (1.0 + g * (1.0 - sigmoid)), 0.0)
    tl.store(out + at, of_gate, mask=real)
    tl.store(out + at + inner, tl.where((up >= -limit) & (up <= limit), of * g * sigmoid, 0.0), mask=real)


class Gated(torch.autograd.Function):
    """gate_up [T, 2I], bf16 or fp32 -> [T, I] in its dtype."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, limit: float) -> Tensor:
        check_dtypes(gate_up=gate_up)
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        ctx.limit = limit
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        if out.numel():
            _gated[_grid(out)](gate_up, out, limit, *out.shape, **_tile(out), num_warps=4, **SAME_BITS)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        grad, out = grads[0].contiguous(), torch.empty_like(gate_up)
        if out.numel():
            _gated_backward[_grid(grad)](gate_up, grad, out, ctx.limit, *grad.shape, **_tile(grad), num_warps=4)
        return out, None


def _tile(x: Tensor) -> dict[str, int]:
    columns = min(next_power(x.shape[1]), 512)
    return {"R": TILE // columns, "C": columns}


def _grid(x: Tensor) -> tuple:
    tile = _tile(x)
    return triton.cdiv(x.shape[0], tile["R"]), triton.cdiv(x.shape[1], tile["C"])
