"""Manifold-constrained hyper-connections: the residual as `n` streams, mixed by a doubly stochastic matrix.

What a sublayer gives waits as an `Update` until the streams are next read: then one operation adds it, mixes the
streams, collapses them and norms what the next sublayer gets.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import fused
from .norm import rms_norm
from .project import LANES, few, filled
from .upcast import upcast


class Update(NamedTuple):
    """What a sublayer adds to the streams: its output [T, d], and how, post [n, T] and comb [n, n, T] in fp32."""

    output: Tensor
    post: Tensor
    comb: Tensor


def counters(streams: Tensor, sites: int) -> Sequence[Tensor | None]:
    """What so many sites count in: zeros that spare each a launch, where tokens are few (streams [T, n, d])."""
    if not few(streams):
        return [None] * sites
    from .fused.hyper import count_size

    size = -(-count_size(streams.shape[0]) // 4) * 4  # as aligned as a tensor of its own
    return streams.new_zeros(sites, size, dtype=torch.int32).unbind()


def enter(
    streams: Tensor, update: Update | None, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor, *,
    iterations: int, norm_eps: float, eps: float, counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The streams [T, n, d] with `update`; a sublayer's input [T, d], normed by weight [d]; its post and comb.

    `expand`, `mixing`, `collapse` and `rms_norm` one after another; fn, base and scale as `mixing` takes them. `counts`
    are a row of what `counters` gives, here and in `leave`.
    """
    if fused(streams):
        from .fused.hyper import Site

        options = iterations, norm_eps, eps, counts
        new, x, post, comb = Site.apply(streams, *(update or [None] * 3), fn, base, scale, weight, *options)  # pyright: ignore
        return streams if new is None else new, x, post, comb
    streams = streams if update is None else expand(streams, *update)
    pre, post, comb = mixing(streams, fn, base, scale, iterations=iterations, norm_eps=norm_eps, eps=eps)
    return streams, rms_norm(collapse(streams, pre), weight, norm_eps), post, comb


def leave(
    streams: Tensor, update: Update | None, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor, *,
    norm_eps: float, eps: float, counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The streams with `update`, and the hidden states [T, d] that they collapse to after the last, normed.

    `expand`, `head_mixing`, `collapse` and `rms_norm`; fn, base and scale as `head_mixing` takes them.
    """
    if fused(streams):
        from .fused.hyper import Site

        options = 0, norm_eps, eps, counts
        new, x, _, _ = Site.apply(streams, *(update or [None] * 3), fn, base, scale, weight, *options)  # pyright: ignore
        return streams if new is None else new, x
    streams = streams if update is None else expand(streams, *update)
    pre = head_mixing(streams, fn, base, scale, norm_eps=norm_eps, eps=eps)
    return streams, rms_norm(collapse(streams, pre), weight, norm_eps)


def mixing(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, iterations: int, norm_eps: float, eps: float):
    """pre [n, T], post [n, T], comb [n, n, T] of one site, fp32, from streams [T, n, d] (paper 2.2, eq. 8).

    fn [(2 + n) n, n d], base [(2 + n) n], scale [3]. The softmax counts as the first row pass of Sinkhorn-Knopp;
    `iterations` - 1 rounds of row and column passes follow the first column pass, each with `eps` in its divisor, as in
    DeepSeek's code. Tokens are the last dimension here: sums over four numbers are then vector additions.
    """
    tokens, n, _ = streams.shape
    logits = _projected(streams, fn, norm_eps)
    pre, post, comb = logits.split([n, n, n * n])
    bias_pre, bias_post, bias_comb = upcast(base).unsqueeze(-1).split([n, n, n * n])
    gate_pre, gate_post, gate_comb = upcast(scale).unbind()
    pre = torch.sigmoid(pre * gate_pre + bias_pre) + eps
    post = 2 * torch.sigmoid(post * gate_post + bias_post)
    comb = torch.softmax((comb * gate_comb + bias_comb).view(n, n, -1), dim=1) + eps
    comb = comb / (comb.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        comb = comb / (comb.sum(0, keepdim=True) + eps)
    return pre[:, :tokens], post[:, :tokens], comb[:, :, :tokens]


def head_mixing(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, norm_eps: float, eps: float) -> Tensor:
    """pre [n, T] of the final collapse (no Sinkhorn): fn [n, n d], base [n], scale [1]."""
    logits = _projected(streams, fn, norm_eps)
    return torch.sigmoid(logits * upcast(scale) + upcast(base).unsqueeze(-1))[:, : streams.shape[0]] + eps


def collapse(streams: Tensor, pre: Tensor) -> Tensor:
    """sum_j pre[j] * streams[:, j]: [T, n, d], [n, T] -> [T, d] in streams' dtype."""
    return torch.bmm(pre.t().contiguous().unsqueeze(1), upcast(streams)).squeeze(1).to(streams.dtype)


def expand(streams: Tensor, output: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """New streams k: post[k] * output + sum_j comb[j, k] * streams[:, j]; comb enters transposed. [T, n, d].

    One small product a token over its n streams and the sublayer's output as a fifth.
    """
    weights = torch.cat([comb, post.unsqueeze(0)]).permute(2, 1, 0).contiguous()
    rows = upcast(torch.cat([streams, output.unsqueeze(1)], dim=1))
    return torch.bmm(weights, rows).to(streams.dtype)


def _projected(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """fn times the RMS-normalized, flattened streams: [rows of fn, T up to a multiple of LANES], fp32, the rest zeros.

    The norm is applied after the product.
    """
    flat = upcast(streams).flatten(1)
    rms = torch.rsqrt(flat.square().mean(1) + norm_eps)
    logits = torch.mm(upcast(fn), filled(flat, LANES).t())[:, : flat.shape[0]] * rms
    return F.pad(logits, (0, -flat.shape[0] % LANES))
