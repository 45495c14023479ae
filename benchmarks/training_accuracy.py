"""How far the operations of a training step are from float64, values and gradients; training.py is the command.

As attention_accuracy.py: the largest difference over the largest magnitude, inputs new in every run, and memory full of
NaN. Attention, norms, RoPE and products with a weight are there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import training_losses
import training_oracles as oracles
from beside_float64 import BOUND, alone, by_autograd, compare, poisoned, row, rows, told
from parts import Rows
from torch import Tensor
from training_kernels import random_routes, site, site_inputs, sites
from training_setting import Experts, Setting

from amalgam.kernels import losses as op
from amalgam.kernels.moe import experts, route
from amalgam.kernels.muon import STEPS, muon_step, newton_schulz
from amalgam.kernels.project import project_wide

NEAR = 1e-5  # affinities that differ by less may be chosen for each other
CLAMPED = 1.0  # a limit that many numbers reach
SPREAD = 0.01  # bound of bf16's singular values


@dataclass(frozen=True)
class Sizes:
    tokens: tuple[int, ...] = (1, 300)
    routed: tuple[Experts, ...] = (
        Experts("E16 H4096 I2048 K6", 16, 4096, 2048, 6),
        Experts("E128 H512 I128 K8", 128, 512, 128, 8),
    )
    small: Experts = Experts("E8 H64 I32 K2", 8, 64, 32, 2)
    vocabulary: int = 64  # tokens
    matrix: tuple[int, int, int] = (3, 256, 384)


SIZES = Sizes()


def accuracy(setting: Setting) -> Rows:
    """Each operation's errors, a row a shape and dtype."""
    seed = torch.seed()
    for part in (router, mixture, hyper, losses, muon):
        for found in part(setting):
            yield found | {"seed": seed}


def router(setting: Setting) -> Rows:
    """Weights with their gradients, and how many tokens choose wrongly."""
    config = setting.flash
    d, count, topk = config.hidden_size, config.n_routed_experts, config.num_experts_per_tok
    scaling = config.routed_scaling_factor
    for dtype in BOUND:
        for tokens in SIZES.tokens:
            given = {"x": setting.random(tokens, d, dtype=dtype), "gate": setting.weight(count, d, dtype=dtype)}
            bias = 0.1 * setting.random(count, dtype=torch.float32)
            with poisoned():
                ids = route(project_wide(*given.values()), topk=topk, scaling=scaling, bias=bias)[0]

            def weights(x: Tensor, gate: Tensor, bias: Tensor = bias) -> Tensor:
                return route(project_wide(x, gate), topk=topk, scaling=scaling, bias=bias)[1]

            errors = compare(given, partial(by_autograd, weights), partial(oracles.route, ids, scaling), torch.float32)
            name = f"router, {count} x {d}"
            yield from rows(name, tokens, dtype, errors, exact=["value"])
            scores = oracles.affinities(given["x"].double(), given["gate"].double()) + bias.double()
            wrong = {"value": wrong_choices(ids, scores)}
            yield row(f"{name}, {told(dtype)}, tokens that choose wrongly", tokens, wrong, 0)


def wrong_choices(ids: Tensor, scores: Tensor) -> int:
    """How many rows of ids [T, k] repeat one, or leave out one of scores [T, E] higher by more than NEAR."""
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, True)
    lowest = scores.masked_fill(~chosen, float("inf")).amin(1)
    highest = scores.masked_fill(chosen, -float("inf")).amax(1)
    return int(((chosen.sum(1) != ids.shape[1]) | (lowest < highest - NEAR)).sum())


def routes(setting: Setting, shape: Experts, tokens: int) -> Iterator[tuple[str, Tensor]]:
    """Ids at random, so that some experts may have none; all to one expert."""
    ids = random_routes(setting, shape, tokens)[0]
    yield "", ids
    yield ", all to the same", torch.arange(shape.topk, device=ids.device).expand_as(ids).contiguous()


def mixture(setting: Setting) -> Rows:
    """The experts. In bf16 nothing reaches the clamp, where rounding decides whether there is a gradient."""
    cases = [(shape, torch.bfloat16, setting.flash.swiglu_limit) for shape in SIZES.routed]
    cases += [(SIZES.small, torch.float32, CLAMPED)]
    for shape, dtype, limit in cases:
        for tokens in SIZES.tokens:
            for where, ids in routes(setting, shape, tokens):
                given = {
                    "x": setting.random(tokens, shape.hidden, dtype=dtype),
                    "weights": torch.rand(ids.shape, device=setting.device),
                    "gate_up": setting.weight(shape.experts, 2 * shape.inner, shape.hidden, dtype=dtype),
                    "down": setting.weight(shape.experts, shape.hidden, shape.inner, dtype=dtype),
                }

                def ours(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, ids=ids, limit=limit) -> Tensor:
                    return experts(x, ids, weights, gate_up, down, limit)

                errors = compare(given, partial(by_autograd, ours), partial(oracles.experts, ids, limit), torch.float32)
                yield from rows(f"experts, {shape.name}{where}", tokens, dtype, errors)


