"""Losses over the vocabulary, from hidden states and a head, in pieces that never hold [T, vocabulary] at once.

Logits are fp32: hidden states and head are upcast. On a GPU they are multiplied in hidden's dtype, to which a head in
fp32 is rounded first, with sums in fp32.

A vocabulary may be spread over the ranks of a `group`: each holds as many of the head's rows as the others, those of a
lower rank before those of a higher one, and all of the hidden states, which are the same everywhere. Each rank gets the
whole result, and, under the same gradients of it, the whole gradient of hidden states and that of its own rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .dispatch import fused
from .project import project, project_wide
from .upcast import upcast

Kind = Literal["reverse", "forward", "jensen_shannon"]
_LOGITS_AT_ONCE = 1 << 22  # elements of one piece of logits (16 MiB in fp32)


class TokenScores(NamedTuple):
    """fp32 [T] each, in nats; a log-prob's negative is the cross-entropy."""

    logprobs: Tensor
    entropy: Tensor


def logits(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden [..., d] head^T, head [V, d] -> fp32 [..., V]; float64 in float64, as all that is called fp32 here."""
    if fused(hidden):
        return project_wide(hidden.flatten(0, -2), head.to(hidden.dtype)).unflatten(0, hidden.shape[:-1])
    return project(upcast(hidden), upcast(head))


def packed_mask(allowed: Tensor) -> Tensor:
    """bool [T, V] -> int32 [T, ceil(V / 32)]: a mask as losses take it, token v as bit v % 32 of word v // 32."""
    bits = F.pad(allowed, (0, -allowed.shape[1] % 32)).unflatten(1, (-1, 32)).long()
    return (bits << torch.arange(32, device=allowed.device)).sum(2).to(torch.int32)


def unpacked_mask(allowed: Tensor, vocabulary: int) -> Tensor:
    """The bool [T, V] of which `packed_mask` made it."""
    bits = allowed.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=allowed.device)
    return bits.bitwise_and(1).flatten(1)[:, :vocabulary] != 0


