"""Where a choice hangs on rounding: the indexer's border between entries, the router's border between experts."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from amalgam.kernels.indexer import index_scores, select
from amalgam.kernels.places import Seen
from amalgam.kernels.upcast import upcast
from amalgam.model import DeepseekV4

NEAR = 1e-5  # of the largest score; choices that rounding flipped had gaps of 5e-8 to 3e-7 of it


@torch.inference_mode()
def near_ties(model: DeepseekV4, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    """bool [T]: tokens of a pack for which, in some layer, the last that is chosen and the first that is not are NEAR.

    There, two orders of the same additions choose differently, and both are right; what follows differs by up to 0.5.
    """
    near = torch.zeros(tokens.shape[0], dtype=torch.bool)
    with _recorded(model, near):
        model(tokens, cu_seqlens)
    return near


@contextmanager
def _recorded(model: DeepseekV4, near: Tensor) -> Iterator[None]:
    def index(q: Tensor, weights: Tensor, keys: Tensor, seen: Seen, topk: int, dtype: torch.dtype | None) -> Tensor:
        numbers = torch.arange(seen.most, dtype=torch.int32)
        complete = numbers < ((seen.position + 1) // seen.ratio).unsqueeze(1)
        scores = index_scores(q, weights, keys, seen, numbers.where(complete, -1))
        near.logical_or_(_near_border(scores, topk))
        return select(q, weights, keys, seen, topk, dtype)

    def routed(router: torch.nn.Module, inputs: tuple[Tensor, ...], _: object) -> None:
        scores = F.softplus(F.linear(upcast(inputs[0]), upcast(router.weight))).sqrt()  # pyright: ignore
        if not router.hashed:
            near.logical_or_(_near_border(scores + router.e_score_correction_bias, router.topk))  # pyright: ignore

    hooks = [block.mlp.gate.register_forward_hook(routed) for block in model.model.layers]  # pyright: ignore
    with patch("amalgam.model.attention.select", index):
        yield
    for hook in hooks:
        hook.remove()


def _near_border(scores: Tensor, k: int) -> Tensor:
    """bool [T] for scores [T, N], -inf where there is none; False where no more than k are there."""
    best = scores.sort(dim=-1, descending=True).values
    if best.shape[1] <= k:
        return torch.zeros(best.shape[0], dtype=torch.bool)
    largest = best.masked_fill(best.isinf(), 0.0).abs().amax(-1)
    return ((best[:, k - 1] - best[:, k]) <= NEAR * largest) & best[:, k].isfinite()
