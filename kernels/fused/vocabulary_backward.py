"""Triton kernels of a piece of logits' gradient: at the end of the product that makes them, or from kept ones."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import vocabulary
from .launch import precision
from .linear import tile_place, tile_product, tiles
from .vocabulary import FORWARD, LOWEST, REVERSE, TOKENS, Against, Measured, grid, half_log_ratio, is_allowed


@triton.jit
def _gradient_of(x, y, r, c, there, targets, value, grad, of_entropy, within, first, KIND: tl.constexpr):
    """Of a tile of logits, from log p and log q, at rows r and columns c of the piece that begins at `first`.

    Rows have a teacher if `there`. `value`: the entropy, KL(p || q), or `Measured.second`.
    """
    known = tl.load(value + r, mask=within, other=0.0)[:, None]
    g = tl.load(grad + r, mask=within, other=0.0)
    if KIND == TOKENS:
        target = tl.load(targets + r, mask=within, other=-1) - first
        of_second = tl.load(of_entropy + r, mask=within, other=0.0)[:, None]
        p = tl.exp(x)
        found = g[:, None] * (tl.where(c == target[:, None], 1.0, 0.0) - p) - of_second * p * (x + known)
    else:
        if KIND == REVERSE:
            found = tl.exp(x) * (x - y - known)
        elif KIND == FORWARD:
            found = tl.exp(x) - tl.exp(y)
        else:
            found = tl.exp(x) * (half_log_ratio(x - y) - known)
        found = tl.where(there[:, None], g[:, None] * found, 0.0)
    return found


@triton.jit
def _gradient(
    hidden, weight, out, teacher, place, taught, targets, allowed, lse, teacher_lse, value, grad, of_entropy,
    rows, depth, columns, first, words, scale, KIND: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [T, columns] = the gradient of the logits hidden weightᵀ."""
    down, right = tile_place(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), GROUP)
    row, column = down * ROWS, right * COLUMNS
    sums = tile_product(hidden, weight, row, 0, column, depth, ROWS, COLUMNS, DEPTH, PRECISION)
    # One half after the other: there are not enough registers for what both need.
    HALF: tl.constexpr = COLUMNS // 2
    some, others = tl.split(tl.permute(tl.reshape(sums, [ROWS, 2, HALF]), [0, 2, 1]))
    r = row + tl.arange(0, ROWS)
    for half in tl.static_range(2):
        c, within = column + half * HALF + tl.arange(0, HALF)[None, :], r < rows
        x = (some if half == 0 else others) * scale - tl.load(lse + r, mask=within, other=0.0)[:, None]
        if KIND == TOKENS:
            y, there = x, within
        else:
            other = tl.load(place + r, mask=within, other=2**30)
            there = other < tl.load(taught)
            at = teacher + other.to(tl.int64)[:, None] * columns + c
            y = tl.load(at, mask=there[:, None] & (c < columns), other=0.0)
            y -= tl.load(teacher_lse + r, mask=there, other=0.0)[:, None]
        found = _gradient_of(x, y, r, c, there, targets, value, grad, of_entropy, within, first, KIND) * scale
        if MASKED:
            inside = within[:, None] & (c < columns)
            found = tl.where(is_allowed(allowed + r.to(tl.int64)[:, None] * words, first + c, inside), found, 0.0)
        out.store([row, column + half * HALF], found.to(out.dtype))


