"""Losses over the vocabulary from hidden states: products with the head in pieces, `vocabulary`'s kernels on each.

A piece is the logits of all T tokens for some columns of the vocabulary, as many as `PIECE` bytes hold. It comes from
the product that decoding uses, and is measured as the sampler's logits are, so that log-probs have the same bits. The
backward computes each piece again, in a product that ends with the logits' gradient, or finds it kept, and multiplies
twice (cuBLAS). Pieces are of columns and not of tokens: so the head's gradient, the largest of all, is written once and
never added to, and only the one of T hidden states is summed up over pieces, in order, in fp32.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import vocabulary
from .launch import SAME_BITS, precision
from .linear import check, multiply, store_wide, tile_place, tile_product, tiles
from .vocabulary import Against, Measured, Parts, gradient, gradient_of_kept, pieces

KINDS = {"reverse": vocabulary.REVERSE, "forward": vocabulary.FORWARD, "jensen_shannon": vocabulary.MIXED}


@triton.jit(do_not_specialize=["teacher"])
def _teacher_logits(
    x, weight, y, spans, teacher, depth, out,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[spans[teacher] : spans[teacher + 1]] = those rows of x times weightᵀ; a grid for all rows, most may be none."""
    start, end = tl.load(spans + teacher), tl.load(spans + teacher + 1)
    rows, across = tl.cdiv(end - start, ROWS), tl.cdiv(out, COLUMNS)
    if tl.program_id(0) < rows * across:
        down, right = tile_place(tl.program_id(0), rows, across, GROUP)
        row, column = start + down * ROWS, right * COLUMNS
        sums = tile_product(x, weight, row, 0, column, depth, ROWS, COLUMNS, DEPTH, PRECISION)
        store_wide(y, sums, row, column, end, out, out, ROWS, COLUMNS)


class Teachers(NamedTuple):
    """Rows sorted by teacher, so that each one's head multiplies its own; how many they are, only the GPU knows."""

    hidden: Tensor  # [T, widest d'], teacher after teacher, then the rows of none
    heads: list[Tensor]  # [V, d'] each
    spans: Tensor  # int32 [n + 1]: where each teacher's rows begin; after the last one's, those of none
    place: Tensor  # int32 [T]: a token's row

    def logits(self, columns: slice) -> Tensor:
        """fp32 [T, columns]; rows of no teacher hold anything."""
        (rows, _), dtype, out = self.hidden.shape, self.hidden.dtype, columns.stop - columns.start
        y = self.hidden.new_empty(rows, out, dtype=torch.float32)
        for i, head in enumerate(self.heads):
            weight, depth = head[columns].to(dtype), head.shape[1]
            check(self.hidden, weight, 1)
            height, width, step, warps, stages = tiles(rows, out, depth, dtype)
            x = TensorDescriptor(self.hidden, [rows, depth], list(self.hidden.stride()), [height, step])
            _teacher_logits[(triton.cdiv(rows, height) * triton.cdiv(out, width),)](
                x, TensorDescriptor.from_tensor(weight, [width, step]), y, self.spans, i, depth, out,
                ROWS=height, COLUMNS=width, DEPTH=step, GROUP=8, PRECISION=precision(dtype),
                num_warps=warps, num_stages=stages, **SAME_BITS,
            )  # fmt: skip
        return y


def sorted_by_teacher(hidden: Tensor, heads: Mapping[int, Tensor], teacher: Tensor) -> Teachers:
    """Of teachers' hidden [T, widest d'] and heads by number, each token's number in `teacher` int64 [T]."""
    number = torch.full_like(teacher, len(heads))
    for i, key in enumerate(heads):
        number = number.masked_fill(teacher == key, i)
    order = number.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    counts = (number == torch.arange(-1, len(heads), device=order.device)[:, None]).sum(1)  # -1: none before the first
    frozen = [head.detach() for head in heads.values()]
    return Teachers(hidden.detach()[order], frozen, counts.cumsum(0).int(), place.int())


