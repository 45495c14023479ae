"""DeepSeek-V4's low-precision numbers, exact on any device: FP8 and FP4 tensors with power-of-two scales.

FP8 is E4M3 (largest value 448), with a scale for each tile: 128 x 128 of a weight, 1 x 128 of an activation. FP4 is
E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), with a scale for each 32 columns of a row. A scale is UE8M0: one
byte b means 2^(b - 127), and 255 means NaN. Quantization takes the smallest power of two that brings the tile's largest
magnitude into range, and rounds to nearest, ties to even (DeepSeek-V4's inference code; TileKernels).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_TILE = (128, 128)  # of a weight; (1, 128) of an activation
FP4_TILE = (1, 32)
_GROUPS = FP8_TILE[0], FP8_TILE[1] // FP4_TILE[1]  # FP4's scales in a tile of FP8
_FP8_FLOOR, _FP4_FLOOR = 1e-4, 6 * 2.0**-126  # a tile's largest magnitude counts as at least this


def quantize_fp8(weight: Tensor, tile: tuple[int, int] = FP8_TILE) -> tuple[Tensor, Tensor]:
    """weight [..., N, K] -> codes float8_e4m3fn [..., N, K], scales float8_e8m0fnu [..., ceil(N/128), ceil(K/128)].

    Tiles at the end may be smaller. The rule is scale = 2^ceil(log2(max(amax, 1e-4) / 448)); computed in fp32. A tile
    that holds a NaN or an infinity is a ValueError.
    """
    codes, scales = encode_fp8(weight, tile)
    _refuse(scales.view(torch.uint8) == 255, "", "holds a NaN or an infinity", tile)
    return codes, scales


def encode_fp8(x: Tensor, tile: tuple[int, int] = FP8_TILE) -> tuple[Tensor, Tensor]:
    """`quantize_fp8` without its error: a tile with a NaN or an infinity gets NaN codes and a NaN scale."""
    values, exponent = _scaled_fp8(x, tile)
    return _from_tiles(values, x.shape).to(torch.float8_e4m3fn), _as_scales(exponent)


def encode_fp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_fp4`, but that a group with a NaN or an infinity gets a NaN scale."""
    _check_groups(x)
    values, exponent = _scaled_fp4(x)
    return _packed(_from_tiles(values, x.shape)), _as_scales(exponent)


def encode_fp4_as_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [..., N, K] rounded to FP4, then stored as `fp4_to_fp8` does, without the errors of either.

    A value that FP8 does not hold is rounded; a tile with a NaN or an infinity gets NaN codes and a NaN scale.
    """
    _check_groups(weight)
    values, exponent = _scaled_fp4(weight)
    exact, scale = _regrouped(_from_tiles(values, weight.shape), exponent + 127)
    return _from_tiles(exact, weight.shape).to(torch.float8_e4m3fn), scale.to(torch.uint8).view(torch.float8_e8m0fnu)


def decode_fp8(
    codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32, tile: tuple[int, int] = FP8_TILE
) -> Tensor:
    """`dequantize_fp8` without its errors: NaN where codes or scales are."""
    values = _in_tiles(codes.float(), tile) * scales.float()[..., :, None, :, None]
    return _from_tiles(values, codes.shape).to(dtype)


def fp4_blocks(scales: Tensor) -> Tensor:
    """FP4's scales [..., N, K/32] -> those that `fp4_to_fp8` gives, float8_e8m0fnu [..., ceil(N/128), ceil(K/128)]."""
    groups = _in_tiles(scales.view(torch.uint8).int(), _GROUPS)
    return _block_scale(groups.amax((-3, -1))).to(torch.uint8).view(torch.float8_e8m0fnu)


