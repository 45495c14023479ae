"""The settings of optimization, of losses beside the main one, and of sampling: the one place for their defaults.

No torch is imported.
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Strict

from ..settings import Settings

DEADLINE = 1800.0
"""Seconds that one call of an actor may take, unless the recipe says otherwise."""

Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimization(Settings):
    """AdamW or Muon under DeepSpeed, as the learner runs it.

    DeepSeek publishes no optimizer settings of V4's post-training. These are our choice, near what open runs
    of V4 use; each kind of stage has its own default for `lr`.
    """

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` takes the steps of V4's pretraining for matrices (model/matrices.py) and AdamW's for all else."""
    lr: PositiveFloat
    """Peak learning rate. Muon's updates are as large as AdamW's."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps in which the rate rises linearly from 0 to `lr`."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the rate from the end of the warm-up to the stage's last step."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Where a linear or cosine decay ends, as a share of `lr`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; norms, biases (the compressors' too) and other vectors are left out."""
    betas: Annotated[tuple[Beta, Beta], Strict(False)] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moment."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    momentum: Beta = 0.95
    """Muon's momentum. V4's pretraining has 0.95, and a weight decay of 0.1."""
    gradient_clipping: PositiveFloat = 1.0
    """Largest global L2 norm of a step's gradient; a larger one is scaled down to it."""
    balance_speed: float = Field(default=0.0, ge=0)
    """How far the routers' correction biases move a step towards level loads (V4's pretraining: 0.001); 0: not."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: 1 shards the optimizer's state over the ranks, 2 also gradients, 3 also parameters, which
    then are fp32."""
    ranks: PositiveInt = 1
    """Learner processes, data parallel. They change the memory and the time of a step, never its gradient."""
    micro_batch_tokens: PositiveInt = 4096
    """Most tokens in one packed forward and backward of a rank; a step takes as many of them as it needs."""

    @property
    def keeps_shards(self) -> bool:
        """Whether a rank has parts of the weights alone."""
        return self.zero_stage == 3 and self.ranks > 1

    def problem(self, dtype: str) -> str | None:
        """Why a model that computes in that dtype cannot be trained so; None where it can."""
        if self.keeps_shards and dtype != "float32":
            return f"3 shards float32 weights, and precision.compute is {dtype}; give 2, or precision.compute: float32"
        return None


class MtpLoss(Settings):
    """The loss of the multi-token-prediction block, which foresees the token after the next."""

    weight: NonNegativeFloat = 0.0
    """Weight of its loss beside the next-token loss; 0 leaves the block as it is. V4's pre-training has 0.3, and 0.1
    from the start of the learning rate's decay."""
    into_backbone: bool = True
    """Whether its gradient goes on into the model, embedding and head included, as in V3; else the block alone learns.
    """

    @property
    def unfreeze(self) -> tuple[str, ...]:
        """`Learner.load`'s."""
        return ("mtp",) if self.weight else ()


class IndexerLoss(Settings):
    """The loss of CSA's lightning indexers: how far their scores are from where attention looks (kernels/indexer.py).

    It is summed over tokens with the weights of the stage's main loss.
    """

    weight: NonNegativeFloat = 0.0
    """Weight of the loss beside the main one; 0 leaves the indexers as they are. It trains them alone. Their gradient
    has its part in the norm that is clipped. DeepSeek-V3.2 trains so to the end and gives no weight, V4 is silent."""

    @property
    def unfreeze(self) -> tuple[str, ...]:
        """`Learner.load`'s."""
        return ("indexer",) if self.weight else ()


Draft = Literal["off", "mtp"]
"""Who proposes tokens to the sampler, which then may draw two at a step."""


class Sampling(Settings):
    """How a rollout worker samples."""

    temperature: PositiveFloat = 1.0
    """Divides the logits before the softmax. 1.0 as in DeepSeek-R1's first stage."""
    max_new_tokens: PositiveInt = 1024
    """Longest response in tokens, its end token included; a longer one is cut and counts as unfinished."""
    top_k: NonNegativeInt = 0
    """The most likely tokens that may be drawn; 0: all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Only the fewest most likely tokens whose probabilities sum up to this may be drawn."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Only tokens with at least this share of the most likely one's probability may be drawn."""
    draft: Draft = "off"
    """`mtp` lets the model's MTP block propose a token at each step. It changes the speed, never the responses."""


class EngineRoom(Settings):
    """What a rollout engine has room for. Nothing here changes a response."""

    max_batch: PositiveInt = 256
    """Requests that decode at once; the others wait."""
    prefill_tokens: PositiveInt = 8192
    """Most tokens of prompts that a step computes beside the requests that decode."""
    memory: PositiveInt | None = None
    """Bytes of the cache; None: on a GPU four fifths of what is free beside the weights, on a CPU 256 MiB (our choice).
    No more is taken than `max_batch` requests of `context` tokens need."""
    context: PositiveInt | None = None
    """Most tokens of a request, prompt and response; None: as many as the model is made for, or `memory` has room for.
    """
    swap: NonNegativeInt = 2**30
    """Bytes of host memory for what is taken up again later: requests that gave way, prompts of groups."""


class EngineSettings(EngineRoom):
    """And how it goes on, and what it writes down, which changes no response either."""

    draft: Draft = "off"
    """As `Sampling.draft`."""
    experts: bool = True
    """Write down the experts of every token."""
    picks: bool = False
    """Write down what V4's indexers chose for every token."""
    sets: bool = False
    """Write down which tokens each was drawn from: those that top_k, top_p, min_p and masks left."""
