"""An engine that gives its cache up and makes it anew."""

from pathlib import Path
from typing import Any

import pytest

from amalgam.rl.engine import Engine
from amalgam.rl.settings import EngineSettings

from .. import tiny
from .test_engine import PAGE, assert_same, ragged

VOCABULARY = 40


@pytest.mark.parametrize("settings", [{}, {"max_batch": 5}, {"draft": "mtp"}])
def test_a_cache_that_was_given_up_is_made_anew(settings: dict[str, Any], tmp_path: Path):
    """With the same tokens after it; counts go on."""
    model = tiny.model(0, vocab_size=VOCABULARY, num_nextn_predict_layers=1)
    plain = EngineSettings(context=112, **settings)
    lag = None if "draft" in settings else True
    ours = Engine(model, [tiny.END], settings=plain, snapshots=tmp_path, lag=lag, page=PAGE)
    requests, before, forks = ragged(), ours._batch.cache, 0.0
    expected = Engine(model, [tiny.END], settings=EngineSettings(context=112), page=PAGE).generate(requests, 3)
    for _ in range(2):
        assert_same(ours.generate(requests, 3), expected)
        last, forks = forks, ours.metrics()["forks"]
        assert forks > last
        ours.release()
        assert [ours._batch, ours._suspended] == [None, None]
        with pytest.raises(RuntimeError, match=f"^request {requests[0].id}: the engine has given up its cache"):
            ours.submit(requests[0])
        ours.update(lambda _: None, 3, cache="rebuild")
        ours.restore()
        assert ours._batch.cache is not before
        assert ours.metrics()["forks"] == forks
    ours.submit(requests[0])
    with pytest.raises(ValueError, match=r"^release\(\) while requests are under way"):
        ours.release()
