"""Triton kernels of `kernels.cache_formats`: rows become bytes of a cache, and bytes rows, in one pass over memory.

The bytes are those of `pack_cache_entries` and `pack_index_keys`. What is not finite is no error here: it becomes the
scale that means NaN, and is read as NaN. A place of -1 is not read, nor what would be read written.
Legend: R rows of a program, D channels of a row, G that share a scale.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cache_formats import ENTRY_TILE, cache_entry_bytes, check_cache, index_key_bytes
from ..formats import FP4_TILE
from .launch import check_dtypes, check_width

TILE = 4096  # numbers of a program


@triton.jit
def _scaled(x_RD, R: tl.constexpr, D: tl.constexpr, G: tl.constexpr, LARGEST: tl.constexpr, FLOOR: tl.constexpr):
    """x in units of its groups' scales, fp32 [R, D / G, G], and the scales' bytes [R, D / G]: the smallest power of two
    that brings a group's largest magnitude, at least FLOOR, to at most LARGEST, both given as bits of fp32."""
    groups = tl.reshape(x_RD, [R, D // G, G])
    # As integers, magnitudes keep their order, and NaN is the largest.
    largest = tl.maximum(tl.max(groups.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2), FLOOR)
    exponent = (largest - LARGEST + 0x7FFFFF) >> 23
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return groups * inverse[:, :, None], tl.where(largest >= 0x7F800000, 255, exponent + 127)


@triton.jit
def _times_scales(x_RD, bytes_RG, R: tl.constexpr, D: tl.constexpr, G: tl.constexpr):
    """x [R, D] times its groups' scales 2^(byte - 127), which are above 2^-127 in a cache; NaN for 255."""
    scales = tl.where(bytes_RG == 255, 0x7FC00000, bytes_RG.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    return tl.reshape(tl.reshape(x_RD, [R, D // G, G]) * scales[:, :, None], [R, D])


@triton.jit
def _write_entries(
    x, cache, cache_rope, where, rows, plain, wide,
    R: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """FP8 codes of the first `plain` channels, the others in bf16 (`cache_rope` is the cache as bf16), from byte `wide`
    on the scales, then zeros."""
    r, d = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, D)
    real = (r < rows)[:, None]
    to = tl.load(where + r, mask=r < rows, other=0)[:, None] * BYTES
    x_RD = tl.load(x + r[:, None] * D + d[None, :], mask=real, other=0.0).to(tl.float32)
    tl.store(cache_rope + to // 2 + (d - plain // 2)[None, :], x_RD, mask=real & (d >= plain)[None, :])
    values, scales = _scaled(tl.where((d < plain)[None, :], x_RD, 0.0), R, D, G, 0x43E00000, 0x38D1B717)
    codes = tl.reshape(values.to(tl.float8e4nv), [R, D]).to(tl.uint8, bitcast=True)
    tl.store(cache + to + d[None, :], codes, mask=real & (d < plain)[None, :])
    g, count = tl.arange(0, D // G)[None, :], (plain + G - 1) // G
    tl.store(cache + to + wide + g, scales.to(tl.uint8), mask=real & (g < count))
    rest = wide + count + tl.arange(0, 8)[None, :]
    tl.store(cache + to + rest, tl.zeros([R, 8], tl.uint8), mask=real & (rest < BYTES))


@triton.jit
def _read_entries(
    cache, cache_rope, where, y, rows, plain, wide,
    R: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    r, d = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, D)
    row = tl.load(where + r, mask=r < rows, other=-1)[:, None]
    real, first = row >= 0, (d < plain)[None, :]
    row = row * BYTES
    codes = tl.load(cache + row + d[None, :], mask=real & first, other=0).to(tl.float8e4nv, bitcast=True)
    g = tl.arange(0, D // G)[None, :]
    scales = tl.load(cache + row + wide + g, mask=real & (g * G < plain), other=0)
    values = _times_scales(codes.to(tl.float32), scales, R, D, G)
    rope = tl.load(cache_rope + row // 2 + (d - plain // 2)[None, :], mask=real & (first == 0), other=0.0)
    tl.store(y + r[:, None] * D + d[None, :], tl.where(first, values, rope.to(tl.float32)), mask=real)


@triton.jit
def _write_keys(
    x, cache, where, rows, R: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BYTES: tl.constexpr
):  # fmt: skip
    """FP4 codes, an even channel in a byte's low half, then the scales."""
    r, d = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, D)
    real = (r < rows)[:, None]
    to = tl.load(where + r, mask=r < rows, other=0)[:, None] * BYTES
    x_RD = tl.load(x + r[:, None] * D + d[None, :], mask=real, other=0.0).to(tl.float32)
    values, scales = _scaled(x_RD, R, D, G, 0x40C00000, 0x01C00000)
    size = tl.abs(values)
    # How many of the borders between 0, 0.5, 1, 1.5, 2, 3, 4, 6 are below; at one it is the even code.
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32) + tl.where(values.to(tl.int32, bitcast=True) < 0, 8, 0)
    low, high = tl.split(tl.reshape(code, [R, D // 2, 2]))
    tl.store(cache + to + tl.arange(0, D // 2)[None, :], (low | high << 4).to(tl.uint8), mask=real)
    tl.store(cache + to + D // 2 + tl.arange(0, D // G)[None, :], scales.to(tl.uint8), mask=real)


@triton.jit
def _read_keys(
    cache, where, y, rows, R: tl.constexpr, D: tl.constexpr, G: tl.constexpr, BYTES: tl.constexpr
):  # fmt: skip
    r, d = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, D)
    row = tl.load(where + r, mask=r < rows, other=-1)[:, None]
    real, row = row >= 0, row * BYTES
    pairs = tl.load(cache + row + tl.arange(0, D // 2)[None, :], mask=real, other=0).to(tl.int32)
    codes = tl.reshape(tl.join(pairs & 15, pairs >> 4), [R, D])
    size = codes & 7
    size = tl.where(size < 4, size, tl.where(size < 6, 2 * size - 4, 4 * size - 16)).to(tl.float32) * 0.5
    scales = tl.load(cache + row + D // 2 + tl.arange(0, D // G)[None, :], mask=real, other=0)
    values = _times_scales(tl.where(codes < 8, 1.0, -1.0) * size, scales, R, D, G)
    tl.store(y + r[:, None] * D + d[None, :], values, mask=real)


def _launch(kernel: Any, rows: int, width: int, group: int, size: int, *args: Any) -> None:
    """Of `rows` rows: their arguments, then their number and what follows of `args` behind the last tensor."""
    check_width("channels", width, least=8)
    if rows:
        height = max(TILE // width, 1)
        tensors, numbers = [x for x in args if isinstance(x, Tensor)], [x for x in args if not isinstance(x, Tensor)]
        kernel[(triton.cdiv(rows, height),)](
            *tensors, rows, *numbers, R=height, D=width, G=min(group, width), BYTES=size, num_warps=4
        )


def write_entries(cache: Tensor, where: Tensor, rows: Tensor, rope_dim: int) -> None:
    check_dtypes(rows=rows)
    width, size = rows.shape[1], cache_entry_bytes(rows.shape[1], rope_dim)
    check_cache(cache, size)
    views = cache, cache.view(torch.bfloat16)
    places = width - rope_dim, width + rope_dim
    _launch(_write_entries, len(rows), width, ENTRY_TILE[1], size, rows.contiguous(), *views, where, *places)


def read_entries(cache: Tensor, where: Tensor, dim: int, rope_dim: int, dtype: torch.dtype) -> Tensor:
    size, out = cache_entry_bytes(dim, rope_dim), cache.new_empty(len(where), dim, dtype=dtype)
    check_cache(cache, size)
    views = cache, cache.view(torch.bfloat16)
    _launch(_read_entries, len(where), dim, ENTRY_TILE[1], size, *views, where, out, dim - rope_dim, dim + rope_dim)
    return out


def write_keys(cache: Tensor, where: Tensor, keys: Tensor) -> None:
    check_dtypes(keys=keys)
    width, size = keys.shape[1], index_key_bytes(keys.shape[1])
    check_cache(cache, size)
    _launch(_write_keys, len(keys), width, FP4_TILE[1], size, keys.contiguous(), cache, where)


def read_keys(cache: Tensor, where: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    size, out = index_key_bytes(dim), cache.new_empty(len(where), dim, dtype=dtype)
    check_cache(cache, size)
    _launch(_read_keys, len(where), dim, FP4_TILE[1], size, cache, where, out)
    return out
