"""Supervised fine-tuning: next-token loss on what the assistant writes, packed, to the lowest held-out loss.

A fixed set of demonstrations per domain; after each epoch the loss on other, held-out demonstrations decides whether
the model is the best so far. The checkpoint is the best epoch's.
"""

import shutil
import time
from typing import Any

import numpy as np
from torch import Tensor

from ..model.checkpoint import replace_folder
from ..model.mtp import mtp_logprobs
from ..rl.learner import Learner
from ..rl.packing import Row
from ..rl.training_graph import recordable
from .recipe import Pretrain, Sft
from .stage import StageRun, speaker


def nll(logprobs: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """-sum of weight * logprobs, both fp32 [T]; metrics "loss" (the same) and "tokens" (how many have a weight)."""
    loss = -(weight * logprobs).sum()
    return loss, {"loss": loss, "tokens": (weight > 0).sum()}


@recordable
def loss(
    model: Any,
    batch: dict[str, Tensor],
    shared: dict[str, Tensor],
    *,
    mtp_weight: float = 0.0,
    mtp_into_backbone: bool = True,
    indexer_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`nll` on a packed batch of `weighted` rows, plus `mtp_weight` times the MTP block's ("mtp_loss") and
    `indexer_weight` times the indexers' ("indexer_loss"), where above 0.

    The block foresees the token after the next: a document's first two tokens are not among its targets, and the sum is
    divided by the same number of tokens as the main one, as in V3 (2.2).
    """
    tokens, cu_seqlens, weight = batch["tokens"], batch["cu_seqlens"], batch["weight"]
    output = model(tokens, cu_seqlens, index_loss=indexer_weight > 0)
    value, metrics = nll(model.logprobs_of(output, tokens, cu_seqlens), weight)
    if mtp_weight:
        ahead, _ = nll(mtp_logprobs(model, output.streams, tokens, cu_seqlens, into_backbone=mtp_into_backbone), weight)
        value, metrics["mtp_loss"] = value + mtp_weight * ahead, ahead
    if indexer_weight:
        metrics["indexer_loss"] = (weight * output.index_kl).sum()
        value = value + indexer_weight * metrics["indexer_loss"]
    return value, metrics


def weighted(rows: list[Row]) -> list[Row]:
    """Rows {"tokens", "trained"} with "weight": the loss is the mean over all trained tokens of these rows."""
    total = np.float32(sum(row["trained"].sum() for row in rows))
    return [{"tokens": row["tokens"], "weight": row["trained"] / total} for row in rows]


def loss_settings(settings: Sft | Pretrain) -> dict[str, Any]:
    """`loss`'s keywords."""
    mtp = settings.mtp
    return {
        "mtp_weight": mtp.weight, "mtp_into_backbone": mtp.into_backbone, "indexer_weight": settings.indexer.weight,
    }  # fmt: skip


def rate(rows: list[Row], began: float) -> float:
    """Trained tokens a second of a step on `rows` that began at that monotonic time; prompts have no loss."""
    return float(sum(row["trained"].sum() for row in rows)) / (time.monotonic() - began)


def shown(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[name] for name in ("loss", "tokens_per_second")}


def sft(stage: StageRun, settings: Sft) -> None:
    train, held_out = demonstrations(stage, settings)
    per_epoch = -(-len(train) // settings.batch_size)
    facts = stage.facts = stage.facts or {"best": float("inf"), "best_epoch": 0}
    model, terms = stage.run.model(settings.from_), loss_settings(settings)
    unfreeze = (*settings.mtp.unfreeze, *settings.indexer.unfreeze)
    with stage.learner(model, settings.optimizer, unfreeze=unfreeze) as learner:
        while stage.step < stage.steps and stage.step // per_epoch - facts["best_epoch"] < settings.patience:
            epoch, place = divmod(stage.step, per_epoch)
            order = np.random.default_rng([stage.run.seed(stage.name), epoch]).permutation(len(train))
            began = time.monotonic()
            rows = [train[i] for i in order[place * settings.batch_size :][: settings.batch_size]]
            metrics = learner.step(weighted(rows), "pipelines.sft:loss", **terms)
            metrics["tokens_per_second"] = rate(rows, began)
            if place + 1 == per_epoch:
                metrics["held_out_loss"] = keep_best(stage, learner, held_out, epoch + 1)
            stage.commit(learner, metrics, shown(metrics) | {"held-out": facts["best"]})
    beside = stage.folder / ".checkpoint"
    shutil.rmtree(beside, ignore_errors=True)  # half a copy, where a run was cut off here
    shutil.copytree(stage.folder / "best", beside)
    replace_folder(beside, stage.folder / "checkpoint")
    stage.finish(f"held-out loss {facts['best']:.4f} after epoch {facts['best_epoch']}", scratch=("best",))


def demonstrations(stage: StageRun, settings: Sft) -> tuple[list[Row], list[Row]]:
    """The training rows and the held-out rows of the stage's domains."""
    encoding, tokenizer = speaker(stage.run, settings.from_)
    train: list[Row] = []
    held_out: list[Row] = []
    for name in settings.domains:
        domain = stage.run.domains[name]
        for rows, problems in (
            (train, domain.problems("demonstrations", 0, domain.demonstrations)),
            (held_out, domain.problems("validation", 0, settings.validation)),
        ):
            for problem in problems:
                answer = {"role": "assistant", "content": domain.demonstration(problem)}
                ids, trained = encoding.ids(tokenizer, [*domain.messages(problem), answer], domain.mode)
                rows.append({"tokens": np.array(ids, np.int32), "trained": np.array(trained, np.float32)})
    return train, held_out


def keep_best(stage: StageRun, learner: Learner, held_out: list[Row], epoch: int) -> float:
    """The held-out next-token loss; saves the model if it is the lowest so far."""
    value = learner.evaluate(weighted(held_out), "pipelines.sft:loss")["loss"]
    if value < stage.facts["best"]:
        learner.save_model(stage.folder / "best")
        stage.facts.update(best=value, best_epoch=epoch)
    return value
