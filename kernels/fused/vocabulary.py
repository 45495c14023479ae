"""Triton kernels on a piece of logits: what a token's loss needs to know of its row, and the logits' gradients.

A piece is [T, columns] of logits [T, V] in fp32. A program takes `BLOCK` columns of one row, and one more merges the
row's blocks. They begin at multiples of `BLOCK`, so that bits depend neither on pieces nor on other tokens.

A vocabulary spread over ranks is not built. Blocks of all ranks, side by side, would merge alike; the target's logit
and hidden's gradient would be sums over ranks.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import SAME_BITS, next_power, precision
from .linear import tile_place, tile_product, tiles

BLOCK = 2048  # columns
PIECE = 1 << 27  # bytes; of BLOCK columns or more
# What a row is measured for: the log-prob of its target with the entropy, or a divergence from a teacher.
TOKENS, REVERSE, FORWARD, MIXED = (tl.constexpr(kind) for kind in range(4))


@triton.jit
def _half_log_ratio(d):
    """log(p / m) / 2 with m = (p + q) / 2, from d = log(p / q)."""
    return 0.5 * (0.6931471805599453 - tl.maximum(-d, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(d))))


@triton.jit
def _load_block(logits, row, at, columns, known):
    """0 where there is nothing."""
    return tl.load(logits + row.to(tl.int64) * columns + at, mask=(at < columns) & known, other=0.0)


@triton.jit
def _highest(x, there):
    """The maximum, and exp(x - maximum)."""
    most = tl.max(tl.where(there, x, float("-inf")))
    return most, tl.where(there, tl.exp(x - most), 0.0)


@triton.jit
def _measure(
    student, teacher, place, taught, targets, picked, parts, kept, teacher_kept, columns, first, count, scale,
    KIND: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts [3 or 5, T, count] of one row and block: the logits' maximum m, the sum of e = exp(x - m), and the sum of
    e (x - m), for the entropy; against a teacher, of e ((x - m) - (y - n)), then y's own maximum n and its sum.

    With FORWARD, x is the teacher and y the student. A token's row of the teacher's logits is at its `place`, and is
    there if that is below `taught`. Also picks the logit of the row's target, where it is in the block, and keeps x - m
    and y - n: rounded, what counts most, next to the maximum, is the most exact.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    there = at < columns
    x = _load_block(student, row, at, columns, True) * scale
    step = tl.num_programs(0).to(tl.int64) * count
    parts += row.to(tl.int64) * count + first // BLOCK + block
    if KIND == TOKENS:
        m, e = _highest(x, there)
        ratio = x - m
        target = tl.load(targets + row) - first
        if (target >= block * BLOCK) & (target < block * BLOCK + BLOCK):
            tl.store(picked + row, tl.load(student + row.to(tl.int64) * columns + target) * scale)
    else:
        other = tl.load(place + row)
        y = _load_block(teacher, other, at, columns, other < tl.load(taught))
        if KIND == FORWARD:
            x, y = y, x
        m, e = _highest(x, there)
        n, f = _highest(y, there)
        ratio = (x - m) - (y - n)
        tl.store(parts + 3 * step, n)
        tl.store(parts + 4 * step, tl.sum(f))
        if KEEP:
            to = (kept if KIND == FORWARD else teacher_kept) + row.to(tl.int64) * columns + at
            tl.store(to, (y - n).to(kept.dtype.element_ty), mask=there)
    if KEEP:
        to = (teacher_kept if KIND == FORWARD else kept) + row.to(tl.int64) * columns + at
        tl.store(to, (x - m).to(kept.dtype.element_ty), mask=there)
    tl.store(parts, m)
    tl.store(parts + step, tl.sum(e))
    tl.store(parts + 2 * step, tl.sum(e * ratio))


@triton.jit
def _merge(
    parts, picked, place, taught, lse, other_lse, value, entropy, count, KIND: tl.constexpr, WIDTH: tl.constexpr
):
    """A row's blocks as one: log of its sum of exponentials (of x and of y), and what was asked for."""
    row = tl.program_id(0)
    step = tl.num_programs(0).to(tl.int64) * count
    at = tl.arange(0, WIDTH)
    there = at < count
    parts += row.to(tl.int64) * count + at
    m = tl.load(parts, mask=there, other=float("-inf"))
    most = tl.max(m)
    d = tl.where(there, m - most, 0.0)
    weight = tl.exp(d)
    part = tl.load(parts + step, mask=there, other=0.0)
    total = tl.sum(weight * part)
    tl.store(lse + row, most + tl.log(total))
    cross = tl.load(parts + 2 * step, mask=there, other=0.0)
    if KIND == TOKENS:
        tl.store(value + row, tl.load(picked + row) - most - tl.log(total))
        tl.store(entropy + row, tl.log(total) - tl.sum(weight * (cross + part * d)) / total)
    else:
        n = tl.load(parts + 3 * step, mask=there, other=float("-inf"))
        highest = tl.max(n)
        f = tl.where(there, n - highest, 0.0)
        other = tl.sum(tl.exp(f) * tl.load(parts + 4 * step, mask=there, other=0.0))
        tl.store(other_lse + row, highest + tl.log(other))
        divergence = tl.sum(weight * (cross + part * (d - f))) / total - tl.log(total) + tl.log(other)
        tl.store(value + row, tl.where(tl.load(place + row) < tl.load(taught), divergence, 0.0))


