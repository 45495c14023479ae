"""Rows of the decoding cache as bytes: FP8 entries of the attention, FP4 keys of the indexer.

The byte counts are V4's: 584 for an entry of 512 channels, 68 for a key of 128 (FlashMLA's and vLLM's layouts). Other
widths follow the same rules. What `stored` (compress.py) has rounded to FP8 or FP4 keeps its value as bytes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import fused
from .formats import (
    FP4_TILE,
    decode_fp4,
    decode_fp8,
    dequantize_fp4,
    dequantize_fp8,
    encode_fp4,
    encode_fp8,
    quantize_fp4,
    quantize_fp8,
)

ENTRY_TILE = (1, 64)  # channels of an entry that share a scale


def cache_entry_bytes(dim: int, rope_dim: int) -> int:
    """Bytes of an entry: FP8 channels, bf16 rope channels, a scale for each tile of 64; up to a multiple of 8."""
    if not 0 < rope_dim < dim:
        raise ValueError(f"an entry of {dim} channels cannot have {rope_dim} rope channels")
    plain = dim - rope_dim
    return -(-(plain + 2 * rope_dim + -(-plain // ENTRY_TILE[1])) // 8) * 8


def index_key_bytes(dim: int) -> int:
    """Bytes of a key: half a byte a channel and a scale for each 32 channels.

    `dim` is a multiple of 32, or (for small models, with one scale) an even number below; ValueError otherwise.
    """
    if dim <= 0 or dim % 2 or (dim > FP4_TILE[1] and dim % FP4_TILE[1]):
        raise ValueError(f"an FP4 index key has a multiple of {FP4_TILE[1]} channels, or fewer and even, got {dim}")
    return dim // 2 + -(-dim // FP4_TILE[1])


def write_cache_entries(cache: Tensor, where: Tensor, rows: Tensor, rope_dim: int = 64) -> None:
    """Packs rows [N, D] into rows `where` int64 [N] of `cache` uint8 [R, cache_entry_bytes], no row twice but with the
    same content. A number that is not finite is a ValueError, or on a GPU read as NaN."""
    if fused(rows):
        from .fused.cache_formats import write_entries

        return write_entries(cache, where, rows, rope_dim)
    check_cache(cache, cache_entry_bytes(rows.shape[1], rope_dim))
    cache[where] = _entry_bytes(rows, rope_dim, encode_fp8)


def read_cache_entries(
    cache: Tensor, where: Tensor, dim: int = 512, rope_dim: int = 64, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Rows `where` int64 [N] of what `write_cache_entries` wrote: [N, dim]; for -1 anything, which costs no time."""
    if fused(cache):
        from .fused.cache_formats import read_entries

        return read_entries(cache, where, dim, rope_dim, dtype)
    check_cache(cache, cache_entry_bytes(dim, rope_dim))
    return _entry_rows(cache[where.clamp(min=0)], dim, rope_dim, dtype, decode_fp8)


def write_index_keys(cache: Tensor, where: Tensor, keys: Tensor) -> None:
    """As `write_cache_entries`: keys [N, D], already rotated, into a cache uint8 [R, index_key_bytes]."""
    if fused(keys):
        from .fused.cache_formats import write_keys

        return write_keys(cache, where, keys)
    check_cache(cache, index_key_bytes(keys.shape[1]))
    cache[where] = _key_bytes(keys, encode_fp4)


def read_index_keys(cache: Tensor, where: Tensor, dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows `where` int64 [N] of what `write_index_keys` wrote: [N, dim]; for -1 anything, which costs no time."""
    if fused(cache):
        from .fused.cache_formats import read_keys

        return read_keys(cache, where, dim, dtype)
    check_cache(cache, index_key_bytes(dim))
    return _key_rows(cache[where.clamp(min=0)], dim, dtype, decode_fp4)


def pack_cache_entries(rows: Tensor, rope_dim: int = 64) -> Tensor:
    """rows [N, D], the last `rope_dim` channels rotated -> uint8 [N, cache_entry_bytes]: 584 bytes for D = 512.

    In order: E4M3 codes of the other channels, rope channels as bf16 (little-endian), scales of the tiles, zeros.
    """
    _finite(rows[:, rows.shape[1] - rope_dim :].to(torch.bfloat16))
    return _entry_bytes(rows, rope_dim, quantize_fp8)


def _entry_bytes(rows: Tensor, rope_dim: int, encode: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    size = cache_entry_bytes(rows.shape[1], rope_dim)
    plain, rope = rows.split([rows.shape[1] - rope_dim, rope_dim], dim=1)
    codes, scales = encode(plain, ENTRY_TILE)
    parts = [part.view(torch.uint8) for part in (codes, rope.to(torch.bfloat16).contiguous(), scales)]
    used = sum(part.shape[1] for part in parts)
    return torch.cat([*parts, parts[0].new_zeros(rows.shape[0], size - used)], dim=1)


def unpack_cache_entries(
    entries: Tensor, dim: int = 512, rope_dim: int = 64, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The inverse of `pack_cache_entries`: uint8 [N, bytes] -> [N, dim]; ValueError for another size or a NaN."""
    check_cache(entries, cache_entry_bytes(dim, rope_dim))
    rows = _entry_rows(entries, dim, rope_dim, dtype, dequantize_fp8)
    _finite(rows[:, dim - rope_dim :])
    return rows


def _entry_rows(entries: Tensor, dim: int, rope_dim: int, dtype: torch.dtype, decode: Callable[..., Tensor]) -> Tensor:
    plain, wide = dim - rope_dim, dim + rope_dim  # where the codes end, where the scales begin
    codes, rope, scales, _ = entries.tensor_split([plain, wide, wide - (-plain // ENTRY_TILE[1])], dim=1)
    values = decode(codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu), dtype, ENTRY_TILE)
    # A copy: a bf16 view starts at an even byte.
    return torch.cat([values, rope.clone().view(torch.bfloat16).to(dtype)], dim=1)


def pack_index_keys(keys: Tensor) -> Tensor:
    """keys [N, D], already rotated (`hadamard`) -> uint8 [N, index_key_bytes]: 68 bytes for D = 128; codes, scales."""
    return _key_bytes(keys, quantize_fp4)


def _key_bytes(keys: Tensor, encode: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    dim = keys.shape[1]
    index_key_bytes(dim)
    packed, scales = encode(F.pad(keys, (0, -dim % FP4_TILE[1])))
    return torch.cat([packed.view(torch.uint8)[:, : dim // 2], scales.view(torch.uint8)], dim=1)


def unpack_index_keys(packed: Tensor, dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The inverse of `pack_index_keys`: uint8 [N, bytes] -> [N, dim]; ValueError for another size or a NaN."""
    check_cache(packed, index_key_bytes(dim))
    return _key_rows(packed, dim, dtype, dequantize_fp4)


def _key_rows(packed: Tensor, dim: int, dtype: torch.dtype, decode: Callable[..., Tensor]) -> Tensor:
    codes, scales = packed.tensor_split([dim // 2], dim=1)
    codes = F.pad(codes, (0, -dim % FP4_TILE[1] // 2))
    return decode(codes.view(torch.int8), scales.contiguous().view(torch.float8_e8m0fnu), dtype)[:, :dim]


def _finite(rope: Tensor) -> None:
    if not bool(rope.isfinite().all()):
        raise ValueError("the rope channels of a cache entry hold a NaN or an infinity")


def check_cache(rows: Tensor, size: int) -> None:
    """ValueError for what are no rows of so many bytes."""
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != size:
        raise ValueError(f"rows must be uint8 [N, {size}], got {rows.dtype} {list(rows.shape)}")
