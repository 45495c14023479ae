"""Time and memory of losses over the vocabulary, beside others'; training.py is the command.

Memory is the most that is held at once beyond inputs and gradients; that of the head's gradient, in which logits wait
for the backward, counts as the gradient's. The floor is that of products at the rate of a large one: 3 for a token's
log-prob, 5 for a divergence (Jensen-Shannon 7).
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import NamedTuple

import gpu
import torch
import torch.nn.functional as F
from floors import product, row
from parts import Row, Rows
from torch import Tensor
from training_setting import Setting

from amalgam.kernels import losses as op

SEVERAL = 1.15  # goal: four teachers take at most so many times what one takes


class Case(NamedTuple):
    name: str
    run: Callable[..., Tensor]  # (hidden, head) -> fp32 [T], or a sum
    products: int
    goal: tuple[float, float] | None = None  # ms and GiB


def inputs(setting: Setting, tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """hidden [T, d] and head [V, d]; logits have a spread of 2."""
    d = setting.flash.hidden_size
    hidden, head = setting.random(tokens, d, dtype=dtype), setting.weight(setting.flash.vocab_size, d, dtype=dtype)
    return (hidden * 2**0.5).requires_grad_(), (head * 2**0.5).requires_grad_()


def targets(setting: Setting, tokens: int) -> Tensor:
    return torch.randint(setting.flash.vocab_size, (tokens,), device=setting.device)


def cases(setting: Setting, tokens: int) -> Iterator[Case]:
    own, drawn = targets(setting, tokens), torch.randint(4, (tokens,), device=setting.device)
    teacher_hidden = inputs(setting, tokens)[0].detach()
    heads = [inputs(setting, 1)[1].detach() for _ in range(4)]

    def divergence(kind: op.Kind, teachers: int) -> Callable[..., Tensor]:
        given = dict(enumerate(heads[:teachers])), drawn % teachers, kind
        return lambda h, w: op.divergence(h, w, teacher_hidden, *given)

    def torch_kl(h: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            q = torch.log_softmax(F.linear(teacher_hidden, heads[0]).float(), -1)
        p = torch.log_softmax(F.linear(h, w).float(), -1)
        return (p.exp() * (p - q)).sum(-1)

    yield Case("log-prob", lambda h, w: op.token_logprobs(h, w, own), 3, (21.0, 0.3))
    yield Case("log-prob + entropy", lambda h, w: torch.stack(op.token_scores(h, w, own)).sum(0), 3)
    yield Case("torch: cross-entropy", lambda h, w: F.cross_entropy(F.linear(h, w), own, reduction="none"), 3)
    if find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
            liger_fused_linear_cross_entropy,
        )

        yield Case("Liger: cross-entropy", lambda h, w: liger_fused_linear_cross_entropy(h, w, own), 3)
    if find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

        yield Case("CCE: cross-entropy", lambda h, w: linear_cross_entropy(h, w, own, reduction="none"), 4)
    yield Case("reverse KL, 1 teacher", divergence("reverse", 1), 5, (33.0, 0.5))
    yield Case("reverse KL, 4 teachers", divergence("reverse", 4), 5)
    yield Case("forward KL, 1 teacher", divergence("forward", 1), 5)
    yield Case("Jensen-Shannon, 1 teacher", divergence("jensen_shannon", 1), 7)
    yield Case("torch: reverse KL", torch_kl, 4)


def gradients(case: Case, hidden: Tensor, head: Tensor) -> tuple[Tensor, ...]:
    """Under a gradient of 1 / T of each value, as of a mean."""
    out = case.run(hidden, head)
    return torch.autograd.grad(out, [hidden, head], torch.full_like(out, 1 / hidden.shape[0]))


def losses(setting: Setting) -> Rows:
    """Forward and backward of each; `forward_ms` of the forward alone, without what a backward would need."""
    tokens, one = setting.losses, None
    hidden, head = inputs(setting, tokens)
    work = product(tokens, setting.flash.hidden_size, setting.flash.vocab_size)
    for case in cases(setting, tokens):
        more: Row = {}
        found = gpu.measured(lambda case=case: gradients(case, hidden, head))
        if found is None:
            yield {"name": case.name, "tokens": tokens, "failed": "out of memory"}
            continue
        ms, gib = found[0], (found[1] - hidden.nbytes - head.nbytes) / 2**30
        with torch.no_grad():
            forward = gpu.milliseconds(lambda case=case: case.run(hidden, head))
        if case.goal is not None:
            more = {
                "goal": f"{case.goal[0]:g} ms, {case.goal[1]:g} GiB",
                "met": ms <= case.goal[0] and gib <= case.goal[1],
            }
        if case.name == "reverse KL, 1 teacher":
            one = ms
        elif case.name == "reverse KL, 4 teachers" and one is not None:
            more = {"over_one": ms / one, "goal": f"{SEVERAL} x one teacher", "met": ms <= SEVERAL * one}
        works = [work] * case.products
        yield row(case.name, tokens, ms, works, setting.ceilings, gbs=None, forward_ms=forward, extra_gib=gib) | more
