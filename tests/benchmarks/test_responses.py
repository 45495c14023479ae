"""The benchmark of responses in peace and in trouble: what it compares, and that it sees what is wrong."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from amalgam.rl.journal import recover

from .. import tiny

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def responses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import responses  # pyright: ignore[reportMissingImports]

    return responses


def measured(responses, count: int = 24):
    model = tiny.model(0)
    text = np.random.default_rng(0).integers(2, 512, 1000)
    requests = responses.random_requests(count, text, 60, 30, seed=0)
    page = 28
    return responses.measure(model, requests, responses.small(model, 8, 6, page), exact=False, page=page)


def test_trouble_changes_nothing(responses):
    found, counts = measured(responses)
    assert all(responses.holds(each, exact=False) for each in found.values())
    assert found["in trouble"].tokens > 100 and found["in trouble"].requests == 24
    assert counts["deaths"] == 2 and counts["forks"] > 0 and counts["taken up"] > 0


def test_a_token_that_the_journal_loses_shows(responses, monkeypatch: pytest.MonkeyPatch):
    """Of each request that was taken up the first token is another."""

    def wrong(folder: Path):
        found = recover(folder)
        for i, request in enumerate(found):
            if request.past is not None and len(request.past.response_ids):
                ids = request.past.response_ids.copy()
                ids[0] = 511 - ids[0]
                found[i] = replace(request, past=replace(request.past, response_ids=ids))
        return found

    monkeypatch.setattr(responses, "recover", wrong)
    found, counts = measured(responses)
    assert counts["tokens taken up"] > 0
    assert not responses.holds(found["in trouble"], exact=False)
    assert responses.holds(found["the learner's forward"], exact=False)
