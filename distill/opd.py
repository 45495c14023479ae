"""On-policy distillation: reverse KL to the domain's teacher, over the whole vocabulary, on the student's own samples.

Source: paper 5.1, eq. 29. Our choices: a plain mean over all response tokens of the step, teachers weighted alike.
"""

import numpy as np
from torch import Tensor

from ..kernels.losses import divergence
from ..model.language_model import LanguageModel
from ..rl.packing import Row
from ..rl.training_graph import recordable
from ..rl.trajectory import Trajectory


def rows(trajectories: list[Trajectory], teacher_hidden: list[np.ndarray], teacher: list[int]) -> list[Row]:
    """A learner's row for each trajectory: which teacher it has, and that teacher's hidden states fp32 [P + R, d'].

    Teachers may differ in width d': zeros fill the narrower ones up, so that rows pack.
    """
    total = sum(len(t.response_ids) for t in trajectories)
    width = max(hidden.shape[1] for hidden in teacher_hidden)
    result = []
    for trajectory, hidden, index in zip(trajectories, teacher_hidden, teacher, strict=True):
        row = trajectory.row()
        row["weight"] = row.pop("response") / np.float32(total)
        row["teacher"] = np.full(len(trajectory), index, dtype=np.int64)
        row["teacher_hidden"] = np.pad(hidden, ((0, 0), (0, width - hidden.shape[1])))
        result.append(row)
    return result


def distillation_loss(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher: Tensor, heads: dict[int, Tensor], weight: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum of weight * KL(student || teacher) over tokens; hidden states [T, .] are those that predict each token.

    `teacher` [T] says whose `heads` entry [V, d'] turns a token's teacher_hidden (its first d' numbers) into logits.
    Metrics: "loss", the weighted sum.
    """
    taught = teacher.masked_fill(weight == 0, -1)  # a prompt has no teacher
    total = (weight * divergence(hidden, head, teacher_hidden, heads, taught)).sum()
    return total, {"loss": total}


@recordable
def loss(
    model: LanguageModel, batch: dict[str, Tensor], shared: dict[str, Tensor], *, indexer_weight: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """`distillation_loss` on a packed batch of `rows`, plus `indexer_weight` times the indexers' ("indexer_loss"), if
    above 0; shared["head.I"] (`Learner.share`) is teacher I's head."""
    output = model(batch["tokens"], batch["cu_seqlens"], index_loss=indexer_weight > 0)
    heads = {int(name.removeprefix("head.")): head for name, head in shared.items()}
    # A token's distribution comes from the state before it; a document's first token has weight 0.
    fields = (batch["teacher_hidden"][:-1], batch["teacher"][1:], heads, batch["weight"][1:])
    value, metrics = distillation_loss(output.hidden[:-1], model.lm_head.weight, *fields)
    if indexer_weight:
        metrics["indexer_loss"] = (batch["weight"] * output.index_kl).sum()
        value = value + indexer_weight * metrics["indexer_loss"]
    return value, metrics
