"""Products and experts in V4's low precision, for rollouts, and their forward in quantization-aware training.

As in DeepSeek's inference code: activations are rounded to FP8 as they come, a scale for each token and 128 channels;
weights are FP8 with a scale for each 128 x 128, experts' may be FP4 (formats.py has the rules). A sum over 128 channels
is multiplied by both scales, and these are added up in fp32. On a GPU (Hopper) the sum of 128 keeps about 14 bits.
Nothing here waits for the device: a tile that holds a NaN or an infinity becomes NaN.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import fused
from .formats import FP8_TILE, decode_fp8, encode_fp4_as_fp8, encode_fp8, fp4_as_fp8, fp4_blocks, fp8_fit
from .moe import reference_experts
from .project import reference_project

_BLOCK = FP8_TILE[1]
_ROW = (1, _BLOCK)


class Fp8(NamedTuple):
    """Activations [T, K] with scales [T, ceil(K/128)], or weights [..., N, K] with [..., ceil(N/128), ceil(K/128)]."""

    codes: Tensor  # float8_e4m3fn
    scales: Tensor  # float8_e8m0fnu


class Fp4(NamedTuple):
    """Weights [..., N, K] as checkpoints have them; `fp4_weight` makes it."""

    packed: Tensor  # int8 [..., N, K/2]
    groups: Tensor  # float8_e8m0fnu [..., N, K/32]
    scales: Tensor  # float8_e8m0fnu [..., ceil(N/128), ceil(K/128)]: of the FP8 tiles that they become


def quantize_activations(x: Tensor) -> Fp8:
    """x [T, K] in bf16 or fp32, by rows."""
    if fused(x):
        from .fused.fp8 import quantize

        return Fp8(*quantize(x, by_row=True))
    return Fp8(*encode_fp8(x, _ROW))


def quantize_weight(weight: Tensor, fp4: bool = False) -> Fp8:
    """weight [..., N, K] in bf16 or fp32, by tiles of 128 x 128; if `fp4`, rounded to FP4 first (K a multiple of 32).

    With `fp4` it is what `formats.fp4_to_fp8` makes of the FP4 weight: the same values, where FP8 holds them.
    """
    if fp4 and weight.shape[-1] % 32:
        raise ValueError(f"FP4 needs rows of a multiple of 32 columns, got shape {list(weight.shape)}")
    if fused(weight):
        from .fused.fp8 import quantize

        return Fp8(*quantize(weight, by_row=False, fp4=fp4))
    return Fp8(*(encode_fp4_as_fp8(weight) if fp4 else encode_fp8(weight)))


def fp4_weight(packed: Tensor, groups: Tensor) -> Fp4:
    """A checkpoint's FP4 weight, checked, which waits for the device: ValueError where FP8 does not hold its values."""
    if (fit := fp8_fit(packed, groups)).fitting < fit.blocks:
        raise ValueError(
            f"{fit.blocks - fit.fitting} of {fit.blocks} blocks of 128 x 128 do not fit FP8 without loss; "
            f"the worst is {fit.worst_block}, whose scales spread over 2^{fit.worst_spread}"
        )
    return Fp4(packed, groups, fp4_blocks(groups))


def multiply(x: Fp8, weight: Fp8, dtype: torch.dtype) -> Tensor:
    """Activations x [T, i] times weight [o, i] -> [T, o] in bf16 or fp32."""
    if fused(x.codes):
        from .fused import fp8

        return fp8.multiply(*x, *weight, dtype)
    sums = x.codes.new_zeros(x.codes.shape[0], weight.codes.shape[0], dtype=torch.float32)
    by_row = weight.scales.float().repeat_interleave(FP8_TILE[0], 0)[: weight.codes.shape[0]]
    blocks = zip(x.codes.split(_BLOCK, 1), weight.codes.split(_BLOCK, 1), strict=True)
    for k, (rows, block) in enumerate(blocks):
        scales = x.scales[:, k, None].float() * by_row[:, k]
        sums += reference_project(rows.float(), block.float()) * scales
    return sums.to(dtype)


