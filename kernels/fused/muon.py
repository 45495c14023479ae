"""Triton kernels of Muon over lists of tensors: what is orthogonalized from gradient and momentum, and the step by it.

Each takes 12 bytes a parameter where gradient, weight and what is orthogonalized are bf16.
"""

from collections.abc import Sequence
from itertools import repeat

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..muon import GAIN, Run, newton_schulz, split, stacks
from .lists import BLOCK, WARPS, by_type, clipping, part, place


@triton.jit
def _ahead(
    table, blocks, norm, clip, momentum,
    GRADIENT: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row, block, there = place(table, blocks, 4, BLOCK, ALIGNED)
    factor, finite = clipping(norm, clip)
    there = there & finite
    at_m = part(row, 0, block, tl.float32, BLOCK, ALIGNED)
    g = tl.load(part(row, 1, block, GRADIENT, BLOCK, ALIGNED), mask=there, other=0.0).to(tl.float32) * factor
    m = tl.load(at_m, mask=there, other=0.0) * momentum + g
    tl.store(at_m, m, mask=there)
    tl.store(part(row, 2, block, OUT, BLOCK, ALIGNED), g + momentum * m, mask=there)


@triton.jit
def _apply(
    table, blocks, norm, kept, rate,
    UPDATE: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """`rate` is multiplied with the root of the matrix's longer side, which the row tells."""
    row, block, there = place(table, blocks, 5, BLOCK, ALIGNED)
    _, finite = clipping(norm, 1.0)
    there = there & finite
    at_p = part(row, 0, block, tl.float32, BLOCK, ALIGNED)
    rate *= tl.sqrt_rn(tl.load(row + 3).to(tl.float32))
    update = tl.load(part(row, 1, block, UPDATE, BLOCK, ALIGNED), mask=there, other=0.0).to(tl.float32)
    p = tl.load(at_p, mask=there, other=0.0) * kept - rate * update
    tl.store(at_p, p, mask=there)
    if WEIGHT is not None:
        tl.store(part(row, 2, block, WEIGHT, BLOCK, ALIGNED), p, mask=there)


def muon_step(
    masters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    norm: Tensor,
    runs: Sequence[Sequence[Run]],
    lr: float,
    momentum: float,
    weight_decay: float,
    clip: float,
    dtype: torch.dtype,
) -> None:
    found = []  # of each run: its part of master, gradient, momentum, weight
    for *tensors, of_one in zip(masters, gradients, momenta, weights, runs, strict=True):
        found += zip(*(repeat(None) if x is None else split(x, of_one) for x in tensors), strict=False)
    of_a_shape = stacks([each[0] for each in found])
    largest_first = sorted(of_a_shape, key=lambda stack: -sum(found[i][0].numel() for i in stack))
    for stack in largest_first:  # whose products run while the host launches the others
        p, g, held, w = zip(*(found[i] for i in stack), strict=True)
        ahead = torch.empty(sum(map(len, p)), *p[0].shape[1:], dtype=dtype, device=norm.device)
        for types, each in by_type([held, g, ahead.split([*map(len, p)])], [1, 2]):
            _ahead[each.grid](
                each.table, each.blocks, norm, clip, momentum,
                GRADIENT=types[0], OUT=types[1], BLOCK=BLOCK, ALIGNED=each.aligned, num_warps=WARPS,
            )  # fmt: skip
        updates = newton_schulz(ahead, dtype)
        sides = [max(p[0].shape[1:])] * len(p)
        for types, each in by_type([p, updates.split([*map(len, p)]), w], [1, 2], sides):
            _apply[each.grid](
                each.table, each.blocks, norm, 1 - lr * weight_decay, lr * GAIN,
                UPDATE=types[0], WEIGHT=types[1], BLOCK=BLOCK, ALIGNED=each.aligned, num_warps=WARPS,
            )  # fmt: skip
