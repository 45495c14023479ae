"""The rollout engine: what a request gets depends on its prompt, its counter and the weights, and on nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from amalgam.model import DeepseekV4
from amalgam.rl.engine import Engine
from amalgam.rl.packing import collate
from amalgam.rl.trajectory import Request, Trajectory

from .. import tiny

LIMIT = 40
VOCABULARY = 40  # small, so that responses end before the limit


@pytest.fixture(scope="module")
def model() -> DeepseekV4:
    return tiny.model(0, vocab_size=VOCABULARY)


def generate(
    model: DeepseekV4,
    requests: list[Request],
    temperature: float = 1.0,
    max_batch: int = 512,
    limit: int = LIMIT,
    seed: int = 2**62 + 5,
) -> list[Trajectory]:
    engine = Engine(model, [tiny.END], max_batch)
    return engine.generate(requests, temperature=temperature, max_new_tokens=limit, seed=seed, version=3)


def ragged() -> list[Request]:
    return tiny.requests(6, 3, VOCABULARY)


def assert_same(ours: list[Trajectory], theirs: list[Trajectory]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.request, one.group, one.finish) == (other.request, other.group, other.finish)
        assert one.response_ids.tolist() == other.response_ids.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(one.experts, other.experts)


@pytest.fixture(scope="module")
def alone(model: DeepseekV4) -> dict[int, Trajectory]:
    """Every request in a batch, and so a prefill, of its own."""
    return {r.id: generate(model, [r])[0] for r in ragged()}


@pytest.mark.parametrize(
    ("order", "max_batch"),
    [
        (lambda rs: rs, 512),
        (lambda rs: rs[::-1], 512),
        (lambda rs: rs, 5),  # cuts groups between batches
        (lambda rs: sorted(rs, key=lambda r: r.id % 5), 512),  # groups are not in a row
        (lambda rs: rs[::3], 512),  # one of each group
        (lambda rs: [replace(r, group=r.id) for r in rs], 512),  # no prompt is shared
    ],
)
def test_a_request_does_not_depend_on_its_company(model: DeepseekV4, alone: dict, order, max_batch: int):
    requests = order(ragged())
    expected = [replace(alone[r.id], group=r.group) for r in requests]
    assert_same(generate(model, requests, max_batch=max_batch), expected)


def test_the_noise_is_the_requests_own(model: DeepseekV4, alone: dict):
    """Members of a group differ, another seed and another counter differ, the same counter repeats."""
    texts = {tuple(t.response_ids.tolist()) for t in alone.values()}
    assert len(texts) == len(alone)
    requests = ragged()[-3:]
    again = generate(model, requests)
    other_seed = generate(model, requests, seed=2**62 + 6)
    other_high_bits = generate(model, requests, seed=2**61 + 5)
    other_counter = generate(model, [replace(r, id=r.id + 2**40) for r in requests])
    assert_same(again, [alone[r.id] for r in requests])
    for t, *others in zip(again, other_seed, other_high_bits, other_counter, strict=True):
        assert all(t.response_ids.tolist() != other.response_ids.tolist() for other in others)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_logprobs_and_experts_are_the_learners(model: DeepseekV4, temperature: float):
    """The packed forward over finished trajectories, at the sampler's temperature."""
    found = generate(model, ragged(), temperature)
    batch = collate([t.row() | {"experts": t.experts} for t in found], "cpu")
    with torch.no_grad():
        logprobs = model.logprobs(batch["tokens"], batch["cu_seqlens"], temperature=temperature).numpy()
        experts = model(batch["tokens"], batch["cu_seqlens"]).experts.numpy()
    ends = batch["cu_seqlens"].tolist()
    for t, start, end in zip(found, ends, ends[1:], strict=False):
        response = slice(start + len(t.prompt_ids), end)
        np.testing.assert_allclose(t.logprobs, logprobs[response], rtol=0, atol=1e-5)
        assert t.experts.shape == (len(t), 3, 2)
        assert t.experts.dtype == np.int16
        np.testing.assert_array_equal(t.experts[:-1], experts[start : end - 1])
        assert (t.experts[-1] == -1).all()


def test_greedy_takes_the_most_likely_token(model: DeepseekV4):
    found = generate(model, ragged()[::3], temperature=0.0)
    assert_same(generate(model, ragged()[::3], temperature=0.0, seed=9), found)
    for t in found:
        tokens = torch.from_numpy(t.row()["tokens"]).long()
        with torch.no_grad():
            logits = model.logits(model(tokens, torch.tensor([0, len(tokens)])).hidden)[len(t.prompt_ids) - 1 : -1]
        chosen = torch.log_softmax(logits, -1)[torch.arange(len(logits)), torch.from_numpy(t.response_ids).long()]
        np.testing.assert_allclose(t.logprobs, chosen, rtol=0, atol=1e-5)  # at temperature 1
        np.testing.assert_allclose(chosen, torch.log_softmax(logits, -1).amax(-1), rtol=0, atol=1e-5)


def test_a_response_ends_with_its_end_token_or_at_the_limit(model: DeepseekV4, alone: dict):
    assert {t.finish for t in alone.values()} == {"stop", "length"}, "the test needs both"
    for t in alone.values():
        assert tiny.END not in t.response_ids[:-1]
        assert t.finish == ("stop" if t.response_ids[-1] == tiny.END else "length")
        assert t.finish == "stop" or len(t.response_ids) == LIMIT
        assert len(t.logprobs) == len(t.versions) == len(t.response_ids)
        assert (t.versions == 3).all()
        assert t.text == ""


def test_an_end_token_at_the_limit_counts_as_stop(model: DeepseekV4, alone: dict):
    request = next(r for r in ragged() if alone[r.id].finish == "stop" and len(alone[r.id].response_ids) > 2)
    whole = alone[request.id]
    length = len(whole.response_ids)
    (at_limit,) = generate(model, [request], limit=length)
    assert at_limit.finish == "stop"
    assert at_limit.response_ids.tolist() == whole.response_ids.tolist()
    (cut,) = generate(model, [request], limit=length - 1)
    assert cut.finish == "length"
    assert cut.response_ids.tolist() == whole.response_ids.tolist()[:-1]


def test_no_requests_and_one_token(model: DeepseekV4):
    assert generate(model, []) == []
    for t in generate(model, ragged(), limit=1):
        assert len(t.response_ids) == 1
        assert len(t.experts) == len(t.prompt_ids) + 1