@triton.jit
def _mix(student, teacher, place, taught, lse, other_lse, parts, columns, first, count, BLOCK: tl.constexpr):
    """parts [2, T, count] of one row and block: the sums of p log(p / m) / 2 and of q log(q / m) / 2."""
    row, block = tl.program_id(0), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    other = tl.load(place + row)
    known = other < tl.load(taught)
    x = _load_block(student, row, at, columns, True) - tl.load(lse + row)
    y = _load_block(teacher, other, at, columns, known) - tl.load(other_lse + row)
    there = (at < columns) & known
    parts += row.to(tl.int64) * count + first // BLOCK + block
    tl.store(parts, tl.sum(tl.where(there, tl.exp(x) * _half_log_ratio(x - y), 0.0)))
    parts += tl.num_programs(0).to(tl.int64) * count
    tl.store(parts, tl.sum(tl.where(there, tl.exp(y) * _half_log_ratio(y - x), 0.0)))


@triton.jit
def _add_mixed(parts, value, half, count, WIDTH: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, WIDTH)
    parts += row.to(tl.int64) * count + at
    own = tl.sum(tl.load(parts, mask=at < count, other=0.0))
    parts += tl.num_programs(0).to(tl.int64) * count
    tl.store(half + row, own)
    tl.store(value + row, own + tl.sum(tl.load(parts, mask=at < count, other=0.0)))


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
            found = tl.exp(x) * (_half_log_ratio(x - y) - known)
        found = tl.where(there, g, 0.0)[:, None] * found
    return found


