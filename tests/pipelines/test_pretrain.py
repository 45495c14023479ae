"""Pretraining: its batches, and a whole stage, stopped in its corpus and in its steps, to the same model."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from amalgam.errors import UserError
from amalgam.pipelines import corpus
from amalgam.pipelines.console import Console
from amalgam.pipelines.pretrain import batch
from amalgam.pipelines.recipe import load_recipe
from amalgam.pipelines.run import _checked, _run_stage
from amalgam.pipelines.stage import Interrupted, Run, StageRun
from amalgam.pipelines.tracking import Tracker
from amalgam.rl.learner import Learner
from amalgam.rl.settings import Optimization

from .tiny_run import metrics, outcome

LENGTHS = [3, 9, 1, 5, 7, 2, 8, 4, 6, 5]  # 50 tokens, in all
RECIPE = """\
name: tiny-pretrain
domains: {numbers: {tasks: {chain_sum: {min_terms: 2, max_terms: 2}}}}
stages:
  new:
    kind: pretrain
    init: tiny
    steps: 3
    documents: 40
    batch_tokens: 300
    document_tokens: 32
    evaluate: false
    optimizer: {lr: 0.001, warmup_steps: 2}
evaluate: {problems: 4}
tracking: {wandb: "off"}
"""


def drawn(step: int, batch_tokens: int = 10, document_tokens: int = 100, seed: int = 5) -> list[dict[str, np.ndarray]]:
    stage: Any = SimpleNamespace(name="base", step=step, run=SimpleNamespace(seed=lambda _: seed))
    settings: Any = SimpleNamespace(batch_tokens=batch_tokens, document_tokens=document_tokens)
    borders = np.cumsum([0, *LENGTHS], dtype=np.int64)
    return batch(stage, settings, np.arange(borders[-1], dtype=np.uint16), borders)


def first_tokens(steps: range, **settings: int) -> list[int]:
    """They tell the documents apart."""
    return [int(row["tokens"][0]) for step in steps for row in drawn(step, **settings)]


def test_an_epoch_holds_every_document_once_in_an_order_of_its_own():
    """50 tokens in 10 documents: two documents a step of 10 tokens, five steps an epoch."""
    epochs = [first_tokens(range(start, start + 5)) for start in (0, 5, 10)]
    starts = np.cumsum([0, *LENGTHS[:-1]]).tolist()
    assert [sorted(epoch) for epoch in epochs] == [starts] * 3
    assert starts != epochs[0] != epochs[1] != epochs[2]
    assert all(len(drawn(step)) == 2 for step in range(15))


def test_a_batch_depends_on_seed_and_step_alone():
    assert first_tokens(range(7, 12)) == first_tokens(range(12))[14:]
    assert first_tokens(range(5), seed=6) != first_tokens(range(5))


def test_documents_are_cut_and_their_first_tokens_not_trained_on():
    """Cut documents are shorter, so that a step takes more of them."""
    rows = drawn(0, batch_tokens=40, document_tokens=5)
    assert sorted(len(row["tokens"]) for row in rows) == [1, 2, 3, 4, 5, 5, 5, 5, 5, 5]
    for row in rows:
        assert row["tokens"].dtype == np.int32
        assert np.diff(row["tokens"]).tolist() == [1] * (len(row["tokens"]) - 1)
        assert row["trained"].tolist() == [0.0] + [1.0] * (len(row["tokens"]) - 1)


def test_more_tokens_a_step_than_there_are_is_refused():
    assert len(drawn(0, batch_tokens=50)) == 10
    with pytest.raises(UserError, match=r"^stages\.base\.batch_tokens: 60 is more than the corpus has$"):
        drawn(0, batch_tokens=60)


@contextmanager
def one_learner() -> Iterator[Any]:
    """A fleet that lends its only learner again after an interruption too, which saves its processes' start."""
    made: list[Learner] = []

    @contextmanager
    def learner(path: Path, optimization: Optimization, total_steps: int, unfreeze: tuple) -> Iterator[Learner]:
        if made:
            made[0].load(path, optimization, total_steps, unfreeze)
        else:
            made.append(ends.enter_context(Learner(optimization, total_steps, path, unfreeze)))
        yield made[0]

    with ExitStack() as ends:
        yield SimpleNamespace(learner=learner)


def test_a_stage_that_was_stopped_twice_ends_with_the_same_model(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In its corpus, which is begun again, and after its second step, from which it goes on."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    recipe = load_recipe(str(tmp_path / "r.yaml"))

    def run(name: str) -> Run:
        return Run(recipe, tmp_path / name, fleet, Tracker(tmp_path / name, name, "off", ""), console, domains)

    def commit(self: StageRun, *arguments) -> None:
        if self.run is stopped and self.step + 1 == 2:
            self.run.stop.set()
        original(self, *arguments)

    def in_threads(count: int, _, start, shared: tuple[Any]) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(count, initializer=start, initargs=shared)

    domains, original = _checked(recipe), StageRun.commit
    monkeypatch.setattr(corpus, "ProcessPoolExecutor", in_threads)  # test_corpus.py has processes
    monkeypatch.setattr(StageRun, "commit", commit)
    with one_learner() as fleet, Console() as console:
        whole, stopped = run("whole"), run("stopped")
        _run_stage(whole, "new")
        stopped.stop.set()
        with pytest.raises(Interrupted, match="the corpus of new"):
            _run_stage(stopped, "new")
        assert not (stopped.folder / "stages/new/corpus.safetensors").exists()
        stopped.stop.clear()
        with pytest.raises(Interrupted, match="new step 2"):
            _run_stage(stopped, "new")
        stopped.stop.clear()
        _run_stage(stopped, "new")
    assert [row["step"] for row in metrics(whole.folder)["new"]] == [1, 2, 3]
    folder = whole.folder / "stages" / "new"
    assert {f.name for f in folder.iterdir()} == {"checkpoint", "corpus.safetensors", "done.json", "progress.json"}
    assert load_file(folder / "checkpoint" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert len(corpus.load_corpus(folder / "corpus.safetensors")[1]) == 41
    for each in (whole, stopped):
        (each.folder / "results.json").write_text("")  # which a whole run would have, for `outcome`
    assert outcome(stopped.folder) == outcome(whole.folder)
