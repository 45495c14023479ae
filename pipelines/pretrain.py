"""Next-token training of a new base model on the procedural corpus of pipelines/corpus.py; the checkpoint is bf16.

Left out: the sequence-wise balance loss, a schedule of sequence lengths.
"""

import time
from functools import lru_cache

import numpy as np
import torch

from ..errors import UserError
from ..model import initialize
from ..model.checkpoint import cast, load, save
from ..model.config import config_of, resolve
from ..model.tokenizer import load as load_tokenizer
from ..rl.packing import Row
from .corpus import build_corpus, load_corpus, save_corpus
from .recipe import Pretrain
from .sft import loss_settings, rate, shown, weighted
from .stage import StageRun


def pretrain(stage: StageRun, settings: Pretrain) -> None:
    start = stage.folder / "start"
    if stage.step == 0:
        model = initialize(config_of(settings.init), stage.run.seed(stage.name) % 2**32)
        model.origin = resolve(settings.init)
        save(model, start)
    tokens, borders = corpus(stage, settings)
    unfreeze = (*settings.mtp.unfreeze, *settings.indexer.unfreeze)
    with stage.learner(start, settings.optimizer, unfreeze=unfreeze) as learner:
        while stage.step < stage.steps:
            began = time.monotonic()
            rows = batch(stage, settings, tokens, borders)
            metrics = learner.step(weighted(rows), "pipelines.sft:loss", **loss_settings(settings))
            metrics["tokens_per_second"] = rate(rows, began)
            stage.commit(learner, metrics, shown(metrics))
        learner.save_model(stage.folder / "trained")
    save(cast(load(stage.folder / "trained"), torch.bfloat16), stage.folder / "checkpoint")
    stage.finish(f"loss {stage.facts['metrics']['loss']:.4f}", scratch=("start", "trained"))


def corpus(stage: StageRun, settings: Pretrain) -> tuple[np.ndarray, np.ndarray]:
    """Packed tokens and the documents' borders: the recipe's file, or one made without any held-out question."""
    if settings.corpus is not None:
        return load_corpus(settings.corpus)
    file = stage.folder / "corpus.safetensors"
    if not file.exists():
        heldout = {p.question for d in stage.run.domains.values() for p in d.problems("heldout", 0, d.heldout)}
        tokenizer = load_tokenizer(resolve(settings.init))
        built = build_corpus(
            tokenizer, stage.run.recipe.seed, settings.documents, heldout,
            check=lambda: stage.run.check(f"the corpus of {stage.name}"),
        )  # fmt: skip
        save_corpus(file, *built)
    return load_corpus(file)


def batch(stage: StageRun, settings: Pretrain, tokens: np.ndarray, borders: np.ndarray) -> list[Row]:
    """The documents of the stage's next step: `batch_tokens` tokens on average, shuffled anew in each epoch."""
    count = len(borders) - 1
    lengths = np.minimum(np.diff(borders), settings.document_tokens)
    per_step = max(1, round(settings.batch_tokens / float(lengths.mean())))
    if per_step > count:
        raise UserError(f"stages.{stage.name}.batch_tokens: {settings.batch_tokens} is more than the corpus has")
    epoch, place = divmod(stage.step, count // per_step)
    order = shuffled(stage.run.seed(stage.name), epoch, count)
    rows = []
    for i in order[place * per_step : (place + 1) * per_step]:
        ids = tokens[borders[i] : borders[i] + lengths[i]].astype(np.int32)
        trained = np.ones(len(ids), dtype=np.float32)
        trained[0] = 0.0  # nothing precedes the first token
        rows.append({"tokens": ids, "trained": trained})
    return rows


@lru_cache(maxsize=1)  # an epoch's, which every step of it asks for
def shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    """The numbers below `count` in an order that seed and epoch alone decide."""
    return np.random.default_rng([seed, epoch]).permutation(count)
