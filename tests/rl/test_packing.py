"""Properties of the packing plan over random documents, and what a packed batch looks like."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amalgam.rl.packing import collate, plan

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=60)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 100), st.integers(1, 4))
def test_plan_keeps_its_promises(lengths, max_tokens, ranks):
    result = plan(lengths, max_tokens, ranks)
    batches = [batch for own in result for batch in own]
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(result) == ranks
    assert len({len(own) for own in result}) == 1
    for own in result:
        assert all(own[: sum(map(bool, own))]), "empty micro-batches come last"
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= max_tokens
    assert result == plan(list(lengths), max_tokens, ranks)


@settings(deadline=None)
@given(LENGTHS, st.integers(60, 200), st.integers(2, 4))
def test_ranks_are_balanced(lengths, max_tokens, ranks):
    """As balanced as longest-first can promise: two ranks differ by no more than the longest document."""
    tokens = [sum(lengths[i] for batch in own for i in batch) for own in plan(lengths, max_tokens, ranks)]
    if len(plan(lengths, max_tokens, ranks)[0]) == 1:
        assert max(tokens) - min(tokens) <= max(lengths)
    assert max(tokens) <= 2 * sum(lengths) / ranks + max(lengths)


def test_plan_fills_micro_batches():
    assert plan([4, 4, 4, 4], 8, 2) == [[[0, 2]], [[1, 3]]]
    assert plan([9, 1, 2], 4, 1) == [[[0], [1, 2]]]
    assert plan([3], 8, 2) == [[[0]], [[]]]


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_plan_refuses_nothing(lengths):
    with pytest.raises(ValueError, match="at least one"):
        plan(lengths, 8, 1)


def test_collate_concatenates_every_field():
    rows = [{"tokens": np.array([5, 6], np.int32), "experts": np.full((2, 3, 2), i, np.uint8)} for i in range(2)]
    batch = collate(rows, "cpu")
    assert batch["tokens"].tolist() == [5, 6, 5, 6]
    assert batch["tokens"].dtype == torch.int64
    assert batch["cu_seqlens"].tolist() == [0, 2, 4]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["experts"].shape == (4, 3, 2)
    assert batch["experts"].dtype == torch.uint8
    assert batch["experts"][:, 0, 0].tolist() == [0, 0, 1, 1]


def test_collate_takes_read_only_arrays():
    """Ray hands out arrays in shared memory, which torch must not write to."""
    tokens = np.arange(3)
    tokens.flags.writeable = False
    collate([{"tokens": tokens}], "cpu")["tokens"].zero_()
    assert tokens.tolist() == [0, 1, 2]


def test_collate_names_the_row_and_the_field():
    good = {"tokens": np.arange(3), "weight": np.ones(3)}
    with pytest.raises(ValueError, match="row 1: weight: 2 values for 3 tokens"):
        collate([good, {"tokens": np.arange(3), "weight": np.ones(2)}], "cpu")
    with pytest.raises(ValueError, match="row 1 has the fields"):
        collate([good, {"tokens": np.arange(3)}], "cpu")