def hyper(setting: Setting) -> Rows:
    """All results of a site as one value; base and scale as one input, as a sum over tokens alone may cancel."""
    config = setting.flash
    settings = config.hc_sinkhorn_iters, config.rms_norm_eps, config.hc_eps
    for name, count in sites(setting):
        for dtype in BOUND:
            for tokens in SIZES.tokens:
                given = site_inputs(setting, tokens, count, dtype)
                given["gates"] = torch.cat([given.pop("base"), given.pop("scale")])

                def ours(gates: Tensor, weight: Tensor, count: int = count, **given: Tensor) -> Tensor:
                    return oracles.joined(site(setting, *given.values(), gates[:count], gates[count:], weight))

                def oracle(gates: Tensor, weight: Tensor, count: int = count, dtype=dtype, **given: Tensor) -> Tensor:
                    values = *given.values(), gates[:count], gates[count:], weight
                    return oracles.joined(oracles.site(*settings, dtype, *values))  # pyright: ignore[reportCallIssue]

                errors = compare(given, partial(by_autograd, ours), oracle, torch.float32)
                yield from rows(f"hyper-connections: {name}", tokens, dtype, errors)


def losses(setting: Setting) -> Rows:
    """Of hidden states and head; four teachers, each in turn."""
    tokens = SIZES.vocabulary
    for dtype in BOUND:
        hidden, head = (each.detach() for each in training_losses.inputs(setting, tokens, dtype))
        given = {"hidden": hidden, "head": head}
        targets = training_losses.targets(setting, tokens)
        teacher = torch.arange(tokens, device=setting.device) % 4
        teacher_hidden = training_losses.inputs(setting, tokens, dtype)[0].detach()
        heads = {i: training_losses.inputs(setting, 1, dtype)[1].detach() for i in range(4)}
        wide = teacher_hidden.double(), {i: each.double() for i, each in heads.items()}, teacher
        scores = partial(op.token_scores, targets=targets)
        cases = {
            "log-prob": (lambda scores=scores, **g: scores(**g).logprobs, partial(oracles.logprobs, targets)),
            "entropy": (lambda scores=scores, **g: scores(**g).entropy, oracles.entropy),
        }
        for kind in ("reverse", "forward", "jensen_shannon"):

            def ours(hidden: Tensor, head: Tensor, kind: op.Kind = kind) -> Tensor:
                return op.divergence(hidden, head, teacher_hidden, heads, teacher, kind)  # noqa: B023

            cases[f"divergence, {kind}, 4 teachers"] = ours, partial(oracles.divergence, kind, *wide)
        for name, (function, oracle) in cases.items():
            errors = compare(given, partial(by_autograd, function), oracle, torch.float32)
            yield from rows(name, tokens, dtype, errors)


@torch.no_grad()
def muon(setting: Setting) -> Rows:
    """Newton-Schulz and a step in fp32; bf16's singular values beside float64's."""
    count, n, m = SIZES.matrix
    for shape in ((count, n, m), (count, m, n)):
        x = {"x": setting.random(*shape, dtype=torch.float32)}
        ours, oracle = partial(newton_schulz, dtype=torch.float32), partial(oracles.newton_schulz, STEPS)
        errors = compare(x, partial(alone, ours), oracle, torch.float32, gradients=False)
        yield from rows(f"Newton-Schulz, {shape[1]} x {shape[2]}", count, torch.float32, errors)
        found, expected = newton_schulz(x["x"]), oracle(x["x"].double())
        off = {"value": float((torch.linalg.svdvals(found.double()) - torch.linalg.svdvals(expected)).abs().max())}
        yield row(f"Newton-Schulz, {shape[1]} x {shape[2]}, bf16's singular values", count, off, SPREAD)
        given = [{"x": x["x"]}, {"x": setting.random(*shape, dtype=torch.float32)}]
        errors = compare({"weight": given[0]["x"], "grad": given[1]["x"]}, partial(alone, stepped), stepped_plainly,
                         torch.float32, gradients=False)  # fmt: skip
        yield from rows(f"Muon's first two steps, {shape[1]} x {shape[2]}", count, torch.float32, errors)


def stepped(weight: Tensor, grad: Tensor) -> Tensor:
    """The weight after two steps of a learning rate that shows."""
    weight, momentum, (count, n, m) = weight.clone(), torch.zeros_like(weight), weight.shape
    for _ in range(2):
        norm, lists = torch.linalg.vector_norm(grad), ([weight], [grad], [momentum], [None])
        muon_step(*lists, norm, runs=[[(count, n, m)]], lr=0.1, clip=1e30, dtype=torch.float32)
    return weight


def stepped_plainly(weight: Tensor, grad: Tensor) -> Tensor:
    """Momentum 0.95 with Nesterov, decay 0.1, 0.18 sqrt(max(n, m)) of the orthogonalized."""
    momentum = torch.zeros_like(weight)
    for _ in range(2):
        momentum = 0.95 * momentum + grad
        update = oracles.newton_schulz(STEPS, grad + 0.95 * momentum)
        weight = weight * (1 - 0.1 * 0.1) - 0.1 * 0.18 * max(weight.shape[-2:]) ** 0.5 * update
    return weight
