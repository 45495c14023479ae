"""The rollout engine: batched decoding over the cache, reproducible request by request.

A request's tokens depend on its prompt, its counter and the weights alone: not on its neighbors, on the batch's size or
on the order of requests (on a CPU up to fp32 rounding, which a near-tie can turn into another token).
What it leaves out, for now: admitting requests while others decode, preemption, paging.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ..kernels.sampling import sample
from ..model import LanguageModel
from ..model.cache import Cache
from .trajectory import Request, Trajectory

MAX_BATCH = 512
"""Requests that decode at once."""


class Engine:
    """Samples from one model replica. Each of `end_ids` ends a response; `max_batch` requests decode at once."""

    def __init__(self, model: LanguageModel, end_ids: Sequence[int], max_batch: int = MAX_BATCH):
        self.model, self.end_ids, self.max_batch = model, tuple(end_ids), max_batch

    @torch.inference_mode()
    def generate(
        self, requests: list[Request], *, temperature: float, max_new_tokens: int, seed: int, version: int
    ) -> list[Trajectory]:
        """A trajectory for each request, in order; temperature 0 is greedy. `text` is left to the caller."""
        results = []
        for start in range(0, len(requests), self.max_batch):
            batch = _Batch(self.model, requests[start : start + self.max_batch], max_new_tokens)
            while batch.running:
                batch.step(temperature, seed, self.end_ids)
            results += batch.trajectories(version, self.end_ids)
        return results

    @torch.inference_mode()
    def stream(self, request: Request, *, temperature: float, max_new_tokens: int, seed: int) -> Iterator[np.ndarray]:
        """What `generate` samples for one request, step by step: the new ids, int32, the end token too."""
        batch, seen = _Batch(self.model, [request], max_new_tokens), 0
        while batch.running:
            batch.step(temperature, seed, self.end_ids)
            yield batch.tokens[0, seen : batch.lengths[0]].copy()
            seen = int(batch.lengths[0])


class _Batch:
    """Requests that decode together, from their prompts to their last tokens. N requests, B of them still running."""

    def __init__(self, model: LanguageModel, requests: list[Request], max_new_tokens: int):
        self.model, self.requests, self.limit = model, requests, max_new_tokens
        self.device = model.lm_head.weight.device
        count = len(requests)
        self.tokens = np.zeros((count, max_new_tokens), dtype=np.int32)
        self.logprobs = np.zeros((count, max_new_tokens), dtype=np.float32)
        self.lengths = np.zeros(count, dtype=np.int64)
        hidden, self.cache, self.prompt_experts = self._prefill()
        self.experts = np.full((count, max_new_tokens, *self.prompt_experts[0].shape[1:]), -1, dtype=np.int16)
        self.logits = model.logits(hidden)
        self.rows = torch.arange(count, device=self.device)  # the request of each running row
        self.ids = torch.tensor([r.id for r in requests], device=self.device)

    @property
    def running(self) -> bool:
        return self.rows.numel() > 0

    def _prefill(self) -> tuple[Tensor, Cache, list[np.ndarray]]:
        """Each group's prompt once, then a fork for each request: last hidden states [N, d], cache, expert ids."""
        groups = [list(members) for _, members in groupby(self.requests, key=lambda r: r.group)]
        prompts = [members[0].prompt_ids for members in groups]
        ends = torch.tensor([len(p) for p in prompts], device=self.device).cumsum(0)
        tokens = torch.from_numpy(np.concatenate(prompts)).long().to(self.device)
        room = max(len(p) for p in prompts) + self.limit
        output, cache = self.model.prefill(tokens, torch.nn.functional.pad(ends, (1, 0)), room)
        fork = torch.tensor([g for g, members in enumerate(groups) for _ in members], device=self.device)
        ids = np.split(output.experts.to(torch.int16).cpu().numpy(), ends[:-1].cpu().numpy())
        return output.hidden[ends - 1][fork], cache.select(fork), [ids[g] for g in fork.tolist()]

    def step(self, temperature: float, seed: int, end_ids: tuple[int, ...]) -> None:
        """Samples a token of every running request, drops those that end with it, and feeds the others'."""
        position = self.cache.length
        tokens, logprobs = sample(self.logits, temperature, seed, self.ids[self.rows], position)
        rows = self.rows.cpu().numpy()
        at = self.lengths[rows]
        self.tokens[rows, at] = tokens.cpu().numpy()
        self.logprobs[rows, at] = logprobs.cpu().numpy()
        self.lengths[rows] += 1
        ended = torch.isin(tokens, torch.tensor(end_ids, device=self.device))
        alive = ~ended & torch.from_numpy(self.lengths[rows] < self.limit).to(self.device)
        keep = alive.nonzero().squeeze(1)
        self.rows = self.rows[keep]
        if keep.numel() == 0:
            return
        if keep.numel() < alive.numel():
            self.cache = self.cache.select(keep)
        output = self.model.decode(tokens[keep], self.cache)
        kept = keep.cpu().numpy()
        self.experts[rows[kept], at[kept]] = output.experts.cpu().numpy()
        self.logits = self.model.logits(output.hidden)

    def trajectories(self, version: int, end_ids: tuple[int, ...]) -> list[Trajectory]:
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
                    finish="stop" if ids[-1] in end_ids else "length",
                    text="",
                )
            )
        return results