def token_scores(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    allowed: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> TokenScores:
    """log p(targets), and the entropy of p = softmax(hidden head^T / temperature).

    hidden [T, d], head [V, d] in hidden's dtype or fp32, targets int64 [T] in [0, V). `allowed`, as `packed_mask` makes
    it, holds the tokens that could be sampled (top-p, top-k, a grammar): p is that of these alone, so that others have
    no gradient; a target outside has the log-prob -inf. At least one is allowed. With a `group`, T, d and targets are
    of the whole, V and `allowed` of the rank's own rows.
    """
    check_mask(allowed, hidden.shape[0], head.shape[0])
    if fused(hidden):
        from .fused.losses import TokenLoss

        given = hidden, head, targets, temperature, allowed, group, torch.is_grad_enabled()
        return TokenScores(*TokenLoss.apply(*given))  # pyright: ignore

    def piece(h: Tensor, t: Tensor, *mask: Tensor) -> Tensor:
        logprobs = _log_softmax(h, head, temperature, mask, group)
        entropy = -(logprobs.exp() * logprobs.masked_fill(logprobs.isneginf(), 0.0)).sum(-1)
        return torch.stack([_picked(logprobs, t, group), _sum(entropy, group)], 1)

    mask = () if allowed is None else (allowed,)
    return TokenScores(*_in_pieces(piece, head.shape[0], _shared(hidden, group), targets, *mask).unbind(1))


def token_logprobs(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    allowed: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`token_scores`' log-probs alone."""
    if fused(hidden):
        return token_scores(hidden, head, targets, temperature, allowed=allowed, group=group).logprobs
    check_mask(allowed, hidden.shape[0], head.shape[0])

    def piece(h: Tensor, t: Tensor, *mask: Tensor) -> Tensor:
        return _picked(_log_softmax(h, head, temperature, mask, group), t, group)

    mask = () if allowed is None else (allowed,)
    return _in_pieces(piece, head.shape[0], _shared(hidden, group), targets, *mask)


def chosen_logprobs(
    logits: Tensor, tokens: Tensor, temperature: float | Tensor = 1.0, *, allowed: Tensor | None = None
) -> Tensor:
    """fp32 [B]: log-probs of int64 tokens [B] from logits fp32 [B, V]; on a GPU with the bits of `token_scores`.

    `temperature` of all rows, or of each: float64 [B], as fp32 would not give 1 / temperature a float's last bit.
    """
    check_mask(allowed, *logits.shape)
    if isinstance(temperature, Tensor) and (temperature.dtype != torch.float64 or temperature.shape != tokens.shape):
        got = f"{temperature.dtype} {list(temperature.shape)}"
        raise ValueError(f"temperature: {got}; want a float or torch.float64 {list(tokens.shape)}")
    if fused(logits):
        from .fused import losses

        return losses.chosen_logprobs(logits, tokens, temperature, allowed)
    logits = logits / (temperature.to(logits.dtype)[:, None] if isinstance(temperature, Tensor) else temperature)
    return _picked(torch.log_softmax(logits if allowed is None else _masked(logits, allowed), -1), tokens)


def check_mask(allowed: Tensor | None, rows: int, vocabulary: int) -> None:
    """ValueError for a mask of another shape or dtype."""
    want = [rows, -(-vocabulary // 32)]
    if allowed is not None and (list(allowed.shape) != want or allowed.dtype != torch.int32):
        raise ValueError(f"allowed: {allowed.dtype} {list(allowed.shape)}; want torch.int32 {want}")


def packed_logprobs(
    hidden: Tensor,
    head: Tensor,
    tokens: Tensor,
    cu_seqlens: Tensor,
    *,
    ahead: int = 1,
    temperature: float = 1.0,
    allowed: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """fp32 [T]: each token's log-prob under the state `ahead` tokens before it; 0 for a document's first `ahead`.

    hidden [T, d] of a pack of documents, head [V, d], tokens int64 [T], cu_seqlens [B + 1] (there or on the host). The
    rest as in `token_scores`: row t of `allowed` goes with token t.
    """
    ahead = min(ahead, tokens.shape[0])
    before, after, mask = (
        hidden[: tokens.shape[0] - ahead],
        tokens[ahead:],
        None if allowed is None else allowed[ahead:],
    )
    scores = token_logprobs(before, head, after, temperature, allowed=mask, group=group)
    cu = cu_seqlens.to(tokens.device, torch.int64, non_blocking=True)
    place = torch.arange(tokens.shape[0], device=tokens.device) - torch.repeat_interleave(
        cu[:-1], cu.diff(), output_size=tokens.shape[0]
    )
    return F.pad(scores, (ahead, 0)).masked_fill(place < ahead, 0.0)


def divergence(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_heads: Mapping[int, Tensor],
    teacher: Tensor,
    kind: Kind = "reverse",
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """fp32 [T]: how far each token's distribution p is from its teacher's, q, over the whole vocabulary.

    Student hidden [T, d] and head [V, d] as in `token_scores`. `teacher` int64 [T] says which of `teacher_heads`, each
    [V, d'], goes with the first d' numbers of a token's row of teacher_hidden [T, widest d']. -1 is no teacher, and 0;
    any other number without a head gives NaN. ValueError for a head of another shape. Kinds:

        reverse           KL(p || q) = sum_v p_v (log p_v - log q_v): OPD's (paper 5.1, eq. 29; the prefix is fixed)
        forward           KL(q || p)
        jensen_shannon    (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2

    Gradients go to the student alone. With a `group`, each rank has its rows of all heads.
    """
    for index, other in teacher_heads.items():
        if other.shape[0] != head.shape[0] or other.shape[1] > teacher_hidden.shape[1]:
            want = f"[{head.shape[0]}, up to {teacher_hidden.shape[1]}]"
            raise ValueError(f"teacher {index}: a head of {list(other.shape)}; want {want}")
    if fused(hidden):
        from .fused.losses import Divergence, sorted_by_teacher

        teachers = sorted_by_teacher(teacher_hidden.to(hidden.dtype), teacher_heads, teacher)
        given = hidden, head, teachers, kind, group, torch.is_grad_enabled()
        result: Tensor = Divergence.apply(*given)  # pyright: ignore[reportAssignmentType]
    else:
        result, hidden = upcast(hidden).new_zeros(hidden.shape[0]), _shared(hidden, group)
        for index, teacher_head in teacher_heads.items():
            mine = (teacher == index).nonzero().squeeze(1)
            own = teacher_hidden[mine, : teacher_head.shape[1]]
            result = result.index_add(0, mine, _divergence(hidden[mine], head, own, teacher_head, kind, group))
    unknown = teacher >= 0
    for index in teacher_heads:
        unknown = unknown & (teacher != index)
    return result.masked_fill(unknown, math.nan)


def _divergence(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, kind: Kind,
    group: dist.ProcessGroup | None,
) -> Tensor:  # fmt: skip
    def piece(h: Tensor, h_teacher: Tensor) -> Tensor:
        p = _log_softmax(h, head, group=group)
        with torch.no_grad():
            q = _log_softmax(h_teacher, teacher_head, group=group)
        if kind == "jensen_shannon":
            m = torch.logaddexp(p, q) - math.log(2)
            return _sum((_kl(p, m) + _kl(q, m)) / 2, group)
        return _sum(_kl(p, q) if kind == "reverse" else _kl(q, p), group)

    return _in_pieces(piece, head.shape[0], hidden, teacher_hidden)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def _log_softmax(
    hidden: Tensor, head: Tensor, temperature: float = 1.0, mask: Sequence[Tensor] = (),
    group: dist.ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """Of the rank's part of the vocabulary."""
    x = project(upcast(hidden), upcast(head)) / temperature
    for allowed in mask:
        x = _masked(x, allowed)
    if group is None:
        return torch.log_softmax(x, -1)
    highest = x.detach().amax(-1, keepdim=True)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    x = x - highest
    return x - _shared(_sum(x.exp().sum(-1, keepdim=True), group), group).log()


def _masked(logits: Tensor, allowed: Tensor) -> Tensor:
    return logits.masked_fill(~unpacked_mask(allowed, logits.shape[1]), -math.inf)


def _picked(logprobs: Tensor, tokens: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    if group is None:
        return logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    at = tokens - group.rank() * logprobs.shape[1]
    own = (at >= 0) & (at < logprobs.shape[1])
    return _sum(_picked(logprobs, at.where(own, 0)).where(own, 0.0), group)


class _Sum(torch.autograd.Function):
    """Over ranks, which all take the same of it: the gradient of a rank's part is that of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Shared(torch.autograd.Function):
    """The same on all ranks, each of which makes another part of the result: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def _sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return x if group is None else _Sum.apply(x, group)  # pyright: ignore[reportReturnType]


def _shared(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return x if group is None else _Shared.apply(x, group)  # pyright: ignore[reportReturnType]


def _in_pieces(piece: Callable[..., Tensor], vocabulary: int, *rows: Tensor) -> Tensor:
    """piece(*rows) over slices of the first dimension, recomputed in the backward if there is more than one."""
    size = max(1, _LOGITS_AT_ONCE // vocabulary)
    if rows[0].shape[0] <= size:
        return piece(*rows)
    slices = zip(*(r.split(size) for r in rows), strict=True)
    return torch.cat([checkpoint(piece, *s, use_reentrant=False) for s in slices])  # pyright: ignore