def experts_fp8(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Fp8 | Fp4, down: Fp8 | Fp4, limit: float) -> Tensor:
    """`moe.experts` with both products in FP8: x [T, d] bf16 or fp32, ids int64, weights fp32 [T, k] -> fp32 [T, d].

    gate_up [E, 2, I, d] (gates, then ups, so that no tile holds both), down [E, d, I]. FP4 has the bits of its FP8
    (`formats.fp4_to_fp8`). No gradient.
    """
    if fused(x):
        from .fused.fp8_experts import experts_forward

        if ids.numel() == 0:
            return x.new_zeros(x.shape, dtype=torch.float32)
        return experts_forward(x, ids, weights, _parts(gate_up), _parts(down), limit, False)[0]

    def product(rows: Tensor, parts: list[tuple[Tensor, ...]]) -> Tensor:
        quantized = quantize_activations(rows)
        return torch.cat([multiply(quantized, Fp8(*part), rows.dtype) for part in parts], 1)

    up, lower = _by_expert(*_as_fp8(gate_up)), _by_expert(*(part.unsqueeze(1) for part in _as_fp8(down)))
    return reference_experts(x, ids, weights, up, lower, limit, product)


def linear_fp8(x: Tensor, weight: Fp8) -> Tensor:
    """x [..., i] times weight [o, i] -> [..., o] in x's dtype. No gradient."""
    return multiply(quantize_activations(x.flatten(0, -2)), weight, x.dtype).unflatten(0, x.shape[:-1])


def linear_qat(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., i] times the master weight [o, i] -> [..., o] in x's dtype: both rounded to FP8, multiplied as above.

    The backward is in x's dtype and takes each rounding for none (straight-through; paper 5.2.1): its products are
    those of the rounded x and weight.
    """
    out: Any = _Linear.apply(x.flatten(0, -2), weight, *quantize_weight(weight.detach()))
    return out.unflatten(0, x.shape[:-1])


def experts_qat(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float, *, fp4: bool
) -> Tensor:
    """`moe.experts`, of the same arguments, with `experts_fp8`'s forward: its bits with the quantized weights.

    The master weights, bf16 or fp32, are rounded to FP8, or if `fp4` to FP4, as V4's. Backward as of `linear_qat`.
    """
    if fused(x):
        from .fused.fp8_experts import QuantizedExperts

        keep = torch.is_grad_enabled() and any(a.requires_grad for a in (x, weights, gate_up, down))
        return QuantizedExperts.apply(x, ids, weights, gate_up, down, limit, fp4, keep)  # pyright: ignore

    def product(rows: Tensor, parts: list[tuple[Tensor, ...]]) -> Tensor:
        return torch.cat([_Linear.apply(rows, *part) for part in parts], 1)  # pyright: ignore

    masters = gate_up.unflatten(1, (2, -1)), down.unsqueeze(1)
    up, lower = (_by_expert(master, *quantize_weight(master.detach(), fp4)) for master in masters)
    return reference_experts(x, ids, weights, up, lower, limit, product)


def rounded_weight(weight: Tensor) -> Tensor:
    """weight [..., N, K] as FP8 holds it, in its dtype; the gradient passes straight through."""
    return _Rounded.apply(weight)  # pyright: ignore[reportReturnType]


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return _decode(*quantize_weight(weight), weight.dtype, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _Linear(torch.autograd.Function):
    """x times a weight whose codes and scales are there; gradients of both, straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        rows = quantize_activations(x)
        ctx.save_for_backward(*rows, codes, scales)
        ctx.dtype = weight.dtype
        return multiply(rows, Fp8(codes, scales), x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad, (x, x_scales, weight, weight_scales) = grads[0], ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = grad @ _decode(weight, weight_scales, grad.dtype, False)
        if ctx.needs_input_grad[1]:
            of_weight = (grad.t() @ _decode(x, x_scales, grad.dtype, True)).to(ctx.dtype)
        return of_x, of_weight, None, None


def _by_expert(*parts: Tensor) -> list[list[tuple[Tensor, ...]]]:
    """Parts [E, n, ...] of weights: for each expert and each of its n matrices, the parts of that matrix."""
    return [list(zip(*(part.unbind(0) for part in of_expert), strict=True)) for of_expert in zip(*parts, strict=True)]


def _decode(codes: Tensor, scales: Tensor, dtype: torch.dtype, by_row: bool) -> Tensor:
    if fused(codes):
        from .fused.fp8 import dequantize

        return dequantize(codes, scales, dtype, by_row)
    return decode_fp8(codes, scales, dtype, _ROW if by_row else FP8_TILE)


def _parts(weight: Fp8 | Fp4) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales, and of FP4 the groups' scales."""
    if isinstance(weight, Fp4):
        return weight.packed, weight.scales, weight.groups
    return weight.codes, weight.scales, None


def _as_fp8(weight: Fp8 | Fp4) -> Fp8:
    if isinstance(weight, Fp8):
        return weight
    return Fp8(*fp4_as_fp8(weight.packed, weight.groups))
