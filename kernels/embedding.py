"""Rows of a table by number, as the residual streams begin with them."""

import torch.nn.functional as F
from torch import Tensor

from .dispatch import fused


def embed(tokens: Tensor, table: Tensor, copies: int) -> Tensor:
    """Rows of table [V, d] for tokens int64 [T] in [0, V), `copies` times each: [T, copies, d].

    A row's gradient is the sum over the copies of all its tokens, in fp32, in an order that follows from the tokens.
    """
    if fused(table):
        from .fused.embedding import Embed

        return Embed.apply(tokens, table, copies)  # pyright: ignore[reportReturnType]
    return F.embedding(tokens, table).unsqueeze(1).repeat(1, copies, 1)
