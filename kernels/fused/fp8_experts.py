"""Triton kernels of the experts in low precision: FP8 products of sorted rows, of weights in FP8 or in packed FP4.

As in moe.py an expert's slots are neighbouring rows, padded to whole tiles, and a row's sums do not depend on the
others'. Tokens are quantized into their rows; rows of padding hold anything until the first product makes them zeros.
What the second product reads is quantized where the first one makes it. FP4 weights become, tile by tile, the FP8 codes
of formats.fp4_to_fp8, and so give its bits. Many rows go to hopper_fp8.py's kernel, in bf16 and of weights in FP8.
Legend as in moe.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .fp8 import (
    BLOCK,
    COMPILED,
    add_product,
    as_rows,
    check_depth,
    check_input,
    dequantize,
    described,
    gated,
    quantize,
    regrouped,
    rounded,
)
from .launch import SAME_BITS, is_hopper
from .moe import BAND, combine, locate
from .moe_rows import Rows, sort_rows

QUANTIZED = 8, 512  # tokens and channels of a program that quantizes
COLUMNS = 128  # of a tile of weights, whose scales are one for 128 channels; a program has two side by side
# Of a group of 32: the codes of 0, 0.5, 1, 1.5, and of 2, 3, 4, 6, times a factor. They take the place of an arithmetic
# that would cost seven instructions a number.
TABLE: tl.constexpr = tl.constexpr("""{
    .reg .f32 half, more, two, three, four, six;
    .reg .b16 a, b, c, d;
    mul.f32 half, $2, 0f3F000000;
    mul.f32 more, $2, 0f3FC00000;
    mul.f32 two, $2, 0f40000000;
    mul.f32 three, $2, 0f40400000;
    mul.f32 four, $2, 0f40800000;
    mul.f32 six, $2, 0f40C00000;
    cvt.rn.satfinite.e4m3x2.f32 a, half, 0f00000000;
    cvt.rn.satfinite.e4m3x2.f32 b, more, $2;
    cvt.rn.satfinite.e4m3x2.f32 c, three, two;
    cvt.rn.satfinite.e4m3x2.f32 d, six, four;
    mov.b32 $0, {a, b};
    mov.b32 $1, {c, d};
}""")
# Eight FP4 numbers, four bits each, are looked up by the lower three; the upper one is the sign.
LOOKUP: tl.constexpr = tl.constexpr("""{
    .reg .b32 which, sign, first, second;
    and.b32 which, $2, 0x77777777;
    and.b32 sign, $2, 0x88888888;
    prmt.b32 $0, $3, $7, which;
    prmt.b32 first, 0x80, 0x80, sign;
    shr.u32 which, which, 16;
    shr.u32 sign, sign, 16;
    prmt.b32 $1, $3, $7, which;
    prmt.b32 second, 0x80, 0x80, sign;
    shl.b32 first, first, 1;
    shl.b32 second, second, 1;
    lop3.b32 $0, $0, first, 0x80808080, 0xF8;
    lop3.b32 $1, $1, second, 0x80808080, 0xF8;
}""")
Weights = tuple[Tensor, Tensor, Tensor | None]  # codes or packed FP4, scales, of FP4 the groups' scales


@triton.jit
def _fp8_of_fp4(packed, group, scale, N: tl.constexpr):
    """E4M3 codes [N, 128] in units of `scale` of packed FP4 [N, 64] with scales [N, 4]; scales are bytes, int32."""
    bytes_ = tl.reshape(packed, [N, 4, 16])
    if COMPILED:
        factor = ((tl.maximum(group - scale, -64) + 127) << 23).to(tl.float32, bitcast=True)
        low, high = tl.inline_asm_elementwise(TABLE, "=r,=r,f", [factor], (tl.int32, tl.int32), is_pure=True, pack=1)
        args = [bytes_, low[:, :, None], high[:, :, None]]
        pairs = tl.inline_asm_elementwise(LOOKUP, "=&r,=&r,r,r,r,r,r,r,r,r,r", args, tl.int16, is_pure=True, pack=4)
        codes = tl.join(pairs.to(tl.uint8), (pairs >> 8).to(tl.uint8))
        codes = tl.reshape(codes, [N, 128]).to(tl.float8e4nv, bitcast=True)
    else:
        both = tl.reshape(tl.join(bytes_, bytes_ >> 4), [N, 4, 32]).to(tl.int32)
        # Exponent and mantissa of E2M1 as fp32's are the number times 2^-126, which takes two factors of 2^63.
        number = ((both & 7) << 22 | (both & 8) << 28).to(tl.float32, bitcast=True)
        codes = regrouped(number * 9223372036854775808.0, group, scale, 63)
    return codes


@triton.jit
def _group_scales(groups, row, block, all_rows, depth, COLUMNS: tl.constexpr, FP4: tl.constexpr):
    """Of FP4, those of a weight's rows from `row` on and a block of channels, [COLUMNS, 4]; else nothing."""
    if FP4:
        r, g = row + tl.arange(0, COLUMNS)[:, None], block * (BLOCK // 32) + tl.arange(0, BLOCK // 32)[None, :]
        at = groups + r.to(tl.int64) * (depth // 32) + g
        scales = tl.load(at, mask=(r < all_rows) & (g < depth // 32), other=0).to(tl.int32)
    else:
        scales = 0
    return scales


@triton.jit
def _weight_tile(weight, row, block, group, scale, COLUMNS: tl.constexpr, FP4: tl.constexpr):
    """E4M3 codes of a weight's rows from `row` on and a block of channels; of FP4's in units of `scale`."""
    if FP4:
        tile = _fp8_of_fp4(weight.load([row, block * (BLOCK // 2)]), group, scale.to(tl.int32), COLUMNS)
    else:
        tile = weight.load([row, block * BLOCK])
    return tile


@triton.jit
def _two_tiles(
    x, of_rows, weight, groups, first, second, of_first, of_second, row, depth, all_rows,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FP4: tl.constexpr,
):  # fmt: skip
    """Sums [ROWS, COLUMNS] in fp32 of rows of x from `row` on, with the weight's rows from `first` and `second` on."""
    blocks = tl.cdiv(depth, BLOCK)
    left, right = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    scale_R, scale, other = tl.load(of_rows), tl.load(of_first), tl.load(of_second)
    group = _group_scales(groups, first, 0, all_rows, depth, COLUMNS, FP4)
    other_group = _group_scales(groups, second, 0, all_rows, depth, COLUMNS, FP4)
    for block in tl.range(0, blocks):
        ahead = tl.minimum(block + 1, blocks - 1)  # scales come a step before they are needed
        next_R, next_scale, next_other = tl.load(of_rows + ahead), tl.load(of_first + ahead), tl.load(of_second + ahead)
        next_group = _group_scales(groups, first, ahead, all_rows, depth, COLUMNS, FP4)
        next_other_group = _group_scales(groups, second, ahead, all_rows, depth, COLUMNS, FP4)
        some = x.load([row, block * BLOCK])
        left = add_product(left, some, _weight_tile(weight, first, block, group, scale, COLUMNS, FP4), scale_R, scale)
        codes = _weight_tile(weight, second, block, other_group, other, COLUMNS, FP4)
        right = add_product(right, some, codes, scale_R, other)
        scale_R, scale, other, group, other_group = next_R, next_scale, next_other, next_group, next_other_group
    return left, right


@triton.jit
def _quantize_rows(
    x, codes, scales, row_of_slot, tokens, depth, blocks, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """Codes and scales of tokens, each in the K rows of its slots. Limited by memory: 2 + K bytes a number of bf16."""
    token, k = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * C + tl.arange(0, C)
    block = tl.program_id(1) * (C // BLOCK) + tl.arange(0, C // BLOCK)
    real = (token < tokens)[:, None] & (k < depth)[None, :]
    at = token.to(tl.int64)[:, None] * depth + k[None, :]
    x_RC = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    code, scale = as_rows(tl.reshape(x_RC, [R * (C // BLOCK), BLOCK]))
    code, scale = tl.reshape(code, [R, C]), tl.reshape(scale, [R, C // BLOCK]).to(tl.uint8)
    for i in tl.static_range(K):
        row = tl.load(row_of_slot + token * K + i, mask=token < tokens, other=0).to(tl.int64)
        tl.store(codes + row[:, None] * depth + k[None, :], code, mask=real)
        whole = (token < tokens)[:, None] & (block < blocks)[None, :]
        tl.store(scales + row[:, None] * blocks + block[None, :], scale, mask=whole)


@triton.jit
def _up(
    x, x_scales, gate_up, w_scales, groups, projected, hidden, h_scales,
    weights, slot_of_row, expert_of_tile, first, count, total, limit, depth, inner, all_rows,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr, KEEP: tl.constexpr, FP4: tl.constexpr,
):  # fmt: skip
    """hidden = codes and scales of weight * swiglu(gate_up of rows of x); `projected` is what the backward needs, if
    KEEP, and of the dtype that hidden is rounded to before. COLUMNS is 128, a block of hidden.

    Limited by the L2 cache as fp8.py's product: 48 KiB for 8.4 MFLOP of 128 rows.
    """
    across, blocks = tl.cdiv(inner, COLUMNS), tl.cdiv(depth, BLOCK)
    tile = tl.program_id(0)
    if tile >= tl.load(total) * across:
        return
    expert, row, number = locate(tile, expert_of_tile, first, count, across, ROWS, BAND)
    column = number * COLUMNS
    r = row + tl.arange(0, ROWS)
    of_rows = x_scales + r.to(tl.int64) * blocks
    gate, of_gate = expert * 2 * inner + column, w_scales + (expert * 2 * across + number).to(tl.int64) * blocks
    gates, ups = _two_tiles(
        x, of_rows, gate_up, groups, gate, gate + inner, of_gate, of_gate + across * blocks, row, depth, all_rows,
        ROWS, COLUMNS, FP4,
    )  # fmt: skip
    slot = tl.load(slot_of_row + r)
    real = slot >= 0
    kind = projected.dtype.element_ty
    gate, up = rounded(tl.where(real[:, None], gates, 0.0), kind), rounded(tl.where(real[:, None], ups, 0.0), kind)
    c = column + tl.arange(0, COLUMNS)
    if KEEP:
        place = projected + r.to(tl.int64)[:, None] * 2 * inner + c[None, :]
        tl.store(place, gate.to(kind), mask=(c < inner)[None, :])
        tl.store(place + inner, up.to(kind), mask=(c < inner)[None, :])
    weight = tl.load(weights + slot, mask=real, other=0.0)
    made = rounded(gated(gate, up, limit) * weight[:, None], kind)
    code, scale_R = as_rows(tl.where((c < inner)[None, :], made, 0.0))
    hidden.store([row, column], code)
    tl.store(h_scales + r.to(tl.int64) * across + number, scale_R.to(tl.uint8))


@triton.jit
def _down(
    rows, r_scales, weights, w_scales, groups, out, expert_of_tile, first, count, total, depth, width, all_rows,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr, FP4: tl.constexpr,
):  # fmt: skip
    """out [P, width] = rows [P, depth] times an expert's weights [width, depth]ᵀ, in two tiles of 128 side by side."""
    across, blocks = tl.cdiv(width, 2 * COLUMNS), tl.cdiv(depth, BLOCK)
    tile = tl.program_id(0)
    if tile >= tl.load(total) * across:
        return
    expert, row, number = locate(tile, expert_of_tile, first, count, across, ROWS, BAND)
    column, last = number * 2 * COLUMNS, tl.cdiv(width, BLOCK) - 1
    of_rows = r_scales + (row + tl.arange(0, ROWS)).to(tl.int64) * blocks
    of_expert = w_scales + expert.to(tl.int64) * (last + 1) * blocks
    of_left = of_expert + column // BLOCK * blocks
    of_right = of_expert + tl.minimum((column + COLUMNS) // BLOCK, last) * blocks
    start = expert * width + column
    left, right = _two_tiles(
        rows, of_rows, weights, groups, start, start + COLUMNS, of_left, of_right, row, depth, all_rows,
        ROWS, COLUMNS, FP4,
    )  # fmt: skip
    out.store([row, column], left.to(out.dtype))
    out.store([row, column + COLUMNS], right.to(out.dtype))


def height_of(slots: int, experts: int) -> int:
    """Rows of a tile, by how many an expert has on average; `wgmma` takes 64 at least (fp8.py says why)."""
    return 64 if slots <= 64 * experts else 128


def _described(codes: Tensor, groups: Tensor | None) -> tuple[TensorDescriptor, Tensor]:
    """What a kernel takes of FP8 codes [.., K], or of packed FP4 [.., K/2] with its groups' scales."""
    if groups is None:
        return described(codes, COLUMNS, 128), codes
    return described(codes.view(torch.uint8), COLUMNS, 64), groups.view(torch.uint8)


def quantize_rows(x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """x [T, d] in bf16 or fp32 -> codes [P, d] and scales [P, ceil(d/128)]; of padding, nothing."""
    check_input(x)
    x = x.contiguous()
    (tokens, depth), total, blocks = x.shape, rows.slot.numel(), triton.cdiv(x.shape[1], 128)
    codes, scales = (
        x.new_empty(total, n, dtype=kind) for n, kind in ((depth, torch.float8_e4m3fn), (blocks, torch.uint8))
    )
    height, wide = QUANTIZED
    _quantize_rows[(triton.cdiv(tokens, height), triton.cdiv(depth, wide))](
        x, codes, scales, rows.row, tokens, depth, blocks,
        K=rows.row.numel() // tokens, R=height, C=wide, num_warps=4, **SAME_BITS,
    )  # fmt: skip
    return codes, scales


def on_hopper(rows: Rows, groups: Tensor | None, dtype: torch.dtype, depth: int, inner: int) -> bool:
    """Whether hopper_fp8.py's kernel takes both products; a row's result has the same bits in either."""
    fits = rows.height == 128 and depth % 256 == 0 and inner % 128 == 0
    return is_hopper(rows.slot.device) and groups is None and dtype == torch.bfloat16 and fits


def project_up(
    x: tuple[Tensor, Tensor], weights: Tensor, gate_up: Tensor, scales: Tensor, groups: Tensor | None,
    rows: Rows, limit: float, dtype: torch.dtype, keep: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """The first product [P, 2I], of no use unless `keep`; and hidden, codes [P, I] and scales [P, ceil(I/128)].

    x is codes [P, d] and scales; gate_up codes [E, 2, I, d], or packed FP4 [E, 2, I, d/2] with the scales of its
    `groups`; scales [E, 2, ceil(I/128), ceil(d/128)].
    """
    codes, x_scales = x
    (total, depth), inner = codes.shape, gate_up.shape[2]
    check_depth(inner)
    across = triton.cdiv(inner, COLUMNS)
    hidden, h_scales = codes.new_empty(total, inner), codes.new_empty(total, across, dtype=torch.uint8)
    projected = codes.new_empty(total if keep else 1, 2 * inner, dtype=dtype)
    if on_hopper(rows, groups, dtype, depth, inner):
        from . import hopper_fp8

        hopper_fp8.project_up(x, weights, gate_up, scales, rows, limit, projected, hidden, h_scales, keep)
        return projected, (hidden, h_scales)
    described_weights, group_scales = _described(gate_up, groups)
    _up[(rows.expert.numel() * across,)](
        described(codes, rows.height, 128), x_scales, described_weights, scales.view(torch.uint8), group_scales,
        projected, described(hidden, rows.height, COLUMNS), h_scales,
        weights, rows.slot, rows.expert, rows.first, rows.counts, rows.total, limit, depth, inner,
        gate_up[..., 0].numel(), ROWS=rows.height, COLUMNS=COLUMNS, BAND=BAND, KEEP=keep, FP4=groups is not None,
        num_warps=8, num_stages=4 if rows.height == 64 else 3, **SAME_BITS,
    )  # fmt: skip
    return projected, (hidden, h_scales)


def project_down(
    x: tuple[Tensor, Tensor], down: Tensor, scales: Tensor, groups: Tensor | None, rows: Rows, dtype: torch.dtype
) -> Tensor:
    """x, codes [P, I] and scales, times down, codes [E, d, I] or packed FP4 [E, d, I/2] -> [P, d]."""
    codes, x_scales = x
    depth, width = codes.shape[1], down.shape[1]
    check_depth(width)
    out = codes.new_empty(codes.shape[0], width, dtype=dtype)
    if on_hopper(rows, groups, dtype, width, depth):
        from . import hopper_fp8

        hopper_fp8.project_down(x, down, scales, rows, out)
        return out
    described_weights, group_scales = _described(down, groups)
    _down[(rows.expert.numel() * triton.cdiv(width, 2 * COLUMNS),)](
        described(codes, rows.height, 128), x_scales, described_weights, scales.view(torch.uint8), group_scales,
        described(out, rows.height, COLUMNS), rows.expert, rows.first, rows.counts, rows.total,
        depth, width, down[..., 0].numel(), ROWS=rows.height, COLUMNS=COLUMNS, BAND=BAND, FP4=groups is not None,
        num_warps=8, num_stages=4 if rows.height == 64 else 3 if dtype == torch.bfloat16 else 2, **SAME_BITS,
    )  # fmt: skip
    return out


def experts_forward(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Weights, down: Weights, limit: float, keep: bool
) -> tuple[Tensor, Tensor, Rows]:
    """`low_precision.experts_fp8`; what of its first product the backward needs, if `keep`; its rows."""
    if weights.dtype != torch.float32:
        raise ValueError(f"weights: {weights.dtype}; the Triton kernels take float32")
    experts, k = gate_up[0].shape[0], ids.shape[1]
    rows = sort_rows(ids, experts, height_of(ids.numel(), experts))
    sorted_rows = quantize_rows(x, rows)
    projected, hidden = project_up(sorted_rows, weights.contiguous(), *gate_up, rows, limit, x.dtype, keep)
    del sorted_rows
    return combine(project_down(hidden, *down, rows, x.dtype), rows, k, torch.float32), projected, rows


def _through_fp8(x: Tensor) -> Tensor:
    return dequantize(*quantize(x, True), x.dtype, True)


class QuantizedExperts(torch.autograd.Function):
    """`low_precision.experts_qat`. It keeps x and the codes of weights, and makes the backward's operands of them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, limit: float, fp4: bool,
        keep: bool,
    ) -> Tensor:  # fmt: skip
        if ids.numel() == 0:
            ctx.save_for_backward(x, weights, gate_up, down)
            return x.new_zeros(x.shape, dtype=torch.float32)
        upper, lower = quantize(gate_up.unflatten(1, (2, -1)), False, fp4), quantize(down, False, fp4)
        out, projected, rows = experts_forward(x, ids, weights, (*upper, None), (*lower, None), limit, keep)
        ctx.save_for_backward(x, weights, *upper, *lower, projected, *rows[1:])
        ctx.height, ctx.limit, ctx.dtypes = rows.height, limit, (x.dtype, gate_up.dtype, down.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from .moe_backward import experts_backward

        if len(ctx.saved_tensors) == 4:
            x, *others = (torch.zeros_like(a) for a in ctx.saved_tensors)
            return x, None, *others, None, None, None
        x, weights, up, up_scales, down, down_scales, projected, *rest = ctx.saved_tensors
        dtype, *masters = ctx.dtypes
        of_x, of_weights, *of_masters = experts_backward(
            grads[0], _through_fp8(x), weights.contiguous(),
            dequantize(up, up_scales, dtype, False).flatten(1, 2), dequantize(down, down_scales, dtype, False),
            projected, Rows(ctx.height, *rest), ctx.limit, ctx.needs_input_grad,
            stored=_through_fp8,
        )  # fmt: skip
        found = [grad if grad is None else grad.to(kind) for grad, kind in zip(of_masters, masters, strict=True)]
        return of_x, None, of_weights, *found, None, None, None
