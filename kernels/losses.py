"""Losses over the vocabulary, from hidden states and a head, in pieces that never hold [T, vocabulary] at once.

Logits are fp32: hidden states and head are upcast. On a GPU they are multiplied in hidden's dtype, to which a head in
fp32 is rounded first, with sums in fp32. There are no sampling masks, as nothing records them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
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


def token_scores(
    hidden: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0, *, keep: bool = False
) -> TokenScores:
    """log p(targets), and the entropy of p = softmax(hidden head^T / temperature).

    hidden [T, d], head [V, d] in hidden's dtype or fp32, targets int64 [T] in [0, V). `keep`, on a GPU, holds logits
    [T, V] in hidden's dtype for the backward, which needs 2 products then, and 3 without.
    """
    if fused(hidden):
        from .fused.losses import TokenLoss

        return TokenScores(*TokenLoss.apply(hidden, head, targets, temperature, keep))  # pyright: ignore

    def piece(h: Tensor, t: Tensor) -> Tensor:
        logprobs = _log_softmax(h, head, temperature)
        return torch.stack([_picked(logprobs, t), -(logprobs.exp() * logprobs).sum(-1)], 1)

    return TokenScores(*_in_pieces(piece, head.shape[0], hidden, targets).unbind(1))


def token_logprobs(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """`token_scores`' log-probs alone."""
    if fused(hidden):
        return token_scores(hidden, head, targets, temperature).logprobs

    def piece(h: Tensor, t: Tensor) -> Tensor:
        return _picked(_log_softmax(h, head, temperature), t)

    return _in_pieces(piece, head.shape[0], hidden, targets)


def chosen_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """fp32 [B]: log-probs of int64 tokens [B] from logits fp32 [B, V]; on a GPU with the bits of `token_scores`."""
    if fused(logits):
        from .fused import losses

        return losses.chosen_logprobs(logits, tokens, temperature)
    return _picked(torch.log_softmax(logits / temperature, -1), tokens)


def packed_logprobs(
    hidden: Tensor, head: Tensor, tokens: Tensor, cu_seqlens: Tensor, *, ahead: int = 1, temperature: float = 1.0
) -> Tensor:
    """fp32 [T]: each token's log-prob under the state `ahead` tokens before it; 0 for a document's first `ahead`.

    hidden [T, d] of a pack of documents, head [V, d], tokens int64 [T], cu_seqlens [B + 1] (there or on the host).
    """
    ahead = min(ahead, tokens.shape[0])
    scores = token_logprobs(hidden[: tokens.shape[0] - ahead], head, tokens[ahead:], temperature)
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
    keep: bool = False,
) -> Tensor:
    """fp32 [T]: how far each token's distribution p is from its teacher's, q, over the whole vocabulary.

    Student hidden [T, d] and head [V, d] as in `token_scores`. `teacher` int64 [T] says which of `teacher_heads`, each
    [V, d'], goes with the first d' numbers of a token's row of teacher_hidden [T, widest d']. -1 is no teacher, and 0;
    any other number without a head gives NaN. ValueError for a head of another shape. Kinds:

        reverse           KL(p || q) = sum_v p_v (log p_v - log q_v): OPD's (paper 5.1, eq. 29; the prefix is fixed)
        forward           KL(q || p)
        jensen_shannon    (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2

    Gradients go to the student alone. `keep` as in `token_scores`, but of student and teacher: 2 products, not 4.
    """
    for index, other in teacher_heads.items():
        if other.shape[0] != head.shape[0] or other.shape[1] > teacher_hidden.shape[1]:
            want = f"[{head.shape[0]}, up to {teacher_hidden.shape[1]}]"
            raise ValueError(f"teacher {index}: a head of {list(other.shape)}; want {want}")
    if fused(hidden):
        from .fused.losses import Divergence, sorted_by_teacher

        teachers = sorted_by_teacher(teacher_hidden.to(hidden.dtype), teacher_heads, teacher)
        result: Tensor = Divergence.apply(hidden, head, teachers, kind, keep)  # pyright: ignore[reportAssignmentType]
    else:
        result = upcast(hidden).new_zeros(hidden.shape[0])
        for index, teacher_head in teacher_heads.items():
            mine = (teacher == index).nonzero().squeeze(1)
            own = teacher_hidden[mine, : teacher_head.shape[1]]
            result = result.index_add(0, mine, _divergence(hidden[mine], head, own, teacher_head, kind))
    unknown = teacher >= 0
    for index in teacher_heads:
        unknown = unknown & (teacher != index)
    return result.masked_fill(unknown, math.nan)


def _divergence(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, kind: Kind) -> Tensor:
    def piece(h: Tensor, h_teacher: Tensor) -> Tensor:
        p = _log_softmax(h, head)
        with torch.no_grad():
            q = _log_softmax(h_teacher, teacher_head)
        if kind == "jensen_shannon":
            m = torch.logaddexp(p, q) - math.log(2)
            return (_kl(p, m) + _kl(q, m)) / 2
        return _kl(p, q) if kind == "reverse" else _kl(q, p)

    return _in_pieces(piece, head.shape[0], hidden, teacher_hidden)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def _log_softmax(hidden: Tensor, head: Tensor, temperature: float = 1.0) -> Tensor:
    return torch.log_softmax(project(upcast(hidden), upcast(head)) / temperature, -1)


def _picked(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)


def _in_pieces(piece: Callable[..., Tensor], vocabulary: int, *rows: Tensor) -> Tensor:
    """piece(*rows) over slices of the first dimension, recomputed in the backward if there is more than one."""
    size = max(1, _LOGITS_AT_ONCE // vocabulary)
    if rows[0].shape[0] <= size:
        return piece(*rows)
    slices = zip(*(r.split(size) for r in rows), strict=True)
    return torch.cat([checkpoint(piece, *s, use_reentrant=False) for s in slices])  # pyright: ignore
