"""The rollout engine: batched decoding over the cache, reproducible request by request.

A request's tokens depend on its prompt, its counter and the weights alone: not on its neighbors, on the batch's size or
on the order of requests (on a CPU up to fp32 rounding, which a near-tie can turn into another token).
What it leaves out, for now: admitting requests while others decode, preemption, paging.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.sampling import DrawSettings, sample
from ..model import LanguageModel, Output
from .settings import Draft
from .trajectory import Request, Trajectory

MAX_BATCH = 512
"""Requests that are prefilled and decode at once; the others wait. It bounds the engine's memory, whose cache has room
for so many of the longest prompt and response, and changes no response."""


class Engine:
    """Samples from one model replica. Each of `end_ids` ends a response; `max_batch` requests decode at once.

    `draft` "mtp" lets the model's MTP block propose a token at every step (rl/draft.py); the responses are the same.
    ValueError for a model without one.
    """

    def __init__(self, model: LanguageModel, end_ids: Sequence[int], max_batch: int = MAX_BATCH):
        self.model, self.end_ids, self.max_batch = model, tuple(end_ids), max_batch

    @torch.inference_mode()
    def generate(
        self,
        requests: list[Request],
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        version: int,
        draft: Draft = "off",
    ) -> list[Trajectory]:
        """A trajectory for each request, in order; temperature 0 is greedy. `text` is left to the caller."""
        from .draft import DraftedBatch  # which is built from this file's Batch

        kind, results = {"off": Batch, "mtp": DraftedBatch}[draft], []
        for start in range(0, len(requests), self.max_batch):
            few = requests[start : start + self.max_batch]
            batch = kind(self.model, few, max_new_tokens, temperature, seed, self.end_ids)
            while batch.running:
                batch.step()
            results += batch.trajectories(version)
        return results

    @torch.inference_mode()
    def stream(self, request: Request, *, temperature: float, max_new_tokens: int, seed: int) -> Iterator[np.ndarray]:
        """What `generate` samples for one request, step by step: the new ids, int32, the end token too."""
        batch, seen = Batch(self.model, [request], max_new_tokens, temperature, seed, self.end_ids), 0
        while batch.running:
            batch.step()
            yield batch.tokens[0, seen : batch.lengths[0]].copy()
            seen = int(batch.lengths[0])


class Batch:
    """Requests that decode together, from their prompts to their last tokens. N requests, B of them still running."""

    slack = 0  # tokens that a step may take back

    def __init__(
        self,
        model: LanguageModel,
        requests: list[Request],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        end_ids: tuple[int, ...],
    ):
        self.model: Any = model
        self.requests, self.limit = requests, max_new_tokens
        self.temperature, self.seed, self.end_ids = temperature, seed, end_ids
        self.device = model.lm_head.weight.device
        count = len(requests)
        self.tokens = np.zeros((count, max_new_tokens), dtype=np.int32)
        self.logprobs = np.zeros((count, max_new_tokens), dtype=np.float32)
        self.lengths = np.zeros(count, dtype=np.int64)
        self.drafted = np.zeros(count, dtype=np.int64)
        self.accepted = np.zeros(count, dtype=np.int64)
        self.rows = torch.arange(count, device=self.device)  # the request of each running row
        self.ids = torch.tensor([r.id for r in requests], device=self.device)
        self._prefill()
        self.experts = np.full((count, max_new_tokens, *self.prompt_experts[0].shape[1:]), -1, dtype=np.int16)

    @property
    def running(self) -> bool:
        return self.rows.numel() > 0

    def _prefill(self) -> None:
        """Each group's prompt once, then a fork for each request."""
        groups = [list(members) for _, members in groupby(self.requests, key=lambda r: r.group)]
        prompts = [members[0].prompt_ids for members in groups]
        cu_seqlens = torch.tensor([0, *map(len, prompts)], device=self.device).cumsum(0)
        ends = cu_seqlens[1:]
        tokens = torch.from_numpy(np.concatenate(prompts)).long().to(self.device)
        room = max(len(p) for p in prompts) + self.limit
        fork = torch.tensor([g for g, members in enumerate(groups) for _ in members], device=self.device)
        output, cache = self.model.prefill(tokens, cu_seqlens, room, self.slack)
        self.cache = cache.select(fork)
        self.logits = self.model.logits(output.hidden[ends - 1][fork])  # of each running row's next token
        ids = np.split(output.experts.to(torch.int16).cpu().numpy(), ends[:-1].cpu().numpy())
        self.prompt_experts = [ids[g] for g in fork.tolist()]
        self._prefilled(output, tokens, cu_seqlens, fork)

    def _prefilled(self, output: Output, tokens: Tensor, cu_seqlens: Tensor, fork: Tensor) -> None:
        """For what else keeps a cache of its own: the prompts' pack, and each request's place in it."""

    def step(self) -> None:
        """Samples a token of every running request, drops those that end with it, and feeds the others'."""
        tokens = self.next_tokens()
        if self.running:
            output = self.model.decode(tokens, self.cache)
            self.record_experts(output.experts)
            self.logits = self.model.logits(output.hidden)

    def next_tokens(self) -> Tensor:
        """Samples and records a token of every running request; those of the requests that go on."""
        tokens, logprobs = self.sample(self.logits, self.cache.length)
        going = self.record(torch.ones_like(tokens, dtype=torch.bool), tokens, logprobs)
        self.keep(going)
        return tokens[going]

    def sample(self, logits: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        settings = DrawSettings.alike(len(logits), self.temperature, self.seed, logits.device)
        drawn = sample(logits, self.ids[self.rows], position, settings)
        return drawn.tokens, drawn.logprobs

    def record(self, which: Tensor, tokens: Tensor, logprobs: Tensor) -> Tensor:
        """Writes down the next tokens of the running rows `which` (bool [B]); which rows go on [B]."""
        rows, chosen = self.rows.cpu().numpy(), which.cpu().numpy()
        mine = rows[chosen]
        self.tokens[mine, self.lengths[mine]] = tokens.cpu().numpy()[chosen]
        self.logprobs[mine, self.lengths[mine]] = logprobs.cpu().numpy()[chosen]
        self.lengths[mine] += 1
        ended = torch.isin(tokens, torch.tensor(self.end_ids, device=self.device))
        return ~which | ~ended & torch.from_numpy(self.lengths[rows] < self.limit).to(self.device)

    def record_experts(self, experts: Tensor) -> None:
        """Writes down the expert ids [B, L, k] of the running rows' last tokens."""
        rows = self.rows.cpu().numpy()
        self.experts[rows, self.lengths[rows] - 1] = experts.cpu().numpy()

    def keep(self, going: Tensor) -> None:
        """Drops the running rows that do not go on."""
        if not bool(going.all()):
            self.select(going.nonzero().squeeze(1))

    def select(self, rows: Tensor) -> None:
        self.rows, self.logits = self.rows[rows], self.logits[rows]
        if self.running:
            self.cache = self.cache.select(rows)

    def trajectories(self, version: int) -> list[Trajectory]:
        results = []
        for i, request in enumerate(self.requests):
            n = int(self.lengths[i])
            ids = self.tokens[i, :n].copy()
            results.append(
                Trajectory(
                    request=request.id,
                    group=request.group,
                    prompt_ids=request.prompt_ids,
                    response_ids=ids,
                    logprobs=self.logprobs[i, :n].copy(),
                    experts=np.concatenate([self.prompt_experts[i], self.experts[i, :n]]),
                    versions=np.full(n, version, dtype=np.int32),
                    finish="stop" if ids[-1] in self.end_ids else "length",
                    text="",
                    drafted=int(self.drafted[i]),
                    accepted=int(self.accepted[i]),
                )
            )
        return results
