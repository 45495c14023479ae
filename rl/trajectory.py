"""The record that passes between rollout, reward, learner and distiller. Nothing re-tokenizes what a model wrote."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..rewards.problem import Problem, Score
from .packing import Row


@dataclass
class Request:
    """One response to sample. `id` is its counter: with the seed and the position it decides the noise.

    Requests of equal `group` have equal prompts; the prompt is computed once for all of them.
    """

    id: int
    group: int
    prompt_ids: np.ndarray  # int32 [P]


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
    finish: Literal["stop", "length"]
    text: str  # the response without its end token
    domain: str = ""
    mode: str = "chat"
    problem: Problem | None = None
    score: Score | None = None
    drafted: int = 0  # tokens that the MTP block proposed, and how many of them were the sampler's own
    accepted: int = 0

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def row(self) -> Row:
        """tokens [P + R], and 1.0 in "response" [P + R] for the tokens that the model wrote."""
        response = np.zeros(len(self), dtype=np.float32)
        response[len(self.prompt_ids) :] = 1.0
        return {"tokens": np.concatenate([self.prompt_ids, self.response_ids]), "response": response}
