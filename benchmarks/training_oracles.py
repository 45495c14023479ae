"""What training_accuracy.py holds the kernels to: the same operations written plainly, for float64 and autograd.

Nothing here is the package's arithmetic. Shapes: T tokens, d channels, E experts, k slots of a token, n streams.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def affinities(x: Tensor, gate: Tensor) -> Tensor:
    """[T, E]."""
    return F.softplus(x @ gate.t()).sqrt()


def route(ids: Tensor, scaling: float, x: Tensor, gate: Tensor) -> Tensor:
    """The weights [T, k] of `ids`."""
    chosen = affinities(x, gate).gather(1, ids)
    return chosen / chosen.sum(1, keepdim=True) * scaling


def experts(ids: Tensor, limit: float, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[expert].t()).chunk(2, 1)
        hidden = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) * weights[token, slot].unsqueeze(1)
        out = out.index_add(0, token, hidden @ down[expert].t())
    return out


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Results of any shapes as one, in fp32 or wider."""
    return torch.cat([each.to(torch.promote_types(each.dtype, torch.float32)).flatten() for each in parts])


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as memory holds it; its gradient is what it would be without."""
    return x + (x.to(dtype).to(x.dtype) - x).detach()


def site(
    iterations: int, norm_eps: float, eps: float, dtype: torch.dtype, streams: Tensor, output: Tensor, post: Tensor,
    comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor,
) -> list[Tensor]:  # fmt: skip
    """`hyper.enter`'s four results, or `hyper.leave`'s two for an fn of n rows; the streams are stored in `dtype`."""
    n = streams.shape[1]
    streams = torch.einsum("kt,td->tkd", post, output) + torch.einsum("jkt,tjd->tkd", comb, streams)
    streams = stored(streams, dtype)
    flat = streams.flatten(1)
    logits = (flat @ fn.t()) / (flat.square().mean(1, keepdim=True) + norm_eps).sqrt()
    pre = torch.sigmoid(logits[:, :n] * scale[0] + base[:n]) + eps
    x = torch.einsum("tj,tjd->td", pre, streams)
    x = x / (x.square().mean(1, keepdim=True) + norm_eps).sqrt() * weight
    if len(fn) == n:
        return [streams, x]
    new_post = 2 * torch.sigmoid(logits[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    mix = torch.softmax((logits[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(1, (n, n)), 2) + eps
    mix = mix / (mix.sum(1, keepdim=True) + eps)
    for _ in range(iterations - 1):
        mix = mix / (mix.sum(2, keepdim=True) + eps)
        mix = mix / (mix.sum(1, keepdim=True) + eps)
    return [streams, x, new_post.t(), mix.permute(1, 2, 0)]


def logprobs(targets: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
    return torch.log_softmax(hidden @ head.t(), 1).gather(1, targets.unsqueeze(1)).squeeze(1)


def entropy(hidden: Tensor, head: Tensor) -> Tensor:
    scores = torch.log_softmax(hidden @ head.t(), 1)
    return -(scores.exp() * scores).sum(1)


def divergence(
    kind: str, teacher_hidden: Tensor, heads: dict[int, Tensor], teacher: Tensor, hidden: Tensor, head: Tensor
) -> Tensor:
    p = torch.log_softmax(hidden @ head.t(), 1)
    of_each = torch.stack([torch.log_softmax(teacher_hidden @ other.t(), 1) for other in heads.values()])
    q = of_each[teacher, torch.arange(len(teacher), device=teacher.device)]
    m = torch.logsumexp(torch.stack([p, q]), 0) - math.log(2)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(1)

    return {"reverse": kl(p, q), "forward": kl(q, p), "jensen_shannon": (kl(p, m) + kl(q, m)) / 2}[kind]


def newton_schulz(steps: Sequence[tuple[float, float, float]], x: Tensor) -> Tensor:
    """By singular values: each step is an odd polynomial of them."""
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    for a, b, c in steps:
        values = a * values + b * values**3 + c * values**5
    return left * values.unsqueeze(-2) @ right
