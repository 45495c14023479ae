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

from . import hopper_vocabulary, hopper_vocabulary_backward, vocabulary
from .launch import SAME_BITS, is_hopper, precision
from .linear import check, multiply, store_wide, tile_place, tile_product, tiles
from .vocabulary import Against, Measured, Parts, pieces, rooms
from .vocabulary_backward import gradient, gradient_of_kept, without_teacher

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
    place: Tensor  # int32 [T]: a token's row ...
    order: Tensor  # int32 [T]: ... and a row's token

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

    def measure(self, parts: Parts, hidden: Tensor, head: Tensor, columns: slice, kept: list[Tensor]) -> None:
        """`Parts.measure` on Hopper, of the student's logits hidden headᵀ."""
        kind, first, dtype = parts.against.kind, columns.start, hidden.dtype
        logits = hopper_vocabulary.measure_student(parts.parts, kind, first, hidden, head[columns].to(dtype), kept)
        for i, other in enumerate(self.heads):
            weight = other[columns].to(dtype)
            hopper_vocabulary.measure_teacher(
                parts.parts, kind, first, self.hidden, weight, self.spans, i, self.order, logits, kept
            )

    def slope(
        self, against: Against, measured: Measured, parts: Tensor, grad: Tensor, columns: slice, logits: Tensor
    ) -> Tensor:
        """`vocabulary_backward.gradient` on Hopper, from the student's logits: fp32, or kept ones."""
        out = without_teacher(against, logits, self.hidden.dtype)
        value = measured.value if against.kind == vocabulary.REVERSE else measured.second
        for i, other in enumerate(self.heads):
            hopper_vocabulary_backward.slope(
                out, parts, against.kind, columns.start, self.hidden, other[columns].to(out.dtype), self.spans, i,
                self.order, logits, measured.lse, measured.teacher_lse, value, grad,
            )  # fmt: skip
        return out


def sorted_by_teacher(hidden: Tensor, heads: Mapping[int, Tensor], teacher: Tensor) -> Teachers:
    """Of teachers' hidden [T, widest d'] and heads by number, each token's number in `teacher` int64 [T]."""
    number = torch.full_like(teacher, len(heads))
    for i, key in enumerate(heads):
        number = number.masked_fill(teacher == key, i)
    order = number.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    counts = (number == torch.arange(-1, len(heads), device=order.device)[:, None]).sum(1)  # -1: none before the first
    frozen = [head.detach() for head in heads.values()]
    return Teachers(hidden.detach()[order], frozen, counts.cumsum(0).int(), place.int(), order.int())


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
        targets, allowed = targets.contiguous(), None if allowed is None else allowed.contiguous()
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
            sums = Parts(against, head.shape[0], False)
            for columns in pieces(hidden.shape[0], head.shape[0]):
                sums.mix(columns.start, _logits(hidden, head, columns), teachers.logits(columns), measured)
            sums.add_mixed(measured)
        return measured.value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grads), None, None, None, None


def chosen_logprobs(logits: Tensor, tokens: Tensor, temperature: float | Tensor, allowed: Tensor | None) -> Tensor:
    """`TokenLoss`'s log-probs, bit for bit, from all the logits fp32 [B, V] of its rows."""
    allowed = None if allowed is None else allowed.contiguous()
    scale = 1 / temperature
    if isinstance(scale, Tensor):
        scale = scale.float()  # rounded once, as a launch rounds a float
    against = Against(vocabulary.TOKENS, tokens.contiguous(), tokens, tokens, scale, allowed)
    parts = Parts(against, logits.shape[1], is_hopper(logits.device))
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
    of_head = head.new_empty(head.shape) if train and ctx.needs_input_grad[1] else None
    kept = list(rooms(hidden, head, of_head, 1 if teachers is None else 2)) if train else []
    fast = hopper_vocabulary.takes(hidden)
    parts = Parts(against, head.shape[0], fast or (teachers is None and is_hopper(hidden.device)))
    for i, columns in enumerate(pieces(hidden.shape[0], head.shape[0])):
        first, room = columns.start, kept[i] if train else []
        if not fast:
            student = _logits(hidden, head, columns)
            parts.measure(first, student, student if teachers is None else teachers.logits(columns), room)
        elif teachers is None:
            parts.measure_product(first, hidden, head[columns].to(hidden.dtype), room)
        else:
            teachers.measure(parts, hidden, head, columns, room)
    measured = parts.merged()
    ctx.against, ctx.teachers, ctx.kept, ctx.of_head, ctx.block = against, teachers, kept, of_head, parts.block
    ctx.save_for_backward(hidden, head, parts.parts, *measured)
    return measured


def _gradients(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Of hidden states and head, where they are wanted."""
    hidden, head, _, *_ = ctx.saved_tensors
    kept, of_head, ctx.kept, ctx.of_head = ctx.kept, ctx.of_head, [], None  # the backward writes over them
    grads = tuple(grad.contiguous() for grad in grads)
    of_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        of_head = None
    elif of_head is None:
        of_head = (torch.empty_like if hidden.shape[0] else torch.zeros_like)(head)

    def add(columns: slice, room: list[Tensor]) -> None:
        grad = _gradient(ctx, grads, columns, room)
        if of_hidden is not None:
            _multiply_into(of_hidden, grad, head[columns].to(hidden.dtype), beta=1)
        if of_head is not None:
            _multiply_into(of_head[columns], grad.t(), hidden, beta=0)

    for i, columns in enumerate(pieces(hidden.shape[0], head.shape[0])):
        add(columns, kept[i] if kept else [])
    return None if of_hidden is None else ctx.against.summed(of_hidden).to(hidden.dtype), of_head


def _gradient(ctx: Any, grads: tuple[Tensor, ...], columns: slice, room: list[Tensor]) -> Tensor:
    """[T, columns] in hidden's dtype, of a piece of logits."""
    hidden, head, parts, *fields = ctx.saved_tensors
    against, measured, teachers, first = ctx.against, Measured(*fields), ctx.teachers, columns.start
    fast, whole = hopper_vocabulary.takes(hidden), len(room) == (1 if teachers is None else 2)
    if fast and not whole:
        weight = head[columns].to(hidden.dtype)
        if teachers is None:
            targets, scale, mask = against.targets, against.scale, against.mask()
            return hopper_vocabulary_backward.token_slope(
                targets, mask, measured.lse, measured.second, grads, first, scale, hidden, weight
            )
        logits = room[0] if room else multiply(hidden, weight, wide=True)
        return teachers.slope(against, measured, parts, grads[0], columns, logits)
    teacher = None if teachers is None or whole else teachers.logits(columns)
    if room:
        given = against, measured, parts, ctx.block, grads, first
        return gradient_of_kept(*given, room, teacher, hidden.dtype)
    return gradient(against, measured, grads, first, hidden, head[columns].to(hidden.dtype), teacher)


def _multiply_into(out: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """out = beta out + a b, summed in fp32 and rounded once, to out's dtype: a's, or fp32."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)
