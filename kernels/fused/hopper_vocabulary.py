"""Losses over the vocabulary for Hopper, in Gluon: `vocabulary`'s kernels at the end of the products that make logits.

Logits are measured where they are in registers, in blocks of 256 columns, those of a tile. A row has the same bits if
its logits come from memory (`measure_kernel`), as the sampler's do: the same function takes them in the same layout. Of
a divergence the student's product comes first, and leaves its logits in fp32 for the teachers', whose rows are sorted.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper import programs
from .hopper_linear import described, multiply_tiles, places, wide
from .launch import SAME_BITS, is_hopper
from .linear import check

BLOCK = 256
REVERSE, FORWARD = gl.constexpr(1), gl.constexpr(2)  # as `vocabulary` has them
# More of what `HOW` says: of tokens, if a mask is to be read; to keep logits; if rows have scales of their own.
MASKED, KEEP, EACH = gl.constexpr(4), gl.constexpr(8), gl.constexpr(16)
NOTHING = gl.constexpr(-3e38)  # of a number that takes no part: beside any maximum its exponential is 0


def takes(hidden: Tensor) -> bool:
    """Whether the kernels take products with these hidden states; else `vocabulary`'s do."""
    return is_hopper(hidden.device) and hidden.dtype == torch.bfloat16


@gluon.jit
def exp(x):
    """exp(x), 0 below 2^-126: an instruction less a number than `gl.exp`, which keeps what is smaller."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x * 1.4426950408889634], gl.float32, True, 1
    )


@gluon.jit
def _halves(x):
    """Of the columns."""
    return x.reshape([x.type.shape[0], 2, x.type.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.jit
def quarters(x):
    """Of the columns: there are not enough registers for what all need at once."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, x.type.shape[1] // 4, 16])
    left, right = _halves(x)
    a, b = _halves(left)
    c, d = _halves(right)
    a, b = gl.convert_layout(a, layout), gl.convert_layout(b, layout)  # the same registers, by a simpler name
    return a, b, gl.convert_layout(c, layout), gl.convert_layout(d, layout)


@gluon.jit
def rows_of(row, like):
    """Of a tile, in its layout."""
    return row + gl.arange(0, like.type.shape[0], gl.SliceLayout(1, like.type.layout))


@gluon.jit
def _those(x, row, column, rows, columns):
    """NOTHING where there is no number."""
    r, c = places(x, row, column)
    return gl.where((r < rows) & (c < columns), x, NOTHING)


@gluon.jit
def _real_quarters(x, row, column, rows, columns):
    """Of a tile, with NOTHING where there is no number: only at an edge, as a whole tile needs no masks."""
    x0, x1, x2, x3 = quarters(x)
    QUARTER: gl.constexpr = x.type.shape[1] // 4
    if (row + x.type.shape[0] > rows) | (column + x.type.shape[1] > columns):
        x0 = _those(x0, row, column, rows, columns)
        x1 = _those(x1, row, column + QUARTER, rows, columns)
        x2 = _those(x2, row, column + 2 * QUARTER, rows, columns)
        x3 = _those(x3, row, column + 3 * QUARTER, rows, columns)
    return x0, x1, x2, x3


