"""Compression of a window of tokens into one entry: a softmax over its tokens, for each channel on its own."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .cache_formats import ENTRY_TILE
from .dispatch import fused
from .fake_quantize import fake_fp4, fake_fp8
from .hadamard import hadamard
from .norm import rms_norm
from .places import Windows
from .project import few
from .rope import apply_rope
from .upcast import upcast

Storage = Literal["full", "fp8", "fp4"]
"""How something is kept: as it is; FP8 but for the rotated channels (rows, entries); FP4 after a Hadamard rotation."""


def compress(
    values: Tensor,
    scores: Tensor,
    bias: Tensor,
    weight: Tensor,
    windows: Windows,
    eps: float,
    dtype: torch.dtype,
    storage: Storage = "full",
) -> Tensor:
    """The entries [N, D] of `windows`, in `dtype` (paper 2.3.1, 2.3.2).

    values, scores [R, C] of tokens; bias [ratio, C], added to the scores by a token's place in its window; weight [D]
    of the RMSNorm. Each entry pools its window's tokens: sum over tokens of softmax(scores + bias) * values, fp32; then
    norm, RoPE, and what `storage` rounds. Where C = 2 D (CSA), an entry pools two windows: with the first half of the
    channels the tokens of the window before, if there is one, and with the second half its own.
    """
    if fused(values):
        from .fused.compress import Compress

        return Compress.apply(values, scores, bias, weight, windows, eps, dtype, storage)  # pyright: ignore
    return reference_compress(values, scores, bias, weight, windows, eps, dtype, storage)


class Pooling(NamedTuple):
    """One kind of entries of `compress_each`: as `compress` has it, but for rows of rings, and where entries go."""

    values: Tensor
    scores: Tensor
    bias: Tensor
    weight: Tensor
    eps: float
    pool: Tensor  # [rows, D]
    storage: Storage = "full"


def compress_each(poolings: Sequence[Pooling], windows: Windows, rows: Tensor) -> None:
    """Writes the entries of `windows` into rows int64 [N] of each pool, of kinds with the same ratio and overlap.

    No gradient; few entries are one launch."""
    if rows.numel() and windows.slots and few(rows):
        from .fused.compress import compress_each as launch

        launch(poolings, windows, rows)
        return
    for values, scores, bias, weight, eps, pool, storage in poolings:
        made = compress(values, scores, bias, weight, windows, eps, pool.dtype, storage)
        pool.index_copy_(0, rows, made)


def reference_compress(
    values: Tensor,
    scores: Tensor,
    bias: Tensor,
    weight: Tensor,
    windows: Windows,
    eps: float,
    dtype: torch.dtype,
    storage: Storage = "full",
) -> Tensor:
    real = (windows.number >= 0).nonzero().squeeze(1)
    if absent := windows.number.shape[0] - real.numel():
        windows = Windows(windows.first[real], windows.number[real], windows.rotation[real], windows.slots)
    of_windows = gather(values, scores, bias, windows, weight.shape[0])
    made = finish(pool(*of_windows).to(dtype), weight, windows.rotation, eps, storage)
    return made.new_zeros(real.numel() + absent, made.shape[1]).index_copy(0, real, made) if absent else made


def gather(values: Tensor, scores: Tensor, bias: Tensor, windows: Windows, dim: int) -> tuple[Tensor, Tensor]:
    """The values and scores [N, slots, dim] that each entry pools; an absent token's scores are -inf."""
    ratio = bias.shape[0]
    own = windows.tokens(ratio)
    values_of, scores_of = values[own], scores[own] + bias
    if values.shape[1] == dim:
        return values_of, scores_of
    before = windows.tokens(ratio, back=1)
    absent = (windows.number == 0).view(-1, 1, 1)
    previous = (scores[before] + bias).masked_fill(absent, float("-inf"))
    return (
        torch.cat([values[before][..., :dim], values_of[..., dim:]], dim=1),
        torch.cat([previous[..., :dim], scores_of[..., dim:]], dim=1),
    )


def pool(values: Tensor, scores: Tensor) -> Tensor:
    """values, scores [N, slots, D] -> [N, D]: sum over slots of softmax(scores) * values, fp32."""
    return (torch.softmax(upcast(scores), dim=1) * upcast(values)).sum(1)


def finish(pooled: Tensor, weight: Tensor, rotation: Tensor, eps: float, storage: Storage) -> Tensor:
    """What becomes of a pooled entry [N, D]: norm, RoPE, rounding."""
    return stored(apply_rope(rms_norm(pooled, weight, eps), rotation), rotation, storage)


def stored(x: Tensor, rotation: Tensor, storage: Storage) -> Tensor:
    """x [..., D], whose last channels `rotation` [.., pairs] has turned, as it is kept; gradient straight through."""
    if storage != "full" and fused(x):
        from .fused.storage import Stored

        return Stored.apply(x, x.shape[-1] - 2 * rotation.shape[-1], storage)  # pyright: ignore[reportReturnType]
    return reference_stored(x, rotation, storage)


def reference_stored(x: Tensor, rotation: Tensor, storage: Storage) -> Tensor:
    if storage == "fp4":
        return fake_fp4(hadamard(x))
    if storage == "fp8":
        rope_dim = 2 * rotation.shape[-1]
        plain, turned = x.split([x.shape[-1] - rope_dim, rope_dim], dim=-1)
        return torch.cat([fake_fp8(plain, ENTRY_TILE), turned], dim=-1)
    return x
