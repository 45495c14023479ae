"""Draft and verify: the MTP block proposes a token, and the model draws two tokens in one step where it was right.

The model draws each token from its own logits with the token's own noise (seed, request, position), as without drafts.
A draft only decides whether the token's logits are there already: it is accepted if it is the token that was drawn. So
the responses, log-probs and recorded experts do not change. The draft is drawn with the noise of the token that it
tries to foresee: where the two distributions are alike, so are the two draws (our choice; DeepSeek publishes none).

A step feeds a request two tokens, the one drawn last, at position p, and the draft of p + 1, and draws those at p + 1
and p + 2; if the draft was wrong, it and the second are dropped. The block's own cache holds pairs (state of a token,
the token after it) of tokens that stay, so it never has to roll back. S slots, n streams of d channels.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import LanguageModel, Output
from ..model.mtp import extend_mtp, mtp_block, mtp_cache
from .batch import Batch, Forward, slots_of
from .plan import Chunk, Clear, Entry, Move
from .response import Response
from .room import Room
from .settings import EngineSettings


class DraftedBatch(Batch):
    """Between two steps, a request has one pair without its second token, which is drawn but not fed, and, if its draft
    was accepted, a complete one before that, which the block has not been fed yet. ValueError for a model without one.
    """

    slack = 1
    stride = 2

    @staticmethod
    def extra_bytes(model: LanguageModel) -> int:
        any_model: Any = model
        config, each = model.config, mtp_block(any_model).norm.weight.dtype.itemsize  # refuses a model without one
        return each * (2 * config.hc_mult * config.hidden_size + (config.sliding_window + 1) * config.head_dim)

    def __init__(self, model: LanguageModel, room: Room, settings: EngineSettings):
        super().__init__(model, room, settings)
        config = model.config
        self.pairs = mtp_cache(self.model, room.slots + 1, room.capacity)
        shape = (room.slots + 1, 2, config.hc_mult, config.hidden_size)  # of a complete pair, if any, and of the other
        self.streams = torch.zeros(shape, dtype=self.model.model.embed_tokens.weight.dtype, device=self.device)
        self._allocate_pairs()
        self.second = torch.zeros_like(self.last)  # the complete pair's second token
        self.complete = torch.zeros_like(self.last, dtype=torch.bool)

    @torch.inference_mode()
    def _allocate_pairs(self) -> None:
        nobody = self.to_device([self.pairs.length.numel() - 1])
        borders = self.to_device([0, 1])
        extend_mtp(self.model, self.streams[-1, :1], torch.zeros_like(nobody), borders, self.pairs, nobody)
        self.pairs.length.zero_()
        self.pairs.held.zero_()

    # --- moves

    def move(self, move: Move) -> None:
        super().move(move)
        if isinstance(move, Clear):
            self.pairs.length[move.slot] = self.pairs.held[move.slot] = 0

    def fork(self, source: int, targets: Tensor) -> None:
        super().fork(source, targets)
        self.pairs.copy_state(source, targets)
        for tensor in self._own():
            tensor[targets] = tensor[source].clone()

    def scrub(self, slots: Tensor, pages: Tensor) -> None:
        super().scrub(slots, pages)
        self.pairs.scrub(slots, pages[:0])
        self.streams[slots] = 0

    def take(self, slot: int, pages: Tensor) -> list[Tensor]:
        own = [tensor[slot].clone() for tensor in (self.pairs.length, *self._own())]
        return [*own, *self.pairs.take(slot, pages[:0]), *super().take(slot, pages)]

    def put(self, slot: int, pages: Tensor, kept: list[Tensor], length: int) -> None:
        pairs, *rest = kept
        for tensor in self._own():
            tensor[slot] = rest.pop(0).to(self.device)
        block = len(self.pairs.take(slot, pages[:0]))
        self.pairs.put(slot, pages[:0], rest[:block], int(pairs))
        super().put(slot, pages, rest[block:], length)

    def _own(self) -> tuple[Tensor, ...]:
        return self.streams, self.second, self.complete

    # --- forwards

    def prefilled(self, chunks: list[Chunk], tokens: Tensor, sizes: list[int], output: Output) -> None:
        """The pairs that the chunks complete: first the one that a chunk before has left open."""
        count, first = len(chunks), np.cumsum([0, *sizes])[:-1].tolist()
        states, following = [], []  # rows of the open pairs' streams and then the pack's, and of the tokens
        for i, (chunk, start, size) in enumerate(zip(chunks, first, sizes, strict=True)):
            opened = [i] if chunk.start else []
            states.append(opened + list(range(count + start, count + start + size - 1)))
            following += [start] * len(opened) + list(range(start + 1, start + size))
        slots = self.to_device(slots_of(chunk.entry for chunk in chunks))
        if following:
            streams = torch.cat([self.streams[slots, 1], output.streams])[self.to_device(sum(states, []))]
            borders = self.to_device(np.cumsum([0, *map(len, states)]))
            extend_mtp(self.model, streams, tokens[self.to_device(following)], borders, self.pairs, slots)
        last = [start + size - 1 for start, size in zip(first, sizes, strict=True)]
        self.streams[slots, 1] = output.streams[self.to_device(last)]
        self.complete[slots] = False

    def decode(self, decodes: list[tuple[Entry, int]], responses: Mapping[int, Response]) -> Forward:
        mine = [responses[entry.id] for entry, _ in decodes]
        slots = self.to_device(slots_of(entry for entry, _ in decodes))
        tokens, positions = self.tokens(decodes, responses, slots), [position for _, position in decodes]
        draft = self.propose(tokens, slots, mine, [p + 1 for p in positions])
        both = torch.stack([tokens, draft], dim=1).flatten()
        borders = 2 * torch.arange(len(mine) + 1, device=self.device)
        output = self.model.extend(both, borders, self.cache, slots)
        places = np.array([[p, p + 1] for p in positions]).flatten()
        drawn = self.draw(output.hidden, [r for r in mine for _ in range(2)], (places + 1).tolist())
        first = drawn.tokens[::2]
        right = first == draft
        length = self.cache.length.clone()
        length[slots] -= (~right).long()
        self.cache.rollback(length)
        streams = output.streams.unflatten(0, (-1, 2)).clone()
        streams[~right, 1] = streams[~right, 0]
        self.streams[slots], self.second[slots], self.complete[slots] = streams, first, right
        fed = list(zip(mine, positions, strict=True))
        return self.forward(fed, [2] * len(mine), output, places, [True] * len(mine), drawn, 1 + right.long())

    def propose(self, tokens: Tensor, slots: Tensor, responses: list[Response], positions: list[int]) -> Tensor:
        """The block's guess at the tokens at `positions`, int64 [B], after `tokens` [B]; completes all pairs."""
        complete = self.complete[slots]
        there = torch.stack([complete, torch.ones_like(complete)], dim=1)
        following = torch.stack([self.second[slots], tokens], dim=1)
        ends = there.sum(1).cumsum(0)
        streams = self.streams[slots][there]
        hidden = extend_mtp(self.model, streams, following[there], F.pad(ends, (1, 0)), self.pairs, slots)
        return self.draw(hidden[ends - 1], responses, positions).tokens
