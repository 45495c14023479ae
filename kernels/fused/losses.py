"""Losses over the vocabulary from hidden states: products with the head in pieces, `vocabulary`'s kernels on each.

A piece is the logits of all T tokens for some columns of the vocabulary, as many as `PIECE` bytes hold. It comes from
the product that decoding uses, and is measured as the sampler's logits are, so that log-probs have the same bits. The
backward finds the first pieces kept (`vocabulary.rooms`), computes the others again, in a product that ends with the
logits' gradient, and multiplies twice (cuBLAS). Pieces are of columns and not of tokens: so the head's gradient, the
largest of all, is written once and never added to, and only the one of T hidden states is summed up over pieces, in
order, in fp32. Memory of the head's gradient is allocated in the forward: until the backward writes it, kept pieces are
there. A second backward through the same graph computes all again.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import vocabulary
from .launch import SAME_BITS, precision
from .linear import check, multiply, store_wide, tile_place, tile_product, tiles
from .vocabulary import Against, Measured, Parts, pieces, rooms
from .vocabulary_backward import gradient, gradient_of_kept

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
    """Log-probs and entropies, fp32 [T]: hidden [T, d], head [V, d] in hidden's dtype or fp32, targets int64 [T].

    `allowed` and `group` as in `kernels.losses.token_scores`. `train`: whether there may be a backward.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, temperature: float, allowed: Tensor | None,
        group: dist.ProcessGroup | None, train: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if group is not None:
            targets = targets - group.rank() * head.shape[0]
        targets = targets.contiguous()
        against = Against(vocabulary.TOKENS, targets, targets, targets, 1 / temperature, allowed, group)
        measured = _measured(ctx, hidden, head, against, None, train)
        return measured.value, measured.second

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grads), None, None, None, None, None


class Divergence(torch.autograd.Function):
    """fp32 [T]: of the student's distributions from its teachers', by `KINDS`; teachers take no gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, teachers: Teachers, kind: str, group: dist.ProcessGroup | None,
        train: bool,
    ) -> Tensor:  # fmt: skip
        place, taught = teachers.place, teachers.spans[-1:]
        against = Against(KINDS[kind], place, place, taught, group=group)
        measured = _measured(ctx, hidden, head, against, teachers, train)
        if kind == "jensen_shannon":
            sums = Parts(against, head.shape[0])
            for columns in pieces(hidden.shape[0], head.shape[0]):
                sums.mix(columns.start, _logits(hidden, head, columns), teachers.logits(columns), measured)
            sums.add_mixed(measured)
        return measured.value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grads), None, None, None, None


def chosen_logprobs(logits: Tensor, tokens: Tensor, temperature: float, allowed: Tensor | None) -> Tensor:
    """`TokenLoss`'s log-probs, bit for bit, from all the logits fp32 [B, V] of its rows."""
    against = Against(vocabulary.TOKENS, tokens.contiguous(), tokens, tokens, 1 / temperature, allowed)
    parts = Parts(against, logits.shape[1])
    if logits.shape[0]:
        parts.measure(0, logits.contiguous(), logits, [])
    return parts.merged().value


def _logits(hidden: Tensor, head: Tensor, columns: slice) -> Tensor:
    return multiply(hidden, head[columns].to(hidden.dtype), wide=True)


def _measured(
    ctx: Any, hidden: Tensor, head: Tensor, against: Against, teachers: Teachers | None, train: bool
) -> Measured:
    """All pieces; what is kept of them goes, with all else that the backward needs, to `ctx`."""
    train = train and any(ctx.needs_input_grad[:2]) and hidden.shape[0] > 0
    parts, kept = Parts(against, head.shape[0]), []
    of_head = torch.empty_like(head) if train and ctx.needs_input_grad[1] else None
    if train:
        kept = list(rooms(hidden, head, of_head, 1 if teachers is None else 2))
    for i, columns in enumerate(pieces(hidden.shape[0], head.shape[0])):
        student = _logits(hidden, head, columns)
        teacher = student if teachers is None else teachers.logits(columns)
        parts.measure(columns.start, student, teacher, kept[i] if train else [])
    measured = parts.merged()
    ctx.against, ctx.teachers, ctx.kept, ctx.of_head = against, teachers, kept, of_head
    ctx.save_for_backward(hidden, head, parts.parts, *measured)
    return measured


def _gradients(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Of hidden states and head, where they are wanted."""
    hidden, head, parts, *fields = ctx.saved_tensors
    measured, against = Measured(*fields), ctx.against
    kept, of_head, ctx.kept, ctx.of_head = ctx.kept, ctx.of_head, [], None  # the backward writes over them
    grads = tuple(grad.contiguous() for grad in grads)
    of_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        of_head = None
    elif of_head is None:
        of_head = (torch.empty_like if hidden.shape[0] else torch.zeros_like)(head)

    def add(columns: slice, logits: list[Tensor]) -> None:
        weight, teacher = head[columns].to(hidden.dtype), None
        if ctx.teachers is not None and len(logits) < 2:
            teacher = ctx.teachers.logits(columns)
        if logits:
            grad = gradient_of_kept(against, measured, parts, grads, columns.start, logits, teacher, hidden.dtype)
        else:
            grad = gradient(against, measured, grads, columns.start, hidden, weight, teacher)
        if of_hidden is not None:
            _multiply_into(of_hidden, grad, weight, beta=1)
        if of_head is not None:
            _multiply_into(of_head[columns], grad.t(), hidden, beta=0)

    for i, columns in enumerate(pieces(hidden.shape[0], head.shape[0])):
        add(columns, kept[i] if kept else [])
    return None if of_hidden is None else against.summed(of_hidden).to(hidden.dtype), of_head


def _multiply_into(out: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """out = beta out + a b, summed in fp32 and rounded once, to out's dtype: a's, or fp32."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)
