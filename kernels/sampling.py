"""Sampling by counter: the noise of a token comes from (seed, request, position) and from nothing else.

Which tokens may be drawn (the order of the steps is our choice; DeepSeek publishes none):

    1. `allowed`: those of the request's mask whose logit is not -inf
    2. top_k: of these the k with the highest logits
    3. top_p: of these, likeliest first, the fewest whose probabilities, renormalized, reach p; one at least
    4. min_p: of these the ones with at least that share of the likeliest one's probability

Probabilities are softmax(logits / temperature). Of equal logits the lower id comes first, so that each of these sets is
one. Step 3 adds up integers: probabilities in units of 2^-40 of the highest, from an exponential that is made of single
roundings. So a row's set does not depend on the order of sums, on other rows or on the device.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .dispatch import fused
from .losses import check_mask, chosen_logprobs, packed_mask, unpacked_mask

_MASK = 0xFFFFFFFF
LOG2E = 1.4426950408889634
# 2^f = 1 + f (c0 + f (c1 + ...)) for f in [0, 1], to 1.6e-7: fitted by least squares of the relative error.
EXP2 = (0.693151355, 0.240164161, 0.0558004454, 0.00901668798, 0.0018671829)


class DrawSettings(NamedTuple):
    """How each row is drawn from, [B] on the logits' device. None: in no row, which saves its passes."""

    temperature: Tensor  # float64: 0 is greedy, others from 1e-5; in fp32, 1 / 0.7 would not be that of the learner
    seed: Tensor  # int64
    top_k: Tensor | None = None  # int32; 0: all
    top_p: Tensor | None = None  # fp32; 1: all
    min_p: Tensor | None = None  # fp32, at most 1; 0: all

    @classmethod
    def alike(cls, rows: int, temperature: float, seed: int, device: torch.device) -> "DrawSettings":
        """Of rows that are all drawn from whole distributions, in one way."""
        at = torch.full((rows,), temperature, dtype=torch.float64, device=device)
        return cls(at, torch.full((rows,), seed, dtype=torch.int64, device=device))

    @property
    def cuts(self) -> bool:
        """Whether a row may be drawn from less than what is allowed."""
        return not (self.top_k is None and self.top_p is None and self.min_p is None)

    def complete(self) -> "tuple[Tensor, Tensor, Tensor]":
        """top_k, top_p and min_p, with tensors for None."""
        like = self.temperature
        return (
            torch.zeros_like(like, dtype=torch.int32) if self.top_k is None else self.top_k,
            torch.ones_like(like, dtype=torch.float32) if self.top_p is None else self.top_p,
            torch.zeros_like(like, dtype=torch.float32) if self.min_p is None else self.min_p,
        )


class Draw(NamedTuple):
    """Of each row."""

    tokens: Tensor  # int64 [B]
    logprobs: Tensor  # fp32 [B]
    allowed: Tensor | None  # int32 [B, ceil(V / 32)], as `losses.packed_mask`: what the token was drawn from; if asked
    finite: Tensor  # bool [B]; False: a logit is NaN or +inf, or nothing may be drawn: token 0, NaN, an empty set


def sample(
    logits: Tensor,
    request: Tensor,
    position: Tensor,
    settings: DrawSettings,
    allowed: Tensor | None = None,
    sets: bool = False,
) -> Draw:
    """A token of each row of logits fp32 [B, V], at `position` of `request` (int64 [B], both non-negative).

    The token is the argmax of logits / temperature + Gumbel noise over the tokens that may be drawn (above; `allowed`
    int32 [B, ceil(V / 32)] is a mask of them), the lowest id of equal ones. Its log-prob is that of
    softmax(logits / temperature) over these, with the bits of `losses.chosen_logprobs`, and on a GPU of
    `losses.token_scores`, under the set that `sets` returns. Temperature 0 draws the likeliest token; all else is as at
    temperature 1. A row's results depend on its own logits, counter and settings alone. On a GPU nothing is asked of
    it, so that a CUDA graph can hold the call. ValueError, by name, for tensors of another shape or dtype.
    """
    _check(logits, request, position, settings, allowed)
    if fused(logits):
        from .fused import sampling

        tokens, finite, mask = sampling.draw(logits, request, position, settings, allowed, sets)
    else:
        tokens, finite, mask = _draw(logits, request, position, settings, allowed, sets)
    # At temperature 0 as at 1.
    temperature = settings.temperature.masked_fill(settings.temperature == 0, 1.0)
    logprobs = chosen_logprobs(logits, tokens, temperature, allowed=allowed if mask is None else mask)
    return Draw(tokens, logprobs.masked_fill(~finite, torch.nan), mask if sets else None, finite)