@triton.jit
def _gradient(
    hidden, weight, out, teacher, place, taught, targets, lse, teacher_lse, value, grad, of_entropy,
    rows, depth, columns, first, scale, KIND: tl.constexpr,
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
        found = _gradient_of(x, y, r, c, there, targets, value, grad, of_entropy, within, first, KIND)
        out.store([row, column + half * HALF], (found * scale).to(out.dtype))


@triton.jit
def _gradient_of_kept(
    kept, teacher_kept, parts, out, place, taught, targets, lse, teacher_lse, value, grad, of_entropy,
    rows, columns, first, count, scale, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same of one row and block, from what `_measure` kept of both."""
    r, block = tl.program_id(0) + tl.arange(0, 1), tl.program_id(1)
    c = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    at = r.to(tl.int64)[:, None] * columns + c
    parts += r.to(tl.int64) * count + first // BLOCK + block
    own, others = parts, parts + 3 * tl.num_programs(0).to(tl.int64) * count
    if KIND == FORWARD:
        own, others = others, own
    x = tl.load(kept + at, mask=c < columns, other=0.0).to(tl.float32) + (tl.load(own) - tl.load(lse + r))[:, None]
    if KIND == TOKENS:
        y, there = x, r < rows
    else:
        there = tl.load(place + r) < tl.load(taught)
        y = tl.load(teacher_kept + at, mask=c < columns, other=0.0).to(tl.float32)
        y += (tl.load(others) - tl.load(teacher_lse + r))[:, None]
    found = _gradient_of(x, y, r, c, there, targets, value, grad, of_entropy, r < rows, first, KIND)
    tl.store(out + at, (found * scale).to(out.dtype.element_ty), mask=c < columns)


def pieces(rows: int, columns: int) -> Iterator[slice]:
    """Of the vocabulary, in multiples of BLOCK; none where there are no rows."""
    size = max(PIECE // (4 * max(rows, 1)) // BLOCK, 1) * BLOCK
    for first in range(0, columns if rows else 0, size):
        yield slice(first, min(first + size, columns))


class Against(NamedTuple):
    """What T rows are measured against; a kernel does not read the tensors of another kind."""

    kind: tl.constexpr
    targets: Tensor  # int64 [T]
    place: Tensor  # int32 [T]: the row of a token's teacher in the teacher's logits ...
    taught: Tensor  # int32 [1]: ... and how many of these there are: a token with a place behind them has no teacher
    scale: float = 1.0  # of the student's logits; 1 against a teacher


class Measured(NamedTuple):
    """fp32 [T] each: what is asked for, and what the gradient needs beside it."""

    value: Tensor  # the log-prob, or the divergence
    second: Tensor  # the entropy; of a MIXED divergence, the sum of p log(p / m) / 2
    lse: Tensor
    teacher_lse: Tensor


class Parts:
    """Rows of a vocabulary, measured one piece after the other."""

    def __init__(self, against: Against, vocabulary: int):
        self.against, self.count = against, triton.cdiv(vocabulary, BLOCK)
        rows = against.targets.shape[0]
        self.parts = against.targets.new_empty(5, rows, self.count, dtype=torch.float32)
        self.picked = self.parts.new_empty(rows)

    def measure(self, first: int, student: Tensor, teacher: Tensor, keep: torch.dtype | None = None) -> list[Tensor]:
        """The piece that begins at column `first`, a multiple of BLOCK. Returns what it keeps, in the dtype `keep`."""
        kind, targets, place, taught, scale = self.against
        kept = [torch.empty_like(student, dtype=keep) for _ in range(1 if kind == TOKENS else 2)] if keep else []
        _measure[_grid(student)](
            student, teacher, place, taught, targets, self.picked, self.parts, *(kept or [student])[:1],
            *(kept or [student])[-1:], student.shape[1], first, self.count, scale,
            KIND=REVERSE if kind == MIXED else kind, KEEP=bool(kept), BLOCK=BLOCK, **SAME_BITS,
        )  # fmt: skip
        return kept

    def merged(self) -> Measured:
        kind, _, place, taught, _ = self.against
        result = Measured(*(torch.empty_like(self.picked) for _ in Measured._fields))
        value, second, x, y = result
        if kind == FORWARD:
            x, y = y, x
        if value.numel():
            _merge[(value.numel(),)](
                self.parts, self.picked, place, taught, x, y, value, second, self.count,
                KIND=REVERSE if kind == MIXED else kind, WIDTH=next_power(self.count), num_warps=1, **SAME_BITS,
            )  # fmt: skip
        return result

    def mix(self, first: int, student: Tensor, teacher: Tensor, measured: Measured) -> None:
        """The same piece again, when both normalizers are known."""
        _mix[_grid(student)](
            student, teacher, self.against.place, self.against.taught, measured.lse, measured.teacher_lse, self.parts,
            student.shape[1], first, self.count, BLOCK=BLOCK, **SAME_BITS,
        )  # fmt: skip

    def add_mixed(self, measured: Measured) -> None:
        if measured.value.numel():
            _add_mixed[(measured.value.numel(),)](
                self.parts, measured.value, measured.second, self.count, WIDTH=next_power(self.count), num_warps=1,
                **SAME_BITS,
            )  # fmt: skip


def gradient(
    against: Against, measured: Measured, grads: tuple[Tensor, ...], first: int,
    hidden: Tensor, weight: Tensor, teacher: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[T, columns] in hidden's dtype: of the logits that begin at column `first`, from the values' (and entropies')."""
    kind, targets, place, taught, scale = against
    (rows, depth), columns = hidden.shape, weight.shape[0]
    out = hidden.new_empty(rows, columns)
    height, width, step, warps, stages = tiles(rows, columns, depth, hidden.dtype)
    _gradient[(triton.cdiv(rows, height) * triton.cdiv(columns, width),)](
        TensorDescriptor.from_tensor(hidden.contiguous(), [height, step]),
        TensorDescriptor.from_tensor(weight, [width, step]), TensorDescriptor.from_tensor(out, [height, width // 2]),
        out if teacher is None else teacher, place, taught, targets, measured.lse, measured.teacher_lse,
        measured.value if kind == REVERSE else measured.second, grads[0], grads[-1],
        rows, depth, columns, first, scale, KIND=kind,
        ROWS=height, COLUMNS=width, DEPTH=step, GROUP=8, PRECISION=precision(hidden.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def gradient_of_kept(
    against: Against, measured: Measured, parts: Tensor, grads: tuple[Tensor, ...], first: int, kept: Sequence[Tensor]
) -> Tensor:
    """The same from what `Parts.measure` kept, in its dtype, and from the parts."""
    kind, targets, place, taught, scale = against
    out, (rows, columns) = torch.empty_like(kept[0]), kept[0].shape
    _gradient_of_kept[_grid(out)](
        kept[0], kept[-1], parts, out, place, taught, targets, measured.lse, measured.teacher_lse,
        measured.value if kind == REVERSE else measured.second, grads[0], grads[-1],
        rows, columns, first, parts.shape[2], scale, KIND=kind, BLOCK=BLOCK,
    )  # fmt: skip
    return out


def _grid(logits: Tensor) -> tuple[int, int]:
    return logits.shape[0], -(-logits.shape[1] // BLOCK)
