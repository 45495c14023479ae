"""Triton kernels of low precision: E4M3 codes with power-of-two scales made, read back, and multiplied.

Hopper's FP8 products keep about 14 bits of a sum. So a product of 128 channels is one sum there, which the kernel then
multiplies with both scales and adds up in fp32, block after block: nothing is split. Every row of a result goes through
`wgmma`'s 64 rows, in decoding too: the smaller `mma.sync` multiplies FP8 in another way, and so in other bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import DTYPES, SAME_BITS, STEP, is_hopper
from .limits import check_fp8
from .linear import tile_place

BLOCK: tl.constexpr = tl.constexpr(128)  # channels, and of a weight rows, that share a scale
COMPILED: tl.constexpr = tl.constexpr(not triton.knobs.runtime.interpret)
HEIGHT = 32  # tokens of a program that quantizes
# Of the fp32 numbers that the scales' rules compare with, and of NaN: their bits.
LEAST_FP8: tl.constexpr = tl.constexpr(0x38D1B717)  # 1e-4
LEAST_FP4: tl.constexpr = tl.constexpr(0x01C00000)  # 6 * 2^-126
INFINITE: tl.constexpr = tl.constexpr(0x7F800000)
NAN: tl.constexpr = tl.constexpr(0x7FC00000)
# Two numbers to bf16 and back; 1 / (1 + 2^(-x log2(e))).
ROUND: tl.constexpr = tl.constexpr("""{
    .reg .b32 both;
    cvt.rn.bf16x2.f32 both, $3, $2;
    shl.b32 $0, both, 16;
    and.b32 $1, both, 0xFFFF0000;
}""")
SIGMOID: tl.constexpr = tl.constexpr("""{
    .reg .f32 t;
    mul.f32 t, $1, 0fBFB8AA3B;
    ex2.approx.ftz.f32 t, t;
    add.f32 t, t, 0f3F800000;
    rcp.approx.ftz.f32 $0, t;
}""")


@triton.jit
def power(code):
    """2^(code - 127) in fp32 of a scale's byte; NaN for 255."""
    bits = code.to(tl.int32)
    bits = tl.where(bits == 0, 0x00400000, tl.where(bits == 255, NAN, bits << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def inverse(code):
    """2^(127 - code) in fp32 of the byte, int32, of a scale that a rule below chose; NaN for 255."""
    return tl.where(code == 255, NAN, (254 - code) << 23).to(tl.float32, bitcast=True)


@triton.jit
def magnitude(x):
    """The bits of |x| in fp32. They compare as the numbers do, with infinity and then NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def fp8_scale(largest):
    """Byte of the smallest power of two times 448 = 1.75 * 2^8 that is not below `largest` (bits) and 1e-4."""
    code = ((tl.maximum(largest, LEAST_FP8) + 0x1FFFFF) >> 23) - 8
    return tl.where(largest >= INFINITE, 255, code)


@triton.jit
def fp4_scale(largest):
    """Byte of the smallest power of two times 6 = 1.5 * 2^2 that is not below `largest` (bits) and 6 * 2^-126."""
    code = ((tl.maximum(largest, LEAST_FP4) + 0x3FFFFF) >> 23) - 2
    return tl.where(largest >= INFINITE, 255, code)


@triton.jit
def rounded(x, kind: tl.constexpr):
    """fp32 x as `kind` holds it, in fp32. The compiler would round to bf16 a number at a time, at an eighth of the rate
    of other instructions: here two."""
    if COMPILED and kind == tl.bfloat16:
        x = tl.inline_asm_elementwise(ROUND, "=r,=r,r,r", [x], tl.float32, is_pure=True, pack=2)
    else:
        x = x.to(kind).to(tl.float32)
    return x


@triton.jit
def gated(gate, up, limit):
    """silu(min(gate, limit)) times up between -limit and limit; NaN stays. Without denormals, whose care takes longer
    than the rest."""
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    if COMPILED:
        sigmoid = tl.inline_asm_elementwise(SIGMOID, "=r,r", [gate], tl.float32, is_pure=True, pack=1)
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    return gate * sigmoid * up


@triton.jit
def as_rows(x_RC):
    """E4M3 codes of fp32 x, 128 channels of some rows, and the bytes, int32, of the rows' scales."""
    scale_R = fp8_scale(tl.max(magnitude(x_RC), 1))
    return (x_RC * inverse(scale_R)[:, None]).to(tl.float8e4nv), scale_R


@triton.jit
def as_tile(x_RC):
    """E4M3 codes of fp32 x, a tile of a weight, and the byte of its scale."""
    scale = fp8_scale(tl.max(tl.max(magnitude(x_RC), 1), 0))
    return (x_RC * inverse(scale)).to(tl.float8e4nv), scale


@triton.jit
def regrouped(x_RGC, group_RG, scale, LESS: tl.constexpr):
    """E4M3 codes [R, 128] in units of `scale` for numbers in those of their group's scale times 2^-LESS. Scales are
    bytes, int32."""
    shift = tl.maximum(group_RG - scale, -64) + LESS
    codes = (x_RGC * ((shift + 127) << 23).to(tl.float32, bitcast=True)[:, :, None]).to(tl.float8e4nv)
    return tl.reshape(codes, [x_RGC.shape[0], BLOCK])


@triton.jit
def as_fp4_tile(x_RC):
    """As `as_tile`, of x rounded to FP4: the codes that formats.fp4_to_fp8 makes of it."""
    x_RGC = tl.reshape(x_RC, [x_RC.shape[0], 4, 32])
    group_RG = fp4_scale(tl.max(magnitude(x_RGC), 2))
    scaled = x_RGC * inverse(group_RG)[:, :, None]
    bits = magnitude(scaled)
    size = bits.to(tl.float32, bitcast=True)
    # E2M1's neighbours are `step` apart; 1.5 * 2^23 steps more, and fp32's are too.
    step = (tl.maximum(bits, 0x3F800000) & INFINITE).to(tl.float32, bitcast=True) * 0.5
    size = (size + step * 12582912.0) - step * 12582912.0
    sign = scaled.to(tl.int32, bitcast=True) ^ bits
    rounded = (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    largest = tl.max(tl.max(group_RG, 1), 0)
    scale = tl.where(largest == 255, 255, tl.maximum(largest - 6, 0))
    return regrouped(rounded, group_RG, scale, 0), scale


@triton.jit
def _quantize(x, codes, scales, rows, depth, R: tl.constexpr, BY_ROW: tl.constexpr, FP4: tl.constexpr):
    """Limited by memory: 3 bytes a number of bf16."""
    matrix = tl.program_id(2).to(tl.int64)
    row, k = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = (row < rows)[:, None] & (k < depth)[None, :]
    at = (matrix * rows + row)[:, None] * depth + k[None, :]
    x_RC = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    if BY_ROW:
        code, scale_R = as_rows(x_RC)
        place = scales + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(place, scale_R.to(tl.uint8), mask=row < rows)
    else:
        if FP4:
            code, scale = as_fp4_tile(x_RC)
        else:
            code, scale = as_tile(x_RC)
        place = (matrix * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
        tl.store(scales + place, scale.to(tl.uint8))
    tl.store(codes + at, code, mask=real)


@triton.jit
def _dequantize(codes, scales, out, rows, depth, R: tl.constexpr, BY_ROW: tl.constexpr):
    """Limited by memory: 3 bytes a number of bf16."""
    matrix = tl.program_id(2).to(tl.int64)
    row, k = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = (row < rows)[:, None] & (k < depth)[None, :]
    at = (matrix * rows + row)[:, None] * depth + k[None, :]
    x_RC = tl.load(codes + at, mask=real, other=0.0).to(tl.float32)
    if BY_ROW:
        place = scales + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        x_RC *= power(tl.load(place, mask=row < rows, other=127))[:, None]
    else:
        place = (matrix * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
        x_RC *= power(tl.load(scales + place))
    tl.store(out + at, x_RC.to(out.dtype.element_ty), mask=real)


@triton.jit
def add_product(sums, x, block, scale_R, scale):
    """sums + x times blockᵀ in units of both scales: 128 channels, one sum in `wgmma`.

    Empty assembly ends it: else the compiler adds up only after the next product, and holds the results of both.
    """
    sums = tl.fma(tl.dot(x, tl.trans(block)), (power(scale_R) * power(scale))[:, None], sums)
    if COMPILED:
        sums = tl.inline_asm_elementwise("", "=r,0", [sums], tl.float32, is_pure=False, pack=1)
    return sums


@triton.jit
def _multiply(
    x, x_scales, weight, w_scales, y, rows, depth, out,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = x times weightᵀ, in two tiles of COLUMNS, a divisor of 128: each has one scale for 128 channels.

    Limited by the L2 cache: 48 KiB for 8.4 MFLOP of 128 by 256 by 128, 5.9 TB/s at 1000 TFLOP/s. One sum in fp32 of a
    block at a time stands beside those of both tiles: 64 + 128 registers a thread of 8 warps.
    """
    down, across = tile_place(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(out, 2 * COLUMNS), GROUP)
    row, column, blocks = down * ROWS, across * 2 * COLUMNS, tl.cdiv(depth, BLOCK)
    r, second = row + tl.arange(0, ROWS), tl.minimum(column + COLUMNS, out - 1)
    of_rows = x_scales + r.to(tl.int64) * blocks
    of_left, of_right = w_scales + column // BLOCK * blocks, w_scales + second // BLOCK * blocks
    left, right = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    scale_R, scale, other = tl.load(of_rows, mask=r < rows, other=127), tl.load(of_left), tl.load(of_right)
    for k in tl.range(0, blocks):
        ahead = tl.minimum(k + 1, blocks - 1)  # scales come a step before they are needed
        next_R = tl.load(of_rows + ahead, mask=r < rows, other=127)
        next_scale, next_other = tl.load(of_left + ahead), tl.load(of_right + ahead)
        some = x.load([row, k * BLOCK])
        left = add_product(left, some, weight.load([column, k * BLOCK]), scale_R, scale)
        right = add_product(right, some, weight.load([column + COLUMNS, k * BLOCK]), scale_R, other)
        scale_R, scale, other = next_R, next_scale, next_other
    y.store([row, column], left.to(y.dtype))
    y.store([row, column + COLUMNS], right.to(y.dtype))


def _scales(x: Tensor, by_row: bool) -> Tensor:
    """Room for the scales of x."""
    *outer, rows, depth = x.shape
    return x.new_empty(*outer, rows if by_row else triton.cdiv(rows, 128), triton.cdiv(depth, 128), dtype=torch.uint8)


def _grid(x: Tensor, by_row: bool) -> tuple[int, int, int]:
    rows, depth = x.shape[-2:]
    return -(-rows // (HEIGHT if by_row else 128)), -(-depth // 128), x[..., 0, 0].numel()


def quantize(x: Tensor, by_row: bool, fp4: bool = False) -> tuple[Tensor, Tensor]:
    """`formats.encode_fp8` of x [T, K] by rows, or of [..., N, K] by tiles; `formats.encode_fp4_as_fp8` if `fp4`."""
    check_input(x)
    x = x.contiguous()
    codes, scales = torch.empty_like(x, dtype=torch.float8_e4m3fn), _scales(x, by_row)
    if x.numel():
        _quantize[_grid(x, by_row)](
            x, codes, scales, *x.shape[-2:], R=HEIGHT if by_row else 128, BY_ROW=by_row, FP4=fp4,
            num_warps=4 if by_row else 8, **SAME_BITS,
        )  # fmt: skip
    return codes, scales.view(torch.float8_e8m0fnu)


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype, by_row: bool) -> Tensor:
    """`formats.decode_fp8`."""
    out = torch.empty_like(codes, dtype=dtype)
    if out.numel():
        _dequantize[_grid(codes, by_row)](
            codes, scales.view(torch.uint8), out, *codes.shape[-2:], R=HEIGHT if by_row else 128, BY_ROW=by_row,
            num_warps=4 if by_row else 8, **SAME_BITS,
        )  # fmt: skip
    return out


def check_input(x: Tensor) -> None:
    """ValueError for what cannot be quantized."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{x.dtype}; the Triton kernels quantize bfloat16 or float32")
    check_depth(x.shape[-1])
    check_fp8(x.device)


def check_depth(depth: int) -> None:
    if depth % STEP:
        raise ValueError(f"channels: {depth}; the Triton kernels take multiples of {STEP}")


def multiply(x: Tensor, x_scales: Tensor, weight: Tensor, w_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes x [T, i] times weight [o, i] -> [T, o] in bf16 or fp32."""
    rows, depth, out = x.shape[0], x.shape[1], weight.shape[0]
    check_depth(depth)
    if out % STEP:
        raise ValueError(f"out_features: {out}; the Triton kernels take multiples of {STEP}")
    y = torch.empty(rows, out, dtype=dtype, device=x.device)
    if rows == 0:
        return y
    if is_hopper(x.device) and rows > 64 and dtype == torch.bfloat16 and out % 256 == 0 and depth % 128 == 0:
        from . import hopper_fp8

        hopper_fp8.multiply(x, x_scales, weight, w_scales, y)
        return y
    height, columns, warps, stages = tiles(rows, dtype)
    _multiply[(triton.cdiv(rows, height) * triton.cdiv(out, 2 * columns),)](
        described(x, height, 128), x_scales.view(torch.uint8),
        described(weight, columns, 128), w_scales.view(torch.uint8),
        described(y, height, columns), rows, depth, out,
        ROWS=height, COLUMNS=columns, GROUP=8, num_warps=warps, num_stages=stages, **SAME_BITS,
    )  # fmt: skip
    return y


def tiles(rows: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """ROWS, COLUMNS, warps, stages: of 128 x 256 results in fp32 64 KiB more stand in shared memory."""
    if rows <= 64:
        return 64, 32, 4, 5
    return 128, 128, 8, 3 if dtype == torch.bfloat16 else 2


def described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x [.., N] as rows of N, so many rows and columns at a time; past the ends zeros are read, and nothing written."""
    return TensorDescriptor.from_tensor(x.flatten(0, -2), [rows, columns])