def set_ids(allowed: Tensor) -> list[np.ndarray]:
    """Ids int32 [n], rising, of each row of a mask int32 [B, words], as `Draw` has it."""
    words = allowed.cpu().numpy().view(np.uint32)
    row, word = words.nonzero()  # most of them hold nothing
    bit = words[row, word][:, None] >> np.arange(32, dtype=np.uint32) & 1
    found, which = bit.nonzero()
    ids = (word[found] * 32 + which).astype(np.int32)
    return np.split(ids, np.searchsorted(row[found], np.arange(1, len(words))))[: len(words)]


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor | int, Tensor | int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., 2011): four 32-bit words per counter; int64 tensors that hold 32-bit values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of two 32-bit words wraps in int64; its high half survives the arithmetic shift under the mask.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK, ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def gumbel(seed: Tensor, request: Tensor, position: Tensor, vocabulary: int) -> Tensor:
    """Gumbel noise fp32 [B, V] for tokens at `position` of `request`; int64 [B] as the seed."""
    words = torch.arange(-(-vocabulary // 4), device=request.device).unsqueeze(0)
    low, high = (request & _MASK).unsqueeze(1), (request >> 32).unsqueeze(1)
    counter = torch.broadcast_tensors(words, position.unsqueeze(1), low, high)
    key = (seed & _MASK).unsqueeze(1), ((seed >> 32) & _MASK).unsqueeze(1)
    bits = torch.stack(philox(tuple(counter), key), dim=-1).flatten(1)[:, :vocabulary]
    # 23 bits and a half are exact in fp32: strictly between 0 and 1, so that both logarithms are finite.
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _check(logits: Tensor, request: Tensor, position: Tensor, settings: DrawSettings, allowed: Tensor | None) -> None:
    if logits.ndim != 2 or logits.dtype != torch.float32:
        raise ValueError(f"logits: {logits.dtype} {list(logits.shape)}; want torch.float32 [B, V]")
    rows = logits.shape[0]
    given = {"request": request, "position": position, **settings._asdict()}
    floats = {"temperature": torch.float64, "top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}
    for name, x in given.items():
        want = floats.get(name, torch.int64)
        if x is not None and (x.dtype != want or list(x.shape) != [rows]):
            raise ValueError(f"{name}: {x.dtype} {list(x.shape)}; want {want} [{rows}]")
    check_mask(allowed, *logits.shape)


def _draw(
    logits: Tensor, request: Tensor, position: Tensor, settings: DrawSettings, allowed: Tensor | None, sets: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, which rows are finite, and, if a row may be cut or `sets` are wanted, the sets packed."""
    vocabulary = logits.shape[1]
    kept = logits != -torch.inf
    if allowed is not None:
        kept &= unpacked_mask(allowed, vocabulary)
    finite = (logits < torch.inf).all(1) & kept.any(1)
    kept &= finite[:, None]
    if settings.cuts:
        top_k, top_p, min_p = settings.complete()
        rows = ((top_k > 0) | (top_p < 1) | (min_p > 0)).nonzero().squeeze(1)  # the others need no sort
        kept[rows] = _cut(logits[rows], kept[rows], settings.temperature[rows], top_k[rows], top_p[rows], min_p[rows])
    temperature = settings.temperature[:, None].float()
    noisy = logits / temperature + gumbel(settings.seed, request, position, vocabulary)
    # A token that may be drawn is above those that may not, whatever its logit.
    scores = torch.where(temperature == 0, logits, noisy).clamp(min=torch.finfo(torch.float32).min)
    tokens = scores.masked_fill(~kept, -torch.inf).argmax(1)
    return tokens, finite, packed_mask(kept) if sets or settings.cuts else None


def _cut(
    logits: Tensor, kept: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:  # fmt: skip
    """What top_k, top_p and min_p [B] leave of `kept`, bool [B, V]."""
    top_k, top_p, min_p = top_k[:, None], top_p[:, None], min_p[:, None]
    scale = (1 / temperature.masked_fill(temperature == 0, 1.0)).float()[:, None]
    ordered, ids = logits.masked_fill(~kept, -torch.inf).sort(dim=1, descending=True, stable=True)
    there = ordered != -torch.inf
    there &= (torch.arange(ordered.shape[1], device=ids.device) < top_k) | (top_k == 0)
    below = (ordered - ordered[:, :1]) * scale
    weights = _weights(below).where(there, 0)
    mass = weights.cumsum(1)
    need = (mass[:, -1:].double() * top_p.double()).ceil().long().clamp(min=1)
    there &= (mass - weights < need) | (top_p >= 1)
    there &= (below >= min_p.double().clamp(0, 1).log().float()) | (min_p <= 0)
    return torch.zeros_like(kept).scatter(1, ids, there)


def _weights(below: Tensor) -> Tensor:
    """int64: 2^40 exp(below), of fp32 numbers up to 0; of NaN, anything."""
    y = (below * LOG2E).nan_to_num(nan=0.0).clamp(min=-42.0)
    whole = y.floor()
    f = y - whole
    power = torch.full_like(f, EXP2[-1])
    for c in EXP2[-2::-1]:
        power = power * f + c
    return ((power * f + 1.0) * 2.0**23).long() << 17 >> (-whole).long()
