"""The record that passes between rollout, reward, learner and distiller. Nothing re-tokenizes what a model wrote."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..rewards.problem import Problem, Score
from .packing import Row

Finish = Literal["stop", "length", "cancelled", "failed"]


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are drawn, and when it ends. A token's log-prob is that of the distribution it was drawn
    from: softmax(logits / temperature) over the tokens that `top_k`, `top_p`, `min_p` and `allowed` leave.
    """

    temperature: float = 1.0  # 0: greedy, log-probs at temperature 1
    max_new_tokens: int = 1024
    seed: int = 0
    top_k: int = 0  # the most likely tokens that stay; 0: all
    top_p: float = 1.0  # the fewest most likely tokens whose probabilities reach this stay
    min_p: float = 0.0  # tokens stay that have at least this share of the most likely one's probability
    stop: tuple[str, ...] = ()  # texts that end the response; the one found is not part of `text`
    stop_ids: tuple[int, ...] = ()  # tokens that do, beside the model's own end tokens
    allowed: np.ndarray | None = None  # bool [V]: the tokens that may be drawn


@dataclass(frozen=True, eq=False)
class Past:
    """What a request that was interrupted has got so far: R tokens, which are never drawn again."""

    response_ids: np.ndarray  # int32 [R]
    logprobs: np.ndarray  # float32 [R]
    versions: np.ndarray  # int32 [R]
    experts: np.ndarray | None = None  # int16 [R, L, k], -1 in rows that are not known
    picks: np.ndarray | None = None  # int32 [R, CSA layers, topk]
    sets: "list[np.ndarray] | None" = None  # R of int32 [n]


@dataclass
class Request:
    """One response to sample. `id` names it; its counter, with the seed and the position, decides the noise.

    Requests of equal `group` have equal prompts; the prompt is computed once for all of them.
    """

    id: int
    group: int
    prompt_ids: np.ndarray  # int32 [P]
    params: SamplingParams = SamplingParams()
    past: Past | None = None
    noise: int | None = None  # its counter, where that is not `id`: then tokens do not depend on the name either

    @property
    def counter(self) -> int:
        return self.id if self.noise is None else self.noise


@dataclass
class Trajectory:
    """A prompt and the response sampled for it (P and R tokens), with what its sampling decided and recorded.

    Rows of `experts` hold -1 where the sampler never fed the token: the last one of each trajectory.
    """

    request: int
    group: int
    prompt_ids: np.ndarray  # int32 [P]
    response_ids: np.ndarray  # int32 [R], with the end token if finish is "stop"
    logprobs: np.ndarray  # float32 [R], of each response token under the sampler
    experts: np.ndarray  # int16 [P + R, L, k], hash layers in their slots
    versions: np.ndarray  # int32 [R]: the policy's version that sampled each token
    finish: Finish
    text: str  # the response without its end token
    domain: str = ""
    mode: str = "chat"
    problem: Problem | None = None
    score: Score | None = None
    picks: np.ndarray | None = None  # int32 [P + R, CSA layers, topk]: indexers' picks, -1 behind the last; if recorded
    sets: "list[np.ndarray] | None" = None  # R of int32 [n]: the tokens that each was drawn from; if recorded
    error: str = ""  # why it failed
    drafted: int = 0  # tokens that the MTP block proposed, and how many of them were the sampler's own
    accepted: int = 0

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def row(self) -> Row:
        """tokens [P + R], and 1.0 in "response" [P + R] for the tokens that the model wrote."""
        response = np.zeros(len(self), dtype=np.float32)
        response[len(self.prompt_ids) :] = 1.0
        return {"tokens": np.concatenate([self.prompt_ids, self.response_ids]), "response": response}