def dequantize_fp8(
    codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32, tile: tuple[int, int] = FP8_TILE
) -> Tensor:
    """The inverse of `quantize_fp8`, exact in fp32 and, except below 2^-126, in bf16.

    ValueError: wrong dtype, scales whose shape does not fit, a NaN code or scale, a value too large for `dtype`.
    """
    if codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"FP8 codes must be float8_e4m3fn, got {codes.dtype}")
    _check_scales(scales, codes.shape, tile)
    return _checked(decode_fp8(codes, scales, dtype, tile), scales, tile)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations [T, K] -> FP8 codes [T, K] and scales [T, ceil(K/128)], a tile for each token and 128 channels."""
    return quantize_fp8(x, (1, FP8_TILE[1]))


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `quantize_rows`."""
    return dequantize_fp8(codes, scales, dtype, (1, FP8_TILE[1]))


def quantize_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [..., N, K] -> packed int8 [..., N, K/2], scales float8_e8m0fnu [..., N, K/32].

    A byte holds an even column in its low four bits (sign, then 3 bits of magnitude) and the next one in its high four.
    The rule is scale = 2^ceil(log2(max(amax, 6 * 2^-126) / 6)); computed in fp32. ValueError: K not a multiple of 32,
    or a group that holds a NaN or an infinity.
    """
    packed, scales = encode_fp4(weight)
    _refuse(scales.view(torch.uint8) == 255, "", "holds a NaN or an infinity", FP4_TILE)
    return packed, scales


def dequantize_fp4(packed: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `quantize_fp4`: [..., N, K/2] -> [..., N, K]; exact and strict as `dequantize_fp8`."""
    _check_scales(scales, torch.Size((*packed.shape[:-1], 2 * packed.shape[-1])), FP4_TILE)
    return _checked(decode_fp4(packed, scales, dtype), scales, FP4_TILE)


