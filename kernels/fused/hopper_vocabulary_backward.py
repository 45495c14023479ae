"""Gradients of logits for Hopper, in Gluon: `vocabulary_backward`'s, at the end of the products that make logits."""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper_linear import multiply_tiles, places, wide
from .hopper_vocabulary import BLOCK, FORWARD, MASKED, REVERSE, exp, only_allowed, product, quarters, rows_of, tokens_of

LOWEST = gl.constexpr(-65504.0)  # as `vocabulary` has it


@gluon.jit
def _half_log_ratio(d):
    """As `vocabulary.half_log_ratio`."""
    return 0.5 * (0.6931471805599453 - gl.maximum(-d, 0.0) - gl.log(1.0 + exp(-gl.abs(d))))


@gluon.jit
def _slope(logits, row, g, column, given, HOW: gl.constexpr):
    """The gradient of the student's logits, at their tokens: of kept ones, or of all that they are, in fp32."""
    kept, out, order, end, maxima, lse, teacher_lse, value, grad, columns, first, count = given
    WIDTH: gl.constexpr = logits.type.shape[1]
    QUARTER: gl.constexpr = WIDTH // 4
    y0, y1, y2, y3 = quarters(logits)
    token, own = tokens_of(order, row, end, y0)
    less = gl.load(lse + token, mask=own, other=0.0)
    if kept.dtype.element_ty == gl.float16:
        less -= gl.load(maxima + token * count + (first + column) // WIDTH, mask=own, other=0.0)
    of_teacher = gl.load(teacher_lse + token, mask=own, other=0.0)
    known, by = gl.load(value + token, mask=own, other=0.0), gl.load(grad + token, mask=own, other=0.0)
    for i in gl.static_range(4):
        y = (y0, y1, y2, y3)[i] - of_teacher[:, None]
        like = wide(y.to(gl.float16))
        to, mine = tokens_of(order, row, end, like)
        r, c = places(like, row, column + i * QUARTER)
        at, there = to[:, None] * columns + c, mine[:, None] & (c < columns)
        x = gl.load(kept + at, mask=there, other=0.0)
        x = gl.maximum(gl.convert_layout(x, y.type.layout).to(gl.float32), LOWEST) - less[:, None]
        if HOW & 3 == REVERSE:
            found = exp(x) * (x - y - known[:, None])
        elif HOW & 3 == FORWARD:
            found = exp(x) - exp(y)
        else:
            found = exp(x) * (_half_log_ratio(x - y) - known[:, None])
        gl.store(out + at, wide((found * by[:, None]).to(gl.bfloat16)), mask=there)


@gluon.jit(do_not_specialize=["teacher"])
def slope_kernel(
    hidden, weight, spans, teacher, kept, out, order, maxima, lse, teacher_lse, value, grad,
    depth, columns, first, count, HOW: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    start, end = gl.load(spans + teacher), gl.load(spans + teacher + 1)
    given = kept, out, order, end, maxima, lse, teacher_lse, value, grad, columns, first, count
    multiply_tiles(hidden, weight, given, start, end - start, depth, columns, 1, _slope, HOW, COLUMNS, 4)


@gluon.jit
def _token_slope(logits, row, g, column, given, HOW: gl.constexpr):
    """`vocabulary_backward._gradient` of tokens."""
    out, targets, allowed, lse, entropy, grad, of_entropy, rows, columns, first, words, scale = given
    QUARTER: gl.constexpr = logits.type.shape[1] // 4
    x0, x1, x2, x3 = quarters(logits * scale)
    at = rows_of(row, x0)
    known = at < rows
    total, of_all = gl.load(lse + at, mask=known, other=0.0), gl.load(entropy + at, mask=known, other=0.0)
    by, of_second = gl.load(grad + at, mask=known, other=0.0), gl.load(of_entropy + at, mask=known, other=0.0)
    target = (gl.load(targets + at, mask=known, other=-1) - first).to(gl.int32)
    for i in gl.static_range(4):
        x = (x0, x1, x2, x3)[i] - total[:, None]
        r, c = places(x, row, column + i * QUARTER)
        p = exp(x)
        found = by[:, None] * gl.where(c == target[:, None], 1.0 - p, -p)
        found = (found - of_second[:, None] * p * (x + of_all[:, None])) * scale
        if HOW & MASKED:
            found = only_allowed(found, 0.0, allowed, words, row, column + i * QUARTER, rows, first)
        values = wide(found.to(gl.bfloat16))
        r, c = places(values, row, column + i * QUARTER)
        gl.store(out + r.to(gl.int64) * columns + c, values, mask=(r < rows) & (c < columns))


@gluon.jit
def token_slope_kernel(
    hidden, weight, out, targets, allowed, lse, entropy, grad, of_entropy, rows, depth, columns, first, words, scale,
    HOW: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    given = out, targets, allowed, lse, entropy, grad, of_entropy, rows, columns, first, words, scale
    multiply_tiles(hidden, weight, given, 0, rows, depth, columns, 1, _token_slope, HOW, COLUMNS, 4)


def token_slope(
    targets: Tensor, mask: tuple[Tensor, int], lse: Tensor, entropy: Tensor, grads: tuple[Tensor, ...], first: int,
    scale: float, hidden: Tensor, weight: Tensor,
) -> Tensor:  # fmt: skip
    """`vocabulary_backward.gradient` of tokens."""
    (grid, x, w), (allowed, words) = product(hidden, weight), mask
    out = hidden.new_empty(hidden.shape[0], weight.shape[0])
    token_slope_kernel[grid](
        x, w, out, targets, allowed, lse, entropy, grads[0], grads[1], *hidden.shape, weight.shape[0], first, words,
        scale, HOW=MASKED * (words > 0), COLUMNS=BLOCK, num_warps=4,
    )  # fmt: skip
    return out


def slope(
    out: Tensor, parts: Tensor, kind: int, first: int, hidden: Tensor, weight: Tensor, spans: Tensor, teacher: int,
    order: Tensor, logits: Tensor, lse: Tensor, teacher_lse: Tensor, value: Tensor, grad: Tensor,
) -> None:  # fmt: skip
    """Fills a teacher's tokens' rows of out [T, columns], the gradient of the student's logits: fp32, or kept ones."""
    grid, x, w = product(hidden, weight)
    slope_kernel[grid](
        x, w, spans, teacher, logits, out, order, parts[3] if kind == FORWARD else parts[0], lse, teacher_lse, value,
        grad, weight.shape[1], weight.shape[0], first, parts.shape[2], HOW=kind, COLUMNS=BLOCK, num_warps=4,
    )  # fmt: skip
