"""Quantization-aware training: values as low precision stores them, gradients as if nothing had been rounded.

The forward rounds by kernels/formats.py, the backward hands the gradient on unchanged (straight-through; paper 5.2.1).
A tile that holds a NaN or an infinity becomes NaN.
"""

from typing import Any

import torch
from torch import Tensor

from .formats import FP8_TILE, round_fp4, round_fp8


class _FakeFp8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tile: tuple[int, int]) -> Tensor:
        return round_fp8(x, tile)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _FakeFp4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return round_fp4(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def fake_fp8(x: Tensor, tile: tuple[int, int] = FP8_TILE) -> Tensor:
    """x [..., N, K] rounded as FP8 with a scale for each tile (rows, columns); x's dtype; identity backward."""
    return _FakeFp8.apply(x, tile)  # pyright: ignore[reportReturnType]


def fake_fp4(x: Tensor) -> Tensor:
    """x [..., N, K] rounded as FP4 with a scale for each 32 columns of a row; x's dtype; identity backward.

    It is also the composite of V4's expert weights, fp32 master -> FP4 -> FP8: the second step is lossless
    (`formats.fp4_to_fp8`), so its values are these, and rollouts that read the FP4 weights see the same numbers.
    """
    return _FakeFp4.apply(x)  # pyright: ignore[reportReturnType]