@triton.jit
def _gradient_of_kept(
    kept, teacher, parts, out, place, taught, targets, allowed, lse, teacher_lse, value, grad, of_entropy,
    rows, columns, first, words, count, scale,
    KIND: tl.constexpr, MASKED: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The same of one row and WIDTH columns, from what `_measure` kept: of the student, or, KEPT = 2, of the teacher
    too, each less the maximum of its block."""
    block = tl.program_id(1) * (WIDTH // BLOCK) + tl.arange(0, WIDTH // BLOCK)
    r = tl.program_id(0) + 0 * block  # of each block
    c = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    at, inside, real = r.to(tl.int64)[:, None] * columns + c, c < columns, block * BLOCK < columns
    own = parts + r.to(tl.int64) * count + first // BLOCK + block
    others = own + 3 * tl.num_programs(0).to(tl.int64) * count
    if KIND == FORWARD:
        own, others = others, own
    x = tl.maximum(tl.load(kept + at, mask=inside, other=0.0).to(tl.float32), LOWEST)
    x += (tl.load(own, mask=real, other=0.0) - tl.load(lse + r))[:, None]
    if KIND == TOKENS:
        y, there = x, r < rows
    else:
        other = tl.load(place + r)
        there = other < tl.load(taught)
        if KEPT == 2:
            y = tl.maximum(tl.load(teacher + at, mask=inside, other=0.0).to(tl.float32), LOWEST)
            y += (tl.load(others, mask=real, other=0.0) - tl.load(teacher_lse + r))[:, None]
        else:
            y = tl.load(teacher + other.to(tl.int64)[:, None] * columns + c, mask=inside & there[:, None], other=0.0)
            y -= tl.load(teacher_lse + r)[:, None]
    found = _gradient_of(x, y, r, c, there, targets, value, grad, of_entropy, r < rows, first, KIND) * scale
    if MASKED:
        found = tl.where(is_allowed(allowed + r.to(tl.int64)[:, None] * words, first + c, inside), found, 0.0)
    tl.store(out + at, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _clear(out, place, taught, columns, WIDTH: tl.constexpr):
    """Zeros in the rows of no teacher."""
    row, c = tl.program_id(0), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    if tl.load(place + row) >= tl.load(taught):
        zeros = tl.zeros([WIDTH], out.dtype.element_ty)
        tl.store(out + row.to(tl.int64) * columns + c, zeros, mask=c < columns)


def without_teacher(against: Against, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, columns] in `dtype`, as yet filled only where a row has no teacher."""
    out = torch.empty_like(like, dtype=dtype)
    _clear[grid(out)](out, against.place, against.taught, out.shape[1], WIDTH=vocabulary.BLOCK)
    return out


def gradient(
    against: Against, measured: Measured, grads: tuple[Tensor, ...], first: int,
    hidden: Tensor, weight: Tensor, teacher: Tensor | None,
) -> Tensor:  # fmt: skip
    """[T, columns] in hidden's dtype: of the logits that begin at column `first`, from the values' (and entropies')."""
    kind, targets, place, taught, scale = against[:5]
    (allowed, words), (rows, depth), columns = against.mask(), hidden.shape, weight.shape[0]
    out = hidden.new_empty(rows, columns)
    height, width, step, warps, stages = tiles(rows, columns, depth, hidden.dtype)
    _gradient[(triton.cdiv(rows, height) * triton.cdiv(columns, width),)](
        TensorDescriptor.from_tensor(hidden.contiguous(), [height, step]),
        TensorDescriptor.from_tensor(weight, [width, step]), TensorDescriptor.from_tensor(out, [height, width // 2]),
        out if teacher is None else teacher, place, taught, targets, allowed, measured.lse, measured.teacher_lse,
        measured.value if kind == REVERSE else measured.second, grads[0], grads[-1],
        rows, depth, columns, first, words, scale, KIND=kind, MASKED=words > 0,
        ROWS=height, COLUMNS=width, DEPTH=step, GROUP=8, PRECISION=precision(hidden.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def gradient_of_kept(
    against: Against, measured: Measured, parts: Tensor, block: int, grads: tuple[Tensor, ...], first: int,
    kept: list[Tensor], teacher: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The same in `dtype` from what `Parts.measure` kept, the parts, and the teacher's logits if they were not kept."""
    kind, targets, place, taught, scale = against[:5]
    (allowed, words), (rows, columns) = against.mask(), kept[0].shape
    out = torch.empty_like(kept[0], dtype=dtype)
    _gradient_of_kept[grid(out)](
        kept[0], kept[-1] if teacher is None else teacher, parts, out, place, taught, targets, allowed,
        measured.lse, measured.teacher_lse, measured.value if kind == REVERSE else measured.second, grads[0], grads[-1],
        rows, columns, first, words, parts.shape[2], scale,
        KIND=kind, MASKED=words > 0, KEPT=len(kept), BLOCK=block, WIDTH=vocabulary.BLOCK,
    )  # fmt: skip
    return out
