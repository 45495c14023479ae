"""Losses over the vocabulary on one GPU: time and memory against a floor, beside others; and errors against float64.

    python benchmarks/losses.py [--tokens 4096]

Forward and backward in bf16 at V4-Flash's hidden size and vocabulary: 4096, 129,280. Needs what attention.py needs;
Liger and cut-cross-entropy run where liger_kernel and cut_cross_entropy are installed. The floor is that of products at
the rate of a large one in bf16, measured in the same run: 4 for a token's log-prob, 6 for a divergence (Jensen-Shannon
8), or 3 and 4 where logits are kept for the backward. Memory is the most that is held at once beyond inputs and
gradients. Exit code 1 if a goal was missed, or a value or gradient is more than 1e-2 off.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import gpu
import torch
import torch.nn.functional as F
from attention_floors import Ceilings, product
from results import print_table, write_result
from torch import Tensor

from amalgam.kernels import losses
from amalgam.kernels.dispatch import VARIABLE

FEW = 64  # tokens of what float64 computes too
BOUND = 1e-2


@dataclass(frozen=True)
class Setting:
    ceilings: Ceilings
    tokens: int = 4096
    hidden: int = 4096
    vocabulary: int = 129_280
    device: str = "cuda"

    def random(self, *shape: int) -> Tensor:
        """A product over `hidden` of two, with one of them divided by its root, has a spread of 2."""
        return (torch.randn(*shape, device=self.device) * 2**0.5).bfloat16()


class Case(NamedTuple):
    name: str
    run: Callable[..., Tensor]  # (hidden, head) -> fp32 [T], or a sum
    products: int
    goal: tuple[float, float] | None = None  # ms and GiB


def inputs(setting: Setting, tokens: int) -> tuple[Tensor, Tensor]:
    hidden, head = setting.random(tokens, setting.hidden), setting.random(setting.vocabulary, setting.hidden)
    return hidden.requires_grad_(), (head / setting.hidden**0.5).requires_grad_()


def cases(setting: Setting, tokens: int) -> Iterator[Case]:
    targets = torch.randint(setting.vocabulary, (tokens,), device=setting.device)
    teacher_hidden = setting.random(tokens, setting.hidden)
    heads = [setting.random(setting.vocabulary, setting.hidden) / setting.hidden**0.5 for _ in range(4)]
    teacher = torch.randint(4, (tokens,), device=setting.device)

    def divergence(kind: losses.Kind, teachers: int, keep: bool = False) -> Callable[..., Tensor]:
        given = dict(enumerate(heads[:teachers])), teacher % teachers, kind
        return lambda h, w: losses.divergence(h, w, teacher_hidden, *given, keep=keep)

    def torch_kl(h: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            q = torch.log_softmax(F.linear(teacher_hidden, heads[0]).float(), -1)
        p = torch.log_softmax(F.linear(h, w).float(), -1)
        return (p.exp() * (p - q)).sum(-1)

    yield Case("log-prob", lambda h, w: losses.token_logprobs(h, w, targets), 4, (25.0, 0.3))
    yield Case("log-prob, kept", lambda h, w: losses.token_scores(h, w, targets, keep=True).logprobs, 3, (21.0, 1.3))
    yield Case("log-prob + entropy", lambda h, w: sum(losses.token_scores(h, w, targets)), 4)  # pyright: ignore
    yield Case("torch: cross-entropy", lambda h, w: F.cross_entropy(F.linear(h, w), targets, reduction="none"), 4)
    if find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
            liger_fused_linear_cross_entropy,
        )

        yield Case("Liger: cross-entropy", lambda h, w: liger_fused_linear_cross_entropy(h, w, targets), 4)
    if find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

        yield Case("CCE: cross-entropy", lambda h, w: linear_cross_entropy(h, w, targets, reduction="none"), 4)
    yield Case("reverse KL, 1 teacher", divergence("reverse", 1), 6, (33.0, 0.5))
    yield Case("reverse KL, 4 teachers", divergence("reverse", 4), 6)
    yield Case("reverse KL, 1 teacher, kept", divergence("reverse", 1, True), 4)
    yield Case("forward KL, 1 teacher", divergence("forward", 1), 6)
    yield Case("Jensen-Shannon, 1 teacher", divergence("jensen_shannon", 1), 8)
    yield Case("torch: reverse KL", torch_kl, 6)


def gradients(case: Case, hidden: Tensor, head: Tensor) -> tuple[Tensor, ...]:
    """Under a gradient of 1 / T of each value, as of a mean."""
    out = case.run(hidden, head)
    return torch.autograd.grad(out, [hidden, head], torch.full_like(out, 1 / hidden.shape[0]))


def measured(setting: Setting) -> Iterator[dict[str, Any]]:
    hidden, head = inputs(setting, setting.tokens)
    one = product(setting.tokens, setting.hidden, setting.vocabulary).floor(setting.ceilings)
    for case in cases(setting, setting.tokens):

        def run(case: Case = case) -> object:
            return gradients(case, hidden, head)

        ms = gpu.milliseconds(run)
        gib = (gpu.extra_bytes(run) - hidden.nbytes - head.nbytes) / 2**30
        with torch.no_grad():
            forward = gpu.milliseconds(lambda case=case: case.run(hidden, head))
        row = {"name": case.name, "tokens": setting.tokens, "ms": ms, "forward_ms": forward, "extra_gib": gib}
        row |= {"floor_ms": case.products * one, "ratio": ms / case.products / one}
        if case.goal is not None:
            row |= {"goal_ms": case.goal[0], "goal_gib": case.goal[1]}
            row["met"] = ms <= case.goal[0] and gib <= case.goal[1]
        yield row


def errors(setting: Setting) -> Iterator[dict[str, Any]]:
    """Of values and gradients: the largest difference from the definition in float64, over the largest magnitude."""
    hidden, head = inputs(setting, FEW)
    for case in cases(setting, FEW):
        if ":" in case.name:
            continue
        found = case.run(hidden, head), *gradients(case, hidden, head)
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = "reference"
        wide = [x.detach().double().requires_grad_() for x in (hidden, head)]
        expected = case.run(*wide), *gradients(case, *wide)
        os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})
        off = [
            float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in zip(found, expected, strict=True)
        ]
        names = ("value", "hidden", "head")
        yield {"name": case.name, "errors": dict(zip(names, off, strict=True)), "met": max(off) <= BOUND}


def show(rows: list[dict[str, Any]]) -> None:
    def cell(value: Any) -> str:
        return f"{value:.1e}" if isinstance(value, float) and abs(value) < 0.01 else f"{value:.2f}"

    def goal(row: dict[str, Any]) -> str:
        if "met" not in row:
            return "-"
        return f"{row['goal_ms']:g} ms, {row['goal_gib']:g} GiB: {'met' if row['met'] else 'MISSED'}"

    columns = {"ms": "ms", "forward": "forward_ms", "floor": "floor_ms", "x floor": "ratio", "GiB": "extra_gib"}
    timed = [row for row in rows if "ms" in row]
    print_table(
        ["", *columns, "goal"],
        [[row["name"], *(cell(row[key]) for key in columns.values()), goal(row)] for row in timed],
    )
    print_table(
        ["error of", "value", "hidden", "head"],
        [[row["name"], *(cell(each) for each in row["errors"].values())] for row in rows if "errors" in row],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    if os.environ.get(VARIABLE):
        parser.error(f"{VARIABLE} is set: the kernels that a GPU runs by itself are measured")
    machine, setting = gpu.where(), Setting(gpu.ceilings(), options.tokens)
    rows = [*measured(setting), *errors(setting)]
    show(rows)
    times = {row["name"]: row["ms"] for row in rows if "ms" in row}
    several = times["reverse KL, 4 teachers"] / times["reverse KL, 1 teacher"]
    print(f"four teachers: {several:.3f} times the time of one (goal 1.15)")
    result = {"ceilings": asdict(setting.ceilings), "four_over_one": several, "rows": rows}
    print(f"wrote {write_result('losses', {'machine': machine, **result})}")
    return int(several > 1.15 or not all(row.get("met", True) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
