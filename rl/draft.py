"""Draft and verify: the MTP block proposes a token, and the model draws two tokens in one step where it was right.

The model draws each token from its own logits with the token's own noise (seed, request, position), as without drafts.
A draft only decides whether the token's logits are there already: it is accepted if it is the token that was drawn. So
the responses, log-probs and recorded experts do not change. The draft is drawn with the noise of the token that it
tries to foresee: where the two distributions are alike, so are the two draws (our choice; DeepSeek publishes none).

A step feeds two tokens, the one just drawn, at position p, and the draft of p + 1; a wrong draft is rolled back. The
block's own cache holds pairs (state of a token, the token after it) of tokens that stay, so it never has to roll back.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import Output
from ..model.mtp import extend_mtp, mtp_block, mtp_cache
from .engine import Batch


class DraftedBatch(Batch):
    """Between two steps, each running row has one pair without its second token, which the next step draws, and, if
    its draft was accepted, a complete one before that."""

    slack = 1

    def _prefill(self) -> None:
        mtp_block(self.model)  # refuses a model without one before anything is computed
        super()._prefill()

    def _prefilled(self, output: Output, tokens: Tensor, cu_seqlens: Tensor, fork: Tensor) -> None:
        requests = cu_seqlens.numel() - 1
        cache = mtp_cache(self.model, requests, self.cache.capacity)
        paired = torch.ones_like(tokens, dtype=torch.bool)
        paired[cu_seqlens[1:] - 1] = False
        if bool(paired.any()):
            pairs = cu_seqlens - torch.arange(requests + 1, device=self.device)
            extend_mtp(self.model, output.streams[paired], tokens.roll(-1)[paired], pairs, cache)
        self.pairs = cache.select(fork)
        last = output.streams[cu_seqlens[1:] - 1][fork]
        self.streams = torch.stack([last, last], dim=1)  # [B, 2, n, d]: of a complete pair, if any, and of the other
        self.second = tokens.new_zeros(fork.numel())  # the complete pair's second token
        self.complete = torch.zeros_like(self.second, dtype=torch.bool)

    def step(self) -> None:
        """One token of every running request, and one more where the draft was right."""
        tokens = self.next_tokens()
        if not self.running:
            return
        position = self.cache.length.clone()
        draft = self._draft(tokens, position + 1)
        output = self.model.extend(
            torch.stack([tokens, draft], dim=1).flatten(),
            2 * torch.arange(tokens.numel() + 1, device=self.device),
            self.cache,
        )
        experts, self.streams = output.experts.unflatten(0, (-1, 2)), output.streams.unflatten(0, (-1, 2))
        logits = self.model.logits(output.hidden).unflatten(0, (-1, 2))
        self.record_experts(experts[:, 0])
        drawn, logprobs = self.sample(logits[:, 0], position + 1)
        right = drawn == draft
        rows = self.rows.cpu().numpy()
        self.drafted[rows] += 1
        self.accepted[rows] += right.cpu().numpy()
        self.cache.rollback(position + 1 + right)
        going = self.record(right, drawn, logprobs)
        # A wrong draft's row stands before a token that it has drawn already: the next step draws it again.
        self.logits = torch.where(right.unsqueeze(1), logits[:, 1], logits[:, 0])
        self.streams[~right, 1] = self.streams[~right, 0]
        self.second, self.complete = drawn, right
        self.keep(going)
        if self.running:
            self._record_accepted(experts[going, 1])

    def _draft(self, tokens: Tensor, position: Tensor) -> Tensor:
        """The block's guess at the tokens at `position`, int64 [B], after `tokens` [B]; completes all pairs."""
        there = torch.stack([self.complete, torch.ones_like(self.complete)], dim=1)
        following = torch.stack([self.second, tokens], dim=1)
        ends = there.sum(1).cumsum(0)
        hidden = extend_mtp(self.model, self.streams[there], following[there], F.pad(ends, (1, 0)), self.pairs)
        return self.sample(self.model.logits(hidden[ends - 1]), position)[0]

    def _record_accepted(self, experts: Tensor) -> None:
        rows = self.rows[self.complete].cpu().numpy()
        self.experts[rows, self.lengths[rows] - 1] = experts[self.complete].cpu().numpy()

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        if self.running:
            self.pairs = self.pairs.select(rows)
            self.streams, self.second, self.complete = self.streams[rows], self.second[rows], self.complete[rows]
