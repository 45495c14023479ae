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
