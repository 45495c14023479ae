"""What an engine tells its journal, where a model or a setting has nothing to record of a token."""

from pathlib import Path

import numpy as np

from amalgam.rl.journal import Journal, recover
from amalgam.rl.records import Records
from amalgam.rl.response import Decisions
from amalgam.rl.trajectory import Request


def test_of_a_model_without_experts_the_tokens_are_journaled_alone(tmp_path: Path):
    records = Records(Journal(tmp_path, "tokens"))
    records.begin(Request(5, 0, np.arange(3, dtype=np.int32)))
    for step in range(4):
        records.draw(5, 7 + step, -0.5, 2, None)
        if step:
            records.feed([5], Decisions(np.zeros((1, 0, 0), np.int16)))
        records.flush()
    (found,) = recover(tmp_path)
    assert found.past is not None
    assert found.past.response_ids.tolist() == [7, 8, 9, 10]
    assert found.past.experts is None and found.past.picks is None
    assert not records.lost


def test_a_step_that_draws_nothing_has_no_sets(tmp_path: Path):
    """As one that prefills what a request was before."""
    records = Records(Journal(tmp_path, "tokens", experts=(2, 1), sets=True), sets=True)
    records.begin(Request(5, 0, np.arange(3, dtype=np.int32)))
    records.draw(5, 7, -0.5, 2, np.array([7, 9], np.int32))
    records.flush()
    records.feed([5], Decisions(np.full((1, 2, 1), 3, np.int16)))
    records.flush()
    (found,) = recover(tmp_path)
    assert found.past is not None and found.past.sets is not None and found.past.experts is not None
    assert found.past.sets[0].tolist() == [7, 9] and found.past.experts.tolist() == [[[3], [3]]]
