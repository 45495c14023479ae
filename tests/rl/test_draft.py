"""Draft and verify: the responses, log-probs and recorded experts are those without drafts, whatever the drafts are."""

import numpy as np
import pytest
import torch

from amalgam.model import DeepseekV4
from amalgam.model.mtp import mtp_hidden
from amalgam.rl.draft import DraftedBatch
from amalgam.rl.engine import Engine
from amalgam.rl.settings import Draft
from amalgam.rl.trajectory import Trajectory

from .. import tiny
from .test_engine import assert_same, ragged

VOCABULARY, LIMIT, SEED = 40, 30, 11


@pytest.fixture(scope="module")
def model() -> DeepseekV4:
    return tiny.model(0, vocab_size=VOCABULARY, num_nextn_predict_layers=1)


def generate(
    model: DeepseekV4, draft: Draft, temperature: float, max_batch: int = 512, limit: int = LIMIT
) -> list[Trajectory]:
    engine = Engine(model, (tiny.END,), max_batch)
    return engine.generate(ragged(), temperature=temperature, max_new_tokens=limit, seed=SEED, version=3, draft=draft)


@pytest.mark.parametrize(
    ("temperature", "max_batch", "limit"), [(0.0, 512, 30), (1.0, 7, 20), (1.0, 512, 2), (0.7, 512, 1)]
)
def test_the_blocks_drafts_change_nothing(model: DeepseekV4, temperature: float, max_batch: int, limit: int):
    plain = generate(model, "off", temperature, max_batch, limit)
    drafted = generate(model, "mtp", temperature, max_batch, limit)
    assert_same(drafted, plain)
    assert all(t.drafted == t.accepted == 0 for t in plain)
    for t in drafted:
        # Every step draws one token, and one more where the draft was right; the first to reach the end drafts nothing.
        assert 0 <= t.accepted <= t.drafted
        assert t.drafted + t.accepted in (len(t.response_ids) - 1, len(t.response_ids))


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
def test_no_drafts_change_anything(model: DeepseekV4, monkeypatch, right: float):
    """Drafts that are right for a given share of tokens; requests end at different steps, on drafts too."""
    plain = generate(model, "off", 1.0)
    assert len({len(t.response_ids) for t in plain}) > 4 and {t.finish for t in plain} == {"stop", "length"}
    answers = {t.request: np.concatenate([t.prompt_ids, t.response_ids]) for t in plain}
    coin, drawn = np.random.default_rng(0), DraftedBatch._draft

    def drafts(batch: DraftedBatch, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        drawn(batch, tokens, position)
        chosen = []
        for request, place in zip(batch.ids[batch.rows].tolist(), position.tolist(), strict=True):
            token = int(answers[request][place])
            chosen.append(token if coin.random() < right else (token + 1) % VOCABULARY)
        return torch.tensor(chosen)

    monkeypatch.setattr(DraftedBatch, "_draft", drafts)
    drafted = generate(model, "mtp", 1.0)
    assert_same(drafted, plain)
    share = sum(t.accepted for t in drafted) / sum(t.drafted for t in drafted)
    assert abs(share - right) < 0.1


@torch.no_grad()
def test_drafts_are_the_blocks_own(model: DeepseekV4, monkeypatch):
    """Greedy: each is the most likely token after next, by the packed block over the finished trajectory."""
    seen: dict[tuple[int, int], int] = {}
    drawn = DraftedBatch._draft

    def spy(batch: DraftedBatch, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        draft = drawn(batch, tokens, position)
        where = zip(batch.ids[batch.rows].tolist(), position.tolist(), strict=True)
        seen.update(zip(where, draft.tolist(), strict=True))
        return draft

    monkeypatch.setattr(DraftedBatch, "_draft", spy)
    found = {t.request: t for t in generate(model, "mtp", 0.0)}
    assert sum(t.accepted for t in found.values()) > 0
    for request, t in found.items():
        tokens = torch.from_numpy(t.row()["tokens"]).long()
        cu = torch.tensor([0, len(tokens)])
        hidden = mtp_hidden(model, model(tokens, cu).streams, model.model.embed_tokens(tokens.roll(-1)).squeeze(1), cu)
        best = model.logits(hidden).argmax(-1)
        mine = {place: draft for (r, place), draft in seen.items() if r == request}
        assert len(mine) == t.drafted
        assert mine == {place: int(best[place - 2]) for place in mine}


@torch.no_grad()
def test_a_draft_shares_the_noise_of_its_token(model: DeepseekV4):
    """A block that gives the model's own distribution is always right, at any temperature."""

    class Clairvoyant(DraftedBatch):
        def _draft(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            ahead = self.cache.select(torch.arange(tokens.numel()))
            return self.sample(self.model.logits(self.model.decode(tokens, ahead).hidden), position)[0]

    batch = Clairvoyant(model, ragged(), LIMIT, 1.0, SEED, (tiny.END,))
    while batch.running:
        batch.step()
    assert batch.accepted.sum() == batch.drafted.sum() > 50


def test_a_model_without_the_block_is_refused():
    with pytest.raises(ValueError, match="no MTP block: num_nextn_predict_layers is 0"):
        generate(tiny.model(0, vocab_size=VOCABULARY), "mtp", 1.0)
