"""Draft and verify: the responses, log-probs and recorded experts are those without drafts, whatever the drafts are."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from amalgam.model import DeepseekV4
from amalgam.model.mtp import mtp_hidden
from amalgam.rl.draft import DraftedBatch
from amalgam.rl.engine import Engine
from amalgam.rl.response import Response
from amalgam.rl.settings import Draft, EngineSettings
from amalgam.rl.trajectory import Trajectory

from .. import tiny
from .test_engine import PAGE, Rush, assert_same, ragged, small

VOCABULARY, LIMIT = 40, 30
Propose = Callable[[DraftedBatch, torch.Tensor, torch.Tensor, list[Response], list[int]], torch.Tensor]


@pytest.fixture(scope="module")
def model() -> DeepseekV4:
    return tiny.model(0, vocab_size=VOCABULARY, num_nextn_predict_layers=1)


def engine(model: DeepseekV4, draft: Draft, **settings) -> Engine:
    return Engine(model, (tiny.END,), settings=EngineSettings(draft=draft, context=112, **settings), page=PAGE)


def generate(model: DeepseekV4, draft: Draft, temperature: float, limit: int = LIMIT, **settings) -> list[Trajectory]:
    return engine(model, draft, **settings).generate(ragged(temperature=temperature, max_new_tokens=limit), 3)


@pytest.mark.parametrize(
    ("temperature", "limit", "settings"),
    [(0.0, 30, {}), (1.0, 20, {"max_batch": 7, "prefill_tokens": 9}), (1.0, 2, {"max_batch": 2}), (0.7, 1, {})],
)
def test_the_blocks_drafts_change_nothing(model: DeepseekV4, temperature: float, limit: int, settings: dict):
    plain = generate(model, "off", temperature, limit)
    drafted = generate(model, "mtp", temperature, limit, **settings)
    assert_same(drafted, plain)
    assert all(t.drafted == t.accepted == 0 for t in plain)
    for t in drafted:
        # A step draws one token, and one more where the draft was right, unless the first ended the response. The
        # first token of a prompt of one comes without a draft.
        assert 0 <= t.accepted <= t.drafted
        assert t.drafted + t.accepted + (len(t.prompt_ids) == 1) - len(t.response_ids) in (0, 1)


def listen(made: Engine) -> dict[tuple[int, int], set[int]]:
    """The drafts that the engine's block will make, by request and position."""
    seen: dict[tuple[int, int], set[int]] = {}
    propose = made._batch.propose

    def spy(tokens, slots, responses: list[Response], positions: list[int]) -> torch.Tensor:
        draft = propose(tokens, slots, responses, positions)
        for response, position, token in zip(responses, positions, draft.tolist(), strict=True):
            seen.setdefault((response.request.id, position), set()).add(token)
        return draft

    made._batch.propose = spy
    return seen


@pytest.mark.parametrize("swap", [0, 2**20])
def test_nor_do_they_with_preemption_chunks_and_forks(model: DeepseekV4, swap: int):
    """What the block has seen is taken over by forks, goes to host memory and back, and is made again by prefill: it
    says the same."""
    wide = engine(model, "mtp", picks=True)
    tight = engine(model, "mtp", picks=True, memory=small(model, 6, 8), max_batch=6, prefill_tokens=11, swap=swap)
    tight._batch.seconds_per_byte = 0.0
    first, second = listen(wide), listen(tight)
    requests = ragged(max_new_tokens=LIMIT)
    plain = wide.generate(requests)
    assert_same(Rush(tight, requests, seed=swap).run(requests), plain)
    metrics = tight.metrics()
    assert metrics["preemptions"] > 5 and (metrics["swaps"] > 0) == (swap > 0)
    both = first.keys() & second.keys()
    assert len(both) > 100 and all(first[key] == second[key] for key in both)


def replaced(monkeypatch: pytest.MonkeyPatch, by: Propose) -> None:
    """`by` proposes, after the block has."""
    propose = DraftedBatch.propose

    def other(batch: DraftedBatch, *arguments) -> torch.Tensor:
        propose(batch, *arguments)
        return by(batch, *arguments)

    monkeypatch.setattr(DraftedBatch, "propose", other)


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
def test_no_drafts_change_anything(model: DeepseekV4, monkeypatch, right: float):
    """Drafts that are right for a given share of tokens; requests end at different steps, on drafts too."""
    plain = generate(model, "off", 1.0)
    assert len({len(t.response_ids) for t in plain}) > 4 and {t.finish for t in plain} == {"stop", "length"}
    answers = {t.request: np.concatenate([t.prompt_ids, t.response_ids]).tolist() for t in plain}
    coin = np.random.default_rng(0)

    def drafts(batch, tokens, slots, responses, positions) -> torch.Tensor:
        said = [answers[r.request.id][position] for r, position in zip(responses, positions, strict=True)]
        return torch.tensor([token if coin.random() < right else (token + 1) % VOCABULARY for token in said])

    replaced(monkeypatch, drafts)
    drafted = generate(model, "mtp", 1.0)
    assert_same(drafted, plain)
    share = sum(t.accepted for t in drafted) / sum(t.drafted for t in drafted)
    assert abs(share - right) < 0.1


@torch.no_grad()
def test_drafts_are_the_blocks_own(model: DeepseekV4, monkeypatch):
    """Greedy: each is the most likely token after next, by the packed block over the finished trajectory."""
    seen: dict[tuple[int, int], int] = {}
    propose = DraftedBatch.propose

    def spy(batch: DraftedBatch, tokens, slots, responses, positions) -> torch.Tensor:
        draft = propose(batch, tokens, slots, responses, positions)
        where = zip([r.request.id for r in responses], positions, strict=True)
        seen.update(zip(where, draft.tolist(), strict=True))
        return draft

    monkeypatch.setattr(DraftedBatch, "propose", spy)
    found = {t.request: t for t in generate(model, "mtp", 0.0, prefill_tokens=7)}
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
def test_a_draft_shares_the_noise_of_its_token(model: DeepseekV4, monkeypatch):
    """A block that gives the model's own distribution is always right, at any temperature."""

    def clairvoyant(batch: DraftedBatch, tokens, slots, responses, positions) -> torch.Tensor:
        hidden = batch.model.decode(tokens, batch.cache.select(slots)).hidden
        return batch.draw(hidden, responses, positions).tokens

    replaced(monkeypatch, clairvoyant)
    found = generate(model, "mtp", 1.0)
    assert sum(t.accepted for t in found) == sum(t.drafted for t in found) > 50


def test_a_model_without_the_block_is_refused():
    with pytest.raises(ValueError, match="no MTP block: num_nextn_predict_layers is 0"):
        engine(tiny.model(0, vocab_size=VOCABULARY), "mtp")
