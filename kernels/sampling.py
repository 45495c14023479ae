"""Sampling by counter: the noise of a token comes from (seed, request, position) and from nothing else."""

import torch
from torch import Tensor

from .losses import chosen_logprobs

_MASK = 0xFFFFFFFF


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
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


def gumbel(seed: int, request: Tensor, position: Tensor, vocabulary: int) -> Tensor:
    """Gumbel noise fp32 [B, V] for tokens at `position` of `request` (int64 [B], both non-negative)."""
    words = torch.arange(-(-vocabulary // 4), device=request.device).unsqueeze(0)
    low, high = (request & _MASK).unsqueeze(1), (request >> 32).unsqueeze(1)
    counter = torch.broadcast_tensors(words, position.unsqueeze(1), low, high)
    bits = torch.stack(philox(tuple(counter), (seed & _MASK, (seed >> 32) & _MASK)), dim=-1).flatten(1)[:, :vocabulary]
    # 23 bits and a half are exact in fp32: strictly between 0 and 1, so that both logarithms are finite.
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def sample(logits: Tensor, temperature: float, seed: int, request: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens int64 [B] and their log-probs fp32 [B] from logits fp32 [B, V].

    argmax(logits / temperature + Gumbel noise), so a token depends on its own logits and counter alone; log-probs are
    under softmax(logits / temperature). Temperature 0 is greedy (lowest id on ties), with log-probs at temperature 1.
    """
    if temperature == 0:
        tokens, temperature = logits.argmax(-1), 1.0
    else:
        tokens = (logits / temperature + gumbel(seed, request, position, logits.shape[1])).argmax(-1)
    return tokens, chosen_logprobs(logits, tokens, temperature)