class TokenLoss(torch.autograd.Function):
    """Log-probs and entropies, fp32 [T]: hidden [T, d], head [V, d] in hidden's dtype or fp32, targets int64 [T]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, keep: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.against = Against(vocabulary.TOKENS, targets.contiguous(), targets, targets, 1 / temperature)
        parts, kept = Parts(ctx.against, head.shape[0]), []
        for columns in pieces(hidden.shape[0], head.shape[0]):
            kept += _measure_tokens(
                parts, columns.start, _logits(hidden, head, columns), hidden.dtype if keep else None
            )
        measured = parts.merged()
        ctx.teachers = None
        ctx.save_for_backward(hidden, head, *measured, parts.parts if keep else None, *kept)
        return measured.value, measured.second

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grads), None, None, None


class Divergence(torch.autograd.Function):
    """fp32 [T]: of the student's distributions from its teachers', by `KINDS`; teachers take no gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, teachers: Teachers, kind: str, keep: bool) -> Tensor:
        ctx.against = Against(KINDS[kind], teachers.place, teachers.place, teachers.spans[-1:])
        parts, kept = Parts(ctx.against, head.shape[0]), []

        def both(columns: slice) -> tuple[int, Tensor, Tensor]:
            return columns.start, _logits(hidden, head, columns), teachers.logits(columns)

        for columns in pieces(hidden.shape[0], head.shape[0]):
            kept += parts.measure(*both(columns), hidden.dtype if keep else None)
        measured = parts.merged()
        if kind == "jensen_shannon":
            sums = Parts(ctx.against, head.shape[0])
            for columns in pieces(hidden.shape[0], head.shape[0]):
                sums.mix(*both(columns), measured)
            sums.add_mixed(measured)
        ctx.teachers = teachers
        ctx.save_for_backward(hidden, head, *measured, parts.parts if keep else None, *kept)
        return measured.value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grads), None, None, None


def chosen_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """`TokenLoss`'s log-probs, bit for bit, from all the logits fp32 [B, V] of its rows."""
    parts = Parts(Against(vocabulary.TOKENS, tokens.contiguous(), tokens, tokens, 1 / temperature), logits.shape[1])
    if logits.shape[0]:
        _measure_tokens(parts, 0, logits.contiguous())
    return parts.merged().value


def _measure_tokens(parts: Parts, first: int, logits: Tensor, keep: torch.dtype | None = None) -> list[Tensor]:
    return parts.measure(first, logits, logits, keep)


def _logits(hidden: Tensor, head: Tensor, columns: slice) -> Tensor:
    return multiply(hidden, head[columns].to(hidden.dtype), wide=True)


def _gradients(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Of hidden states and head, where they are wanted."""
    hidden, head, *fields = ctx.saved_tensors
    measured, parts, kept = Measured(*fields[:4]), fields[4], fields[5:]
    grads, each = tuple(grad.contiguous() for grad in grads), 1 if ctx.teachers is None else 2
    of_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
    of_head = (torch.empty_like if hidden.shape[0] else torch.zeros_like)(head) if ctx.needs_input_grad[1] else None

    def add(i: int, columns: slice) -> None:
        weight = head[columns].to(hidden.dtype)
        if kept:
            own = kept[i * each : (i + 1) * each]
            grad = gradient_of_kept(ctx.against, measured, parts, grads, columns.start, own)
        else:
            teacher = None if ctx.teachers is None else ctx.teachers.logits(columns)
            grad = gradient(ctx.against, measured, grads, columns.start, hidden, weight, teacher)
        if of_hidden is not None:
            _multiply_into(of_hidden, grad, weight, beta=1)
        if of_head is not None:
            _multiply_into(of_head[columns], grad.t(), hidden, beta=0)

    for i, columns in enumerate(pieces(hidden.shape[0], head.shape[0])):
        add(i, columns)
    return None if of_hidden is None else of_hidden.to(hidden.dtype), of_head


def _multiply_into(out: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """out = beta out + a b, summed in fp32 and rounded once, to out's dtype: a's, or fp32."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)
