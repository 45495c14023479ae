"""Partial rotary position embedding on the trailing dimensions, interleaved pairs, in fp32."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .dispatch import fused
from .upcast import upcast


def inverse_frequencies(rope_dim: int, parameters: Mapping[str, Any]) -> Tensor:
    """fp32 [rope_dim / 2] for one entry of `config.rope_parameters` ("main" or "compress").

    YaRN as in DeepSeek's code: the correction range is floored and capped to [0, rope_dim - 1], and no attention factor
    is applied (V4 never scales cos and sin). Raises ValueError for a rope type that V4 does not have.
    """
    theta = float(parameters["rope_theta"])
    pair = torch.arange(rope_dim // 2, dtype=torch.float32, device="cpu")  # a table has numbers on the meta device too
    frequencies = 1.0 / theta ** (2 * pair / rope_dim)
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return frequencies
    if kind != "yarn":
        raise ValueError(f"rope_type {kind!r} is not one of DeepSeek-V4's: default, yarn")
    if parameters.get("attention_factor") not in (None, 1.0):
        raise ValueError(f"attention_factor {parameters['attention_factor']}: DeepSeek-V4 has 1.0")
    original = parameters["original_max_position_embeddings"]

    def correction(beta: float) -> float:
        return rope_dim * math.log(original / (2 * math.pi * beta)) / (2 * math.log(theta))

    low = max(math.floor(correction(parameters.get("beta_fast", 32))), 0)
    high = min(math.ceil(correction(parameters.get("beta_slow", 1))), rope_dim - 1)
    ramp = ((pair - low) / (high - low if high > low else 0.001)).clamp(0, 1)
    return frequencies / parameters["factor"] * ramp + frequencies * (1 - ramp)


def rotations(positions: Tensor, frequencies: Tensor) -> Tensor:
    """complex64 [..., rope_dim / 2]: the rotation of each pair at integer `positions` [...]."""
    angles = positions.unsqueeze(-1).to(frequencies.dtype) * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def apply_rope(x: Tensor, rotation: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotates pairs (2k, 2k+1) of the last 2R dimensions of x [N, ..., D] by rotation [N, R] (complex64).

    `inverse` rotates back (V4 does so to attention's output, as values carry their keys' rotation). Returns x's dtype.
    """
    if fused(x):
        from .fused.norm import NormRope

        return NormRope.apply(x, None, rotation, None, inverse)  # pyright: ignore[reportReturnType]
    rope_dim = 2 * rotation.shape[-1]
    rotation = rotation.conj() if inverse else rotation
    rotation = rotation[(slice(None), *[None] * (x.dim() - 2))]
    plain, turned = x.split([x.shape[-1] - rope_dim, rope_dim], dim=-1)
    # A copy: one row of an odd width counts as contiguous, but has no even offset and strides, as complex views need.
    turned = upcast(turned.clone(memory_format=torch.contiguous_format))
    pairs = torch.view_as_complex(turned.unflatten(-1, (-1, 2)))
    return torch.cat([plain, torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)], dim=-1)
