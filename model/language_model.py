"""What engine, learner and teachers ask of a model, whatever its architecture. T packed tokens, B documents."""

from abc import abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..kernels.losses import logits, packed_logprobs
from ..settings import FULL, Precision


class Output(NamedTuple):
    hidden: Tensor  # [T, d] after the final norm
    experts: Tensor  # int64 [T, L, k]: the expert ids of every MoE layer, hash layers in their slots; [T, 0, 0] if none
    streams: Any = None  # Tensor [T, n, d], as they leave V4's last layer, for its MTP block
    index_kl: Any = None  # Tensor fp32 [T], if asked for: the loss of V4's indexers in the queries that predict a token
    picks: Any = (
        None  # Tensor int32 [T, CSA layers, topk]: the entries that V4's indexers chose for a cache's requests,
    )
    # by number, rising, and -1 behind; None where no query sees more than topk, and so all that it sees


class LanguageModel(nn.Module):
    """`origin` is the folder that a model was loaded from (its tokenizer and encoding travel with it).

    A log-prob follows from `hidden` and the head's weight alone. A cache belongs to the model that made it.
    """

    config: Any
    lm_head: nn.Linear
    origin: Path | None = None
    precision: Precision = FULL

    @abstractmethod
    def forward(
        self, tokens: Tensor, cu_seqlens: Tensor, *, replay: Tensor | None = None, index_loss: bool = False
    ) -> Output:
        """A pack of whole documents: tokens int64 [T], cu_seqlens [B + 1]; no document sees another.

        `replay` int64 [T, L, k]: recorded expert ids to use again. `index_loss` asks for the output's `index_kl`.
        """

    @abstractmethod
    def prefill(self, tokens: Tensor, cu_seqlens: Tensor, capacity: int, slack: int = 0) -> tuple[Output, Any]:
        """As `forward`, and a cache for the B documents with room for `capacity` tokens each.

        Its `rollback` may drop the last `slack` tokens."""

    @abstractmethod
    def decode(self, tokens: Tensor, cache: Any) -> Output:
        """The next token of each of B requests, tokens int64 [B]; updates `cache` in place. hidden [B, d]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] -> fp32 [..., V]; float64 of a model in float64, as all that is called fp32 here."""
        return logits(hidden, self.lm_head.weight)

    def logprobs(
        self, tokens: Tensor, cu_seqlens: Tensor, *, replay: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """fp32 [T]: log p(token | its document's prefix) for tokens int64 [T]; 0 for each document's first token."""
        return self.logprobs_of(self(tokens, cu_seqlens, replay=replay), tokens, cu_seqlens, temperature)

    def logprobs_of(self, output: Output, tokens: Tensor, cu_seqlens: Tensor, temperature: float = 1.0) -> Tensor:
        """`logprobs` from the forward's output."""
        return packed_logprobs(output.hidden, self.lm_head.weight, tokens, cu_seqlens, temperature=temperature)