def decode_fp4(packed: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`dequantize_fp4` without its errors: NaN where a scale is."""
    values = _in_tiles(_unpacked(packed), FP4_TILE) * scales.float()[..., :, None, :, None]
    return values.reshape(*packed.shape[:-1], -1).to(dtype)


def round_fp8(x: Tensor, tile: tuple[int, int] = FP8_TILE) -> Tensor:
    """`quantize_fp8` and back in one go, in x's dtype; a tile with a NaN or an infinity becomes NaN, no error."""
    values, exponent = _scaled_fp8(x, tile)
    return _from_tiles(values * _as_scales(exponent).float()[..., :, None, :, None], x.shape).to(x.dtype)


def round_fp4(x: Tensor) -> Tensor:
    """`quantize_fp4` and back in one go, as `round_fp8`; the last group of a row may be shorter than 32."""
    values, exponent = _scaled_fp4(x)
    return _from_tiles(values * _as_scales(exponent).float()[..., :, None, :, None], x.shape).to(x.dtype)


class Fp8Fit(NamedTuple):
    """How an FP4 tensor's 128 x 128 blocks take to FP8; a spread is log2(largest / smallest scale that matters)."""

    blocks: int
    fitting: int  # blocks that FP8 holds without loss
    worst_spread: int  # largest spread of a block; up to 14 always fits, up to 11 (TileKernels' limit) normal FP8 does
    worst_block: tuple[int, ...]  # its index


def fp4_to_fp8(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """FP4 [..., N, K/2] with its scales -> the same values as `quantize_fp8` stores them, without loss.

    A block's new scale is its largest group scale / 2^6 (2^-127 where that would be less), and a value moves by its
    group's scale over the new one, so that 6 becomes at most 384 (DeepSeek's convert.py). A block whose scales spread
    so far that a value would be rounded is a ValueError with its index and its spread. Groups of zeros do not matter.
    """
    codes, scale, lossless, spread = _to_fp8(packed, scales)
    if not bool(lossless.all()):
        block = tuple((~lossless).nonzero()[0].tolist())
        raise ValueError(
            f"block {block} of 128 x 128 does not fit FP8 without loss: its scales spread over 2^{int(spread[block])}, "
            f"14 always fits ({int((~lossless).sum())} of {lossless.numel()} blocks do not fit)"
        )
    return codes, scale


def fp4_as_fp8(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """`fp4_to_fp8` without its errors: a value that FP8 does not hold is rounded, as `encode_fp4_as_fp8` does."""
    values = _unpacked(packed)
    exact, scale = _regrouped(values, scales.view(torch.uint8).int())
    codes = _from_tiles(exact, values.shape).to(torch.float8_e4m3fn)
    return codes, scale.to(torch.uint8).view(torch.float8_e8m0fnu)


def fp8_fit(packed: Tensor, scales: Tensor) -> Fp8Fit:
    """The report on `fp4_to_fp8` for a whole tensor; raises only for what is no FP4 tensor."""
    _, _, lossless, spread = _to_fp8(packed, scales)
    worst = int(spread.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), spread.shape))
    return Fp8Fit(lossless.numel(), int(lossless.sum()), int(spread.flatten()[worst]), index)


def _to_fp8(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes, scales, and for each block whether nothing was lost and its spread."""
    values = _unpacked(packed)
    _check_scales(scales, values.shape, FP4_TILE)
    _refuse_nan_scale(scales, FP4_TILE)
    group = scales.view(torch.uint8).int()
    exact, scale = _regrouped(values, group)
    codes = exact.to(torch.float8_e4m3fn)
    lossless = (codes.float() == exact).all(-1).all(-2)
    matters = _in_tiles(values, FP8_TILE).unflatten(-1, (-1, FP4_TILE[1])).ne(0).any(-1)
    groups = _in_tiles(group, _GROUPS)
    spread = (groups.amax((-3, -1))[..., :, None, :, None] - groups).mul_(matters).amax((-3, -1))
    return _from_tiles(codes, values.shape), scale.to(torch.uint8).view(torch.float8_e8m0fnu), lossless, spread


def _regrouped(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """E2M1 values fp32 [..., N, K] with scale bytes int32 [..., N, K/32] -> tiles of 128 x 128 in units of their own
    scale, fp32, and the bytes of those, int32."""
    groups = _in_tiles(group, _GROUPS)  # [..., n, 128, k, 4]; past the end 0
    scale = _block_scale(groups.amax((-3, -1)))
    shift = (groups - scale[..., :, None, :, None]).clamp_min(-64)  # below, every value rounds to zero anyway
    return _in_tiles(values, FP8_TILE) * _power(shift).repeat_interleave(FP4_TILE[1], -1), scale


def _block_scale(largest: Tensor) -> Tensor:
    """The byte of a block's scale for its groups' largest; int32. 255, NaN, stays."""
    return torch.where(largest == 255, 255, (largest - 6).clamp_min(0))


# Tiles: [..., N, K] as [..., n, rows, k, columns], zeros past the end.


def _in_tiles(x: Tensor, tile: tuple[int, int]) -> Tensor:
    _refuse_vector(x.shape)
    rows, columns = tile
    bottom, right = -x.shape[-2] % rows, -x.shape[-1] % columns
    x = F.pad(x, (0, right, 0, bottom)) if bottom or right else x
    return x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))


def _from_tiles(x: Tensor, shape: torch.Size) -> Tensor:
    return x.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]].contiguous()


def _exponent(amax: Tensor, floor: float, largest: float) -> Tensor:
    """int32, exact: the smallest e with max(amax, floor) / largest <= 2^e; 128 (a NaN scale) if amax is not finite."""
    mantissa, exponent = torch.frexp(amax.clamp_min(floor))
    m, e = math.frexp(largest)
    fits = exponent - e + (mantissa > m)
    return torch.where(amax.isfinite(), fits, 128).int()


def _power(exponent: Tensor) -> Tensor:
    """2^exponent in fp32, exact, for int32 in [-126, 127]."""
    return ((exponent + 127) << 23).view(torch.float32)


def _scaled_fp8(x: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Tiles of x rounded to E4M3, in units of their scale, fp32, and the scales' exponents."""
    tiles = _in_tiles(x.float(), tile)
    exponent = _exponent(tiles.abs().amax((-3, -1)), _FP8_FLOOR, 448.0)
    scaled = tiles * _inverse(exponent)
    return scaled.to(torch.float8_e4m3fn).float(), exponent


def _scaled_fp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles of x rounded to E2M1, in units of their scale, fp32, and the scales' exponents."""
    tiles = _in_tiles(x.float(), FP4_TILE)
    exponent = _exponent(tiles.abs().amax((-3, -1)), _FP4_FLOOR, 6.0)
    scaled = tiles * _inverse(exponent)
    # Neighbours of E2M1 are 0.5 apart below 2, then 1, then 2 from 4 on: half the power of two in max(|x|, 1).
    step = (scaled.abs().clamp_min(1).view(torch.int32) & 0x7F800000).view(torch.float32) / 2
    return torch.round(scaled / step) * step, exponent


def _inverse(exponent: Tensor) -> Tensor:
    """2^-exponent for every tile, NaN where the exponent is 128; shaped to multiply tiles."""
    return torch.where(exponent == 128, torch.nan, _power(-exponent.clamp_max(126)))[..., :, None, :, None]


def _as_scales(exponent: Tensor) -> Tensor:
    return (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def _packed(values: Tensor) -> Tensor:
    """E2M1 values fp32 [..., K] -> int8 [..., K/2]."""
    # As E4M3 they are a sign, 4 bits of exponent, 3 of mantissa. From 1 on (56) the upper 5 of these 7 bits count like
    # E2M1's codes from 2 on; below there are only 0 and 0.5 (48), the codes 0 and 1.
    fp8 = values.to(torch.float8_e4m3fn).view(torch.uint8)
    size = fp8 & 127
    code = torch.where(size < 56, (size == 48).to(torch.uint8), (size >> 2) - 12) | (fp8 >> 7 << 3)
    return (code[..., 0::2] | (code[..., 1::2] << 4)).view(torch.int8)


def _unpacked(packed: Tensor) -> Tensor:
    """int8 [..., K/2] -> E2M1 values fp32 [..., K]."""
    if packed.dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"packed FP4 must be int8, got {packed.dtype}")
    sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=packed.device)
    values = torch.cat([sizes, -sizes])
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)  # [256, 2]: low, high
    return F.embedding(packed.view(torch.uint8).int(), pairs).flatten(-2)


