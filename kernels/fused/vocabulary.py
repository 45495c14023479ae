"""Triton kernels on a piece of logits: what a token's loss needs to know of its row.

A piece is [T, columns] of logits [T, V] in fp32. A program takes `BLOCK` columns of one row, and one more merges the
row's blocks. They begin at multiples of `BLOCK`, so that bits depend neither on pieces nor on other tokens. Of a
vocabulary spread over ranks, each measures its own columns; then all merge the blocks of all ranks, side by side.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from . import hopper_vocabulary
from .launch import SAME_BITS, next_power

BLOCK = 2048  # columns
PIECE = 1 << 27  # bytes; of BLOCK columns or more
KEPT = 1 << 28  # bytes of logits that are kept for the backward, beyond those that the head's gradient has room for
LOWEST: tl.constexpr = tl.constexpr(-65504.0)  # fp16's: a kept logit is no less, as its exponential is 0 anyway
# What a row is measured for: the log-prob of its target with the entropy, or a divergence from a teacher.
TOKENS, REVERSE, FORWARD, MIXED = (tl.constexpr(kind) for kind in range(4))


@triton.jit
def half_log_ratio(d):
    """log(p / m) / 2 with m = (p + q) / 2, from d = log(p / q)."""
    return 0.5 * (0.6931471805599453 - tl.maximum(-d, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(d))))


@triton.jit
def _load_block(logits, row, at, columns, known):
    """0 where there is nothing."""
    return tl.load(logits + row.to(tl.int64) * columns + at, mask=(at < columns) & known, other=0.0)


@triton.jit
def is_allowed(words, at, inside):
    """Whether bit `at` is set in a row's `words`; not where nothing is."""
    return ((tl.load(words + at // 32, mask=inside, other=0) >> (at % 32)) & 1) != 0


@triton.jit
def _highest(x, there):
    """The maximum, and exp(x - maximum). Of nothing, a number so low that nothing beside others counts."""
    most = tl.maximum(tl.max(tl.where(there, x, float("-inf"))), -1e30)
    return most, tl.where(there, tl.exp(x - most), 0.0)


@triton.jit
def _measure(
    student, teacher, place, taught, targets, allowed, picked, parts, kept, teacher_kept,
    columns, first, words, count, scale,
    KIND: tl.constexpr, MASKED: tl.constexpr, EACH: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts [3 or 5, T, count] of one row and block: the logits' maximum m, the sum of e = exp(x - m), and the sum of
    e (x - m), for the entropy; against a teacher, of e ((x - m) - (y - n)), then y's own maximum n and its sum.

    With FORWARD, x is the teacher and y the student. A token's row of the teacher's logits is at its `place`, and is
    there if that is below `taught`. Also picks the logit of the row's target, where it is in the block. The first KEEP
    of student and teacher are kept, less their maxima: rounded, what counts most, next to a maximum, is the most exact.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    if EACH:  # row has its own
        scale = tl.load(scale + row)
    at = block * BLOCK + tl.arange(0, BLOCK)
    there = at < columns
    x = _load_block(student, row, at, columns, True) * scale
    if MASKED:
        there = there & is_allowed(allowed + row.to(tl.int64) * words, first + at, there)
    step = tl.num_programs(0).to(tl.int64) * count
    parts += row.to(tl.int64) * count + first // BLOCK + block
    if KIND == TOKENS:
        m, e = _highest(x, there)
        ratio = x - m
        target = tl.load(targets + row) - first
        if (target >= block * BLOCK) & (target < tl.minimum(block * BLOCK + BLOCK, columns)):
            chosen = tl.load(student + row.to(tl.int64) * columns + target) * scale
            if MASKED:
                mine = is_allowed(allowed + row.to(tl.int64) * words, first + target, target >= 0)
                chosen = tl.where(mine, chosen, float("-inf"))
            tl.store(picked + row, chosen)
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
        if KEEP == 2:
            less = x - m if KIND == FORWARD else y - n
            to = teacher_kept + row.to(tl.int64) * columns + at
            tl.store(to, less.to(teacher_kept.dtype.element_ty), mask=there)
    if KEEP > 0:
        less = y - n if KIND == FORWARD else x - m
        tl.store(kept + row.to(tl.int64) * columns + at, less.to(kept.dtype.element_ty), mask=there)
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
    tl.store(parts, tl.sum(tl.where(there, tl.exp(x) * half_log_ratio(x - y), 0.0)))
    parts += tl.num_programs(0).to(tl.int64) * count
    tl.store(parts, tl.sum(tl.where(there, tl.exp(y) * half_log_ratio(y - x), 0.0)))


@triton.jit
def _add_mixed(parts, value, half, count, WIDTH: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, WIDTH)
    parts += row.to(tl.int64) * count + at
    own = tl.sum(tl.load(parts, mask=at < count, other=0.0))
    parts += tl.num_programs(0).to(tl.int64) * count
    tl.store(half + row, own)
    tl.store(value + row, own + tl.sum(tl.load(parts, mask=at < count, other=0.0)))


def pieces(rows: int, columns: int) -> Iterator[slice]:
    """Of the vocabulary, in multiples of BLOCK; none where there are no rows."""
    size = max(PIECE // (4 * max(rows, 1)) // BLOCK, 1) * BLOCK
    for first in range(0, columns if rows else 0, size):
        yield slice(first, min(first + size, columns))


def rooms(hidden: Tensor, head: Tensor, gradient: Tensor | None, tensors: int) -> Iterator[list[Tensor]]:
    """For each piece, memory [T, columns] in which up to `tensors` logits wait for the backward.

    First comes that of the head's `gradient`: a piece lies behind the gradients of all before it, so that the backward
    can write these as it goes; then `KEPT` bytes.
    """
    # Less their maxima, fp16 holds logits four times as exactly as bf16.
    dtype, left = torch.float16 if hidden.dtype == torch.bfloat16 else hidden.dtype, KEPT
    given = hidden.new_empty(0, dtype=dtype) if gradient is None else gradient.view(-1).view(dtype)
    step = max(hidden.shape[0], head.shape[1] * head.itemsize // dtype.itemsize)
    for columns in pieces(hidden.shape[0], head.shape[0]):
        start, shape = columns.start * step, (hidden.shape[0], columns.stop - columns.start)
        size = shape[0] * shape[1]
        found = [given[start : start + size].view(shape)] if start + size <= given.numel() else []
        while len(found) < tensors and size * dtype.itemsize <= left:
            found.append(hidden.new_empty(shape, dtype=dtype))
            left -= size * dtype.itemsize
        yield found


class Against(NamedTuple):
    """What T rows are measured against; a kernel does not read the tensors of another kind."""

    kind: tl.constexpr
    targets: Tensor  # int64 [T]; with a group, counted from the first of the rank's columns
    place: Tensor  # int32 [T]: the row of a token's teacher in the teacher's logits ...
    taught: Tensor  # int32 [1]: ... and how many of these there are: a token with a place behind them has no teacher
    scale: float | Tensor = 1.0  # of the student's logits; 1 against a teacher; to measure logits, also fp32 [T]
    allowed: Tensor | None = None  # int32 [T, words]: the columns that take part, a bit each
    group: dist.ProcessGroup | None = None  # of ranks that share the vocabulary

    def mask(self) -> tuple[Tensor, int]:
        """A kernel's arguments `allowed` and `words`."""
        return (self.targets, 0) if self.allowed is None else (self.allowed, self.allowed.shape[1])

    def together(self, parts: Tensor) -> Tensor:
        """parts [.., T, blocks] with the blocks of all ranks."""
        if self.group is None:
            return parts
        every = [torch.empty_like(parts) for _ in range(self.group.size())]
        dist.all_gather(every, parts.contiguous(), group=self.group)
        return torch.cat(every, -1)

    def summed(self, x: Tensor) -> Tensor:
        """Over ranks, in place."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x


class Measured(NamedTuple):
    """fp32 [T] each: what is asked for, and what the gradient needs beside it."""

    value: Tensor  # the log-prob, or the divergence
    second: Tensor  # the entropy; of a MIXED divergence, the sum of p log(p / m) / 2
    lse: Tensor
    teacher_lse: Tensor


class Parts:
    """Rows of a vocabulary, measured one piece after the other."""

    def __init__(self, against: Against, vocabulary: int, hopper: bool):
        """`hopper`: measured by `hopper_vocabulary`, in its blocks."""
        self.against, self.hopper, self.block = against, hopper, hopper_vocabulary.BLOCK if hopper else BLOCK
        self.count = triton.cdiv(vocabulary, self.block)
        rows, kinds = against.targets.shape[0], 3 if against.kind == TOKENS else 5
        self.parts = against.targets.new_empty(kinds, rows, self.count, dtype=torch.float32)
        self.picked = self.parts.new_zeros(rows)

    def measure(self, first: int, student: Tensor, teacher: Tensor, kept: list[Tensor]) -> None:
        """The piece that begins at column `first`, a multiple of BLOCK; fills `kept` with the student's logits and the
        teacher's, as many as there are."""
        kind, targets, place, taught, scale = self.against[:5]
        allowed, words = self.against.mask()
        if self.hopper:
            mask = allowed, words
            hopper_vocabulary.measure_logits(targets, mask, self.picked, self.parts, first, scale, student, kept)
            return
        some = [*kept, student, student]
        _measure[grid(student)](
            student, teacher, place, taught, targets, allowed, self.picked, self.parts, some[0], some[1],
            student.shape[1], first, words, self.count, scale,
            KIND=REVERSE if kind == MIXED else kind, MASKED=words > 0, EACH=isinstance(scale, Tensor), KEEP=len(kept),
            BLOCK=BLOCK, **SAME_BITS,
        )  # fmt: skip

    def measure_product(self, first: int, hidden: Tensor, weight: Tensor, kept: list[Tensor]) -> None:
        """The same of tokens' logits hidden [T, d] weight [columns, d]ᵀ, which are nowhere as a whole."""
        targets, scale, mask = self.against.targets, self.against.scale, self.against.mask()
        hopper_vocabulary.measure_tokens(targets, mask, self.picked, self.parts, first, scale, hidden, weight, kept)

    def merged(self) -> Measured:
        kind, _, place, taught = self.against[:4]
        result = Measured(*(torch.empty_like(self.picked) for _ in Measured._fields))
        value, second, x, y = result
        if kind == FORWARD:
            x, y = y, x
        if value.numel():
            parts = self.against.together(self.parts)
            _merge[(value.numel(),)](
                parts, self.against.summed(self.picked), place, taught, x, y, value, second, parts.shape[2],
                KIND=REVERSE if kind == MIXED else kind, WIDTH=next_power(parts.shape[2]), num_warps=1, **SAME_BITS,
            )  # fmt: skip
        return result

    def mix(self, first: int, student: Tensor, teacher: Tensor, measured: Measured) -> None:
        """The same piece again, when both normalizers are known."""
        _mix[grid(student)](
            student, teacher, self.against.place, self.against.taught, measured.lse, measured.teacher_lse, self.parts,
            student.shape[1], first, self.count, BLOCK=BLOCK, **SAME_BITS,
        )  # fmt: skip

    def add_mixed(self, measured: Measured) -> None:
        if measured.value.numel():
            parts = self.against.together(self.parts[:2])
            _add_mixed[(measured.value.numel(),)](
                parts, measured.value, measured.second, parts.shape[2], WIDTH=next_power(parts.shape[2]), num_warps=1,
                **SAME_BITS,
            )  # fmt: skip


def grid(logits: Tensor) -> tuple[int, int]:
    return logits.shape[0], -(-logits.shape[1] // BLOCK)
