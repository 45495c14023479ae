"""Losses over the vocabulary, from hidden states and a head, in pieces that never hold [T, vocabulary] at once."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .project import project
from .upcast import upcast

_LOGITS_AT_ONCE = 1 << 22  # elements of one piece of logits (16 MiB in fp32)


def token_logprobs(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(targets) [T] fp32 under softmax(hidden head^T / temperature); hidden [T, d], head [V, d], targets [T]."""

    def piece(h: Tensor, t: Tensor) -> Tensor:
        logits = project(upcast(h), upcast(head)) / temperature
        return torch.log_softmax(logits, -1).gather(1, t.unsqueeze(1)).squeeze(1)

    return _in_pieces(piece, head.shape[0], hidden, targets)


def packed_logprobs(
    hidden: Tensor, head: Tensor, tokens: Tensor, cu_seqlens: Tensor, *, ahead: int = 1, temperature: float = 1.0
) -> Tensor:
    """fp32 [T]: each token's log-prob under the state `ahead` tokens before it; 0 for a document's first `ahead`.

    hidden [T, d] of a pack of documents, head [V, d], tokens int64 [T], cu_seqlens [B + 1].
    """
    ahead = min(ahead, tokens.shape[0])
    scores = token_logprobs(hidden[: tokens.shape[0] - ahead], head, tokens[ahead:], temperature)
    cu = cu_seqlens.long()
    place = torch.arange(tokens.shape[0], device=tokens.device) - torch.repeat_interleave(cu[:-1], cu.diff())
    return F.pad(scores, (ahead, 0)).masked_fill(place < ahead, 0.0)


def reverse_kl(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """KL(student || teacher) [T] fp32 over the whole vocabulary: sum_v p_v (log p_v - log q_v).

    Student hidden [T, d] and head [V, d], teacher hidden [T, d'] and head [V, d'] (other width allowed). Gradients go
    to the student alone (paper 5.1, eq. 29; the sampled prefix is fixed).
    """

    def piece(h: Tensor, h_teacher: Tensor) -> Tensor:
        student = torch.log_softmax(project(upcast(h), upcast(head)), -1)
        with torch.no_grad():
            teacher = torch.log_softmax(project(upcast(h_teacher), upcast(teacher_head)), -1)
        return (student.exp() * (student - teacher)).sum(-1)

    return _in_pieces(piece, head.shape[0], hidden, teacher_hidden)


def _in_pieces(piece: Callable[..., Tensor], vocabulary: int, *rows: Tensor) -> Tensor:
    """piece(*rows) over slices of the first dimension, recomputed in the backward if there is more than one."""
    size = max(1, _LOGITS_AT_ONCE // vocabulary)
    if rows[0].shape[0] <= size:
        return piece(*rows)
    slices = zip(*(r.split(size) for r in rows), strict=True)
    return torch.cat([checkpoint(piece, *s, use_reentrant=False) for s in slices])  # pyright: ignore