@gluon.jit
def only_allowed(x, other, allowed, words, row, column, rows, first):
    """`other` where a bit is not set."""
    r, c = places(x, row, first + column)
    bits = gl.load(allowed + r.to(gl.int64) * words + c // 32, mask=(r < rows) & (c < words * 32), other=0)
    return gl.where(((bits >> (c % 32)) & 1) != 0, x, other)


@gluon.jit
def _highest(a, b, c, d):
    """Of each row of four quarters; of nothing, a number so low that nothing beside others counts."""
    most = gl.maximum(gl.maximum(gl.max(a, 1), gl.max(b, 1)), gl.maximum(gl.max(c, 1), gl.max(d, 1)))
    return gl.maximum(most, -1e30)


@gluon.jit
def _keep(kept, less, row, column, rows, columns):
    """Stores a tile at `row` and `column` of kept [rows, columns], fp16 or fp32."""
    values = less
    if kept.dtype.element_ty == gl.float16:
        values = wide(less.to(gl.float16))
    r, c = places(values, row, column)
    gl.store(kept + r.to(gl.int64) * columns + c, values, mask=(r < rows) & (c < columns))


@gluon.jit
def _measure(logits, row, g, column, given, HOW: gl.constexpr):
    """`vocabulary._measure` of tokens, a tile's rows at once."""
    targets, allowed, picked, parts, kept, rows, columns, first, words, count, scale = given
    WIDTH: gl.constexpr = logits.type.shape[1]
    QUARTER: gl.constexpr = WIDTH // 4
    x0, x1, x2, x3 = _real_quarters(logits * scale, row, column, rows, columns)
    if HOW & MASKED:
        x0 = only_allowed(x0, NOTHING, allowed, words, row, column, rows, first)
        x1 = only_allowed(x1, NOTHING, allowed, words, row, column + QUARTER, rows, first)
        x2 = only_allowed(x2, NOTHING, allowed, words, row, column + 2 * QUARTER, rows, first)
        x3 = only_allowed(x3, NOTHING, allowed, words, row, column + 3 * QUARTER, rows, first)
    m = _highest(x0, x1, x2, x3)
    at = rows_of(row, x0)
    known = at < rows
    target = (gl.load(targets + at, mask=known, other=-1) - first).to(gl.int32)
    hit = (target >= column) & (target < column + WIDTH) & (target < columns)
    hits = gl.max(hit.to(gl.int32), 0) > 0
    total, cross = m * 0.0, m * 0.0
    for i in gl.static_range(4):
        x = (x0, x1, x2, x3)[i]
        start = column + i * QUARTER
        less = x - m[:, None]
        e = exp(less)
        total += gl.sum(e, 1)
        cross += gl.sum(e * less, 1)
        if hits:
            r, c = places(x, row, start)
            chosen = gl.max(gl.where(c == target[:, None], x, float("-inf")), 1)
            chosen = gl.where(chosen == NOTHING, float("-inf"), chosen)
            gl.store(picked + at, chosen, mask=hit & (target >= start) & (target < start + QUARTER))
        if HOW & KEEP:
            _keep(kept, less, row, start, rows, columns)
    slot = parts + at.to(gl.int64) * count + (first + column) // WIDTH
    step = rows.to(gl.int64) * count
    gl.store(slot, m, mask=known)
    gl.store(slot + step, total, mask=known)
    gl.store(slot + 2 * step, cross, mask=known)


@gluon.jit
def token_kernel(
    hidden, weight, targets, allowed, picked, parts, kept, rows, depth, columns, first, words, count, scale,
    HOW: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Logits of a piece, measured and perhaps kept."""
    given = targets, allowed, picked, parts, kept, rows, columns, first, words, count, scale
    multiply_tiles(hidden, weight, given, 0, rows, depth, columns, 1, _measure, HOW, COLUMNS, 4)


@gluon.jit
def measure_kernel(
    logits, targets, allowed, picked, parts, kept, rows, columns, first, words, count, scale,
    HOW: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """The same of logits fp32 [rows, columns] in memory; their scale may be one of each row."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    row, column = gl.program_id(0) * 64, gl.program_id(1) * COLUMNS
    r, c = places(gl.zeros([64, COLUMNS], gl.float32, layout), row, column)
    x = gl.load(logits + r.to(gl.int64) * columns + c, mask=(r < rows) & (c < columns), other=0.0)
    if HOW & EACH:
        at = rows_of(row, x)
        x = x * gl.load(scale + at, mask=at < rows, other=1.0)[:, None]
        scale = 1.0
    given = targets, allowed, picked, parts, kept, rows, columns, first, words, count, scale
    _measure(x, row, 0, column, given, HOW)


@gluon.jit
def _of_student(logits, row, g, column, given, HOW: gl.constexpr):
    """Stores logits, in fp32 too, and of each row the maximum and the sum of exponentials."""
    y, maxima, totals, kept, rows, columns, first, count = given
    WIDTH: gl.constexpr = logits.type.shape[1]
    QUARTER: gl.constexpr = WIDTH // 4
    x0, x1, x2, x3 = _real_quarters(logits, row, column, rows, columns)
    m = _highest(x0, x1, x2, x3)
    total = m * 0.0
    for i in gl.static_range(4):
        x = (x0, x1, x2, x3)[i]
        less = x - m[:, None]
        total += gl.sum(exp(less), 1)
        r, c = places(x, row, column + i * QUARTER)
        gl.store(y + r.to(gl.int64) * columns + c, x, mask=(r < rows) & (c < columns))
        if HOW & KEEP:
            _keep(kept, less, row, column + i * QUARTER, rows, columns)
    at = rows_of(row, x0)
    slot = at.to(gl.int64) * count + (first + column) // WIDTH
    gl.store(maxima + slot, m, mask=at < rows)
    gl.store(totals + slot, total, mask=at < rows)


@gluon.jit
def student_kernel(
    hidden, weight, y, maxima, totals, kept, rows, depth, columns, first, count,
    HOW: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    given = y, maxima, totals, kept, rows, columns, first, count
    multiply_tiles(hidden, weight, given, 0, rows, depth, columns, 1, _of_student, HOW, COLUMNS, 4)


@gluon.jit
def tokens_of(order, row, end, like):
    """Which tokens a tile's rows are, and whether they are those of this teacher, in its layout."""
    at = rows_of(row, like)
    return gl.load(order + at, mask=at < end, other=0).to(gl.int64), at < end


@gluon.jit
def _of_teacher(logits, row, g, column, given, HOW: gl.constexpr):
    """Of each row the maximum, the sum of exponentials, and the sum of e ((x - m) - (y - n)) or, FORWARD, of
    f ((y - n) - (x - m))."""
    x_in, order, end, maxima, highest, totals, crosses, kept, columns, first, count = given
    WIDTH: gl.constexpr = logits.type.shape[1]
    QUARTER: gl.constexpr = WIDTH // 4
    y0, y1, y2, y3 = _real_quarters(logits, row, column, end, columns)
    n = _highest(y0, y1, y2, y3)
    token, own = tokens_of(order, row, end, y0)
    slot = token * count + (first + column) // WIDTH
    m = gl.load(maxima + slot, mask=own, other=0.0)
    total, cross = n * 0.0, n * 0.0
    for i in gl.static_range(4):
        y = (y0, y1, y2, y3)[i]
        r, c = places(y, row, column + i * QUARTER)
        there = (r < end) & (c < columns)
        x = gl.load(x_in + token[:, None] * columns + c, mask=there, other=NOTHING)
        less, less_y = x - m[:, None], y - n[:, None]
        f = exp(less_y)
        total += gl.sum(f, 1)
        if HOW & 3 == FORWARD:
            cross += gl.sum(gl.where(there, f * (less_y - less), 0.0), 1)
        else:
            cross += gl.sum(gl.where(there, exp(less) * (less - less_y), 0.0), 1)
        if HOW & KEEP:
            values = wide(less_y.to(gl.float16))
            to, mine = tokens_of(order, row, end, values)
            r, c = places(values, row, column + i * QUARTER)
            gl.store(kept + to[:, None] * columns + c, values, mask=(r < end) & (c < columns))
    gl.store(highest + slot, n, mask=own)
    gl.store(totals + slot, total, mask=own)
    gl.store(crosses + slot, cross, mask=own)


@gluon.jit(do_not_specialize=["teacher"])
def teacher_kernel(
    hidden, weight, spans, teacher, x, order, maxima, highest, totals, crosses, kept,
    depth, columns, first, count, HOW: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Logits of a teacher's rows beside the student's x fp32 [T, columns]."""
    start, end = gl.load(spans + teacher), gl.load(spans + teacher + 1)
    given = x, order, end, maxima, highest, totals, crosses, kept, columns, first, count
    multiply_tiles(hidden, weight, given, start, end - start, depth, columns, 1, _of_teacher, HOW, COLUMNS, 4)


def product(hidden: Tensor, weight: Tensor) -> tuple[tuple[int], TensorDescriptor, TensorDescriptor]:
    """Programs, and both operands."""
    items = -(-hidden.shape[0] // 128) * -(-weight.shape[0] // BLOCK)
    check(hidden[:, : weight.shape[1]], weight, 1)
    x = described(hidden.contiguous(), 64, weight.shape[1])
    return (programs(items, hidden.device),), x, described(weight.contiguous(), BLOCK)


def measure_tokens(
    targets: Tensor, mask: tuple[Tensor, int], picked: Tensor, parts: Tensor, first: int, scale: float,
    hidden: Tensor, weight: Tensor, kept: list[Tensor],
) -> None:  # fmt: skip
    """`vocabulary.Parts.measure` of the logits hidden [T, d] weight [columns, d]ᵀ, which are nowhere as a whole."""
    (grid, x, w), (allowed, words) = product(hidden, weight), mask
    token_kernel[grid](
        x, w, targets, allowed, picked, parts, (kept or [parts])[0], *hidden.shape, weight.shape[0], first, words,
        parts.shape[2], scale, HOW=MASKED * (words > 0) + KEEP * bool(kept), COLUMNS=BLOCK, num_warps=4, **SAME_BITS,
    )  # fmt: skip


def measure_logits(
    targets: Tensor, mask: tuple[Tensor, int], picked: Tensor, parts: Tensor, first: int, scale: float | Tensor,
    logits: Tensor, kept: list[Tensor],
) -> None:  # fmt: skip
    """The same of logits fp32 [T, columns]."""
    (rows, columns), (allowed, words) = logits.shape, mask
    how = MASKED * (words > 0) + KEEP * bool(kept) + EACH * isinstance(scale, Tensor)
    measure_kernel[(-(-rows // 64), -(-columns // BLOCK))](
        logits, targets, allowed, picked, parts, (kept or [parts])[0], rows, columns, first, words, parts.shape[2],
        scale, HOW=how, COLUMNS=BLOCK, num_warps=4, **SAME_BITS,
    )  # fmt: skip


def measure_student(parts: Tensor, kind: int, first: int, hidden: Tensor, weight: Tensor, kept: list[Tensor]) -> Tensor:
    """The student's part of `vocabulary.Parts.measure` against teachers; returns its logits fp32 [T, columns]."""
    grid, x, w = product(hidden, weight)
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=torch.float32)
    own = parts[3:] if kind == FORWARD else parts[:2]
    student_kernel[grid](
        x, w, logits, own[0], own[1], (kept or [parts])[0], *hidden.shape, weight.shape[0], first, parts.shape[2],
        HOW=KEEP * bool(kept), COLUMNS=BLOCK, num_warps=4, **SAME_BITS,
    )  # fmt: skip
    return logits


def measure_teacher(
    parts: Tensor, kind: int, first: int, hidden: Tensor, weight: Tensor, spans: Tensor, teacher: int, order: Tensor,
    logits: Tensor, kept: list[Tensor],
) -> None:  # fmt: skip
    """A teacher's: of hidden's rows spans[teacher] ... spans[teacher + 1], which are those of the tokens `order`."""
    grid, x, w = product(hidden, weight)
    student, own = (parts[3], parts) if kind == FORWARD else (parts[0], parts[3:])
    teacher_kernel[grid](
        x, w, spans, teacher, logits, order, student, own[0], own[1], parts[2], kept[1] if len(kept) > 1 else parts,
        weight.shape[1], weight.shape[0], first, parts.shape[2],
        HOW=(FORWARD if kind == FORWARD else REVERSE) + KEEP * (len(kept) > 1), COLUMNS=BLOCK, num_warps=4, **SAME_BITS,
    )  # fmt: skip