def _check_scales(scales: Tensor, shape: torch.Size, tile: tuple[int, int]) -> None:
    if scales.dtype != torch.float8_e8m0fnu:
        raise ValueError(f"scales must be float8_e8m0fnu, got {scales.dtype}")
    _refuse_vector(shape)
    wanted = [*shape[:-2], -(-shape[-2] // tile[0]), -(-shape[-1] // tile[1])]
    if list(scales.shape) != wanted:
        raise ValueError(f"values of shape {list(shape)} have scales of shape {wanted}, got {list(scales.shape)}")


def _check_groups(weight: Tensor) -> None:
    if weight.shape[-1] % FP4_TILE[1]:
        raise ValueError(f"FP4 needs rows of a multiple of {FP4_TILE[1]} columns, got shape {list(weight.shape)}")


def _refuse_vector(shape: torch.Size) -> None:
    if len(shape) < 2:
        raise ValueError(f"only matrices have tiles, got shape {list(shape)}")


def _refuse_nan_scale(scales: Tensor, tile: tuple[int, int]) -> None:
    _refuse(scales.view(torch.uint8) == 255, "scale of", "is NaN", tile)


def _checked(values: Tensor, scales: Tensor, tile: tuple[int, int]) -> Tensor:
    """`values`, unless one is not finite: the error says why."""
    if not bool(values.isfinite().all()):
        _refuse_nan_scale(scales, tile)
        bad = tuple((~values.isfinite()).nonzero()[0].tolist())
        what = "is NaN" if bool(values[bad].isnan()) else f"is too large for {values.dtype}"
        raise ValueError(f"value {bad} {what}")
    return values


def _refuse(bad: Tensor, before: str, after: str, tile: tuple[int, int]) -> None:
    if bool(bad.any()):
        index = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{before} tile {index} of {tile[0]} x {tile[1]} {after} ({int(bad.sum())} such)".strip())
