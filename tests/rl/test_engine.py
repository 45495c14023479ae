"""The rollout engine: what a request gets depends on its prompt, its counter and the weights, and on nothing else."""

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from amalgam.model import DeepseekV4
from amalgam.model.config import PRESETS
from amalgam.rl.engine import Engine
from amalgam.rl.journal import Journal, JournalError, recover
from amalgam.rl.packing import collate
from amalgam.rl.records import recorded
from amalgam.rl.settings import EngineSettings
from amalgam.rl.trajectory import Past, Request, SamplingParams, Trajectory

from .. import tiny

LIMIT = 40
VOCABULARY = 40  # small, so that responses end before the limit
PAGE = 28  # the least that the tiny model's compressors allow
SEED = 2**62 + 5


@pytest.fixture(scope="module")
def model() -> DeepseekV4:
    return tiny.model(0, vocab_size=VOCABULARY)


def engine(model: DeepseekV4, lag: bool | None = None, ends: tuple[int, ...] = (tiny.END,), **more: Any) -> Engine:
    own = {name: more.pop(name) for name in ("journal", "snapshots") if name in more}
    return Engine(model, ends, settings=EngineSettings(context=112, **more), lag=lag, page=PAGE, **own)


def small(model: DeepseekV4, slots: int, pages: int) -> int:
    """Bytes of a cache in which so many slots and pages are."""
    made = engine(model)
    return (slots + 1) * made._scheduler.state_bytes + (pages + 1) * made._scheduler.page_bytes


def ragged(**params) -> list[Request]:
    return tiny.asked(tiny.requests(6, 3, VOCABULARY), **{"max_new_tokens": LIMIT, "seed": SEED} | params)


def generate(model: DeepseekV4, requests: list[Request], **settings) -> list[Trajectory]:
    return engine(model, **settings).generate(requests, 3)


def assert_same(ours: Iterable[Trajectory], theirs: Iterable[Trajectory]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one.request, one.group, one.finish) == (other.request, other.group, other.finish)
        assert one.response_ids.tolist() == other.response_ids.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(one.experts, other.experts)
        if one.picks is not None and other.picks is not None:
            np.testing.assert_array_equal(one.picks, other.picks)


@pytest.fixture(scope="module")
def alone(model: DeepseekV4) -> dict[int, Trajectory]:
    """Every request in an engine of its own, with a page for all of it, and its prompt in one chunk."""
    settings = EngineSettings(picks=True)
    return {r.id: Engine(model, [tiny.END], settings=settings).generate([r], 3)[0] for r in ragged()}


@pytest.mark.parametrize(
    ("order", "settings"),
    [
        (lambda rs: rs, {}),
        (lambda rs: rs[::-1], {"picks": True}),
        (lambda rs: rs, {"max_batch": 5, "swap": 0}),  # groups have to prefill again
        (lambda rs: rs, {"max_batch": 2, "prefill_tokens": 3}),  # prompts are held in host memory
        (lambda rs: sorted(rs, key=lambda r: r.id % 5), {"prefill_tokens": 7}),  # groups are not in a row
        (lambda rs: [replace(r, group=r.id) for r in rs], {"lag": True}),  # no prompt is shared
    ],
)
def test_a_request_does_not_depend_on_its_company(model: DeepseekV4, alone: dict, order: Callable, settings: dict):
    requests = order(ragged())
    assert_same(generate(model, requests, **settings), [replace(alone[r.id], group=r.group) for r in requests])


class Rush:
    """Requests arrive at random, in groups that are torn apart, among others that are cancelled in mid-flight; the
    youngest gives way at any token."""

    def __init__(self, engine: Engine, requests: list[Request], seed: int):
        self.engine, self.rng, self.all = engine, random.Random(seed), requests
        self.coming, self.found, self.told = self.rng.sample(requests, len(requests)), {}, {}
        self.cancelled: list[int] = []
        self.forks, engine._scheduler._fork = engine._scheduler._fork, self.give_way  # as a plan begins

    def give_way(self) -> None:
        self.forks()
        scheduler = self.engine._scheduler
        if self.rng.random() < 0.15 and scheduler.running:
            scheduler._preempt(scheduler.running[-1])

    def step(self) -> None:
        for _ in range(self.rng.choice([0, 0, 1, 4])):
            if self.coming:
                self.engine.submit(self.coming.pop())
        if self.rng.random() < 0.3:
            other = replace(self.rng.choice(self.all), id=len(self.cancelled) + 1)
            self.cancelled.append(other.id)
            self.engine.submit(other)
        if self.rng.random() < 0.3 and self.cancelled:
            self.engine.cancel(self.rng.choice(self.cancelled))
        for update in self.engine.step():
            self.told.setdefault(update.id, []).extend(update.token_ids.tolist())
            if update.finished:
                self.found[update.id] = update.finished
                assert self.told[update.id] == update.finished.response_ids.tolist()

    def run(self, requests: list[Request]) -> list[Trajectory]:
        while any(r.id not in self.found for r in requests):
            self.step()
        return [self.found[r.id] for r in requests]


@pytest.mark.parametrize(("lag", "swap"), [(False, 0), (True, 0), (True, 2**20)])
def test_nor_on_preemption_chunks_forks_and_cancelled_neighbors(model: DeepseekV4, lag: bool, swap: int):
    """A pool of 8 pages for requests that come to need 1 to 4 each, as nothing but their limits ends them."""
    requests = [
        replace(r, params=SamplingParams(max_new_tokens=5 + 23 * i % 45, seed=SEED, temperature=1 + i % 2))
        for i, r in enumerate(tiny.requests(5, 3, VOCABULARY))
    ]
    wide = engine(model, ends=(), picks=True).generate(requests)
    tight = engine(model, lag, (), memory=small(model, 6, 8), max_batch=6, prefill_tokens=11, swap=swap, picks=True)
    tight._batch.seconds_per_byte = 0.0
    rush = Rush(tight, requests, seed=int(lag))
    assert_same(rush.run(requests), wide)
    metrics = tight.metrics()
    assert metrics["preemptions"] > 10 and metrics["forks"] > 0
    assert (metrics["swaps"] > 0) == (swap > 0)
    assert any(rush.found[id].finish == "cancelled" for id in rush.cancelled if id in rush.found)


@pytest.mark.parametrize("lag", [False, True])
def test_one_that_was_interrupted_goes_on(model: DeepseekV4, alone: dict, lag: bool):
    """From any token, with what is known of it; also where the last tokens' experts are not."""
    rng, requests = random.Random(0), []
    for request in ragged():
        whole, size = alone[request.id], len(request.prompt_ids)
        count = rng.randrange(len(whole.response_ids))
        experts, picks = whole.experts[size : size + count].copy(), whole.picks[size : size + count].copy()
        unknown = rng.randrange(3) if count else 0
        experts[count - unknown :], picks[count - unknown :] = -1, -1
        past = Past(whole.response_ids[:count], whole.logprobs[:count], whole.versions[:count], experts, picks)
        requests.append(replace(request, past=past))
    found = generate(model, requests, lag=lag, picks=True, prefill_tokens=13)
    assert_same(found, alone.values())
    for t, request in zip(found, requests, strict=True):
        assert t.logprobs.tolist()[: len(request.past.logprobs)] == request.past.logprobs.tolist()


def test_a_past_that_is_all_of_it_is_finished(model: DeepseekV4, alone: dict):
    whole = next(t for t in alone.values() if t.finish == "stop")
    request = next(r for r in ragged() if r.id == whole.request)
    past = Past(whole.response_ids, whole.logprobs, whole.versions)
    (t,) = generate(model, [replace(request, past=past)])
    assert (t.finish, t.response_ids.tolist()) == ("stop", whole.response_ids.tolist())


def test_the_noise_is_the_requests_own(model: DeepseekV4, alone: dict):
    """Members of a group differ, another seed and another counter differ, the same counter repeats."""
    texts = {tuple(t.response_ids.tolist()) for t in alone.values()}
    assert len(texts) == len(alone)
    requests = ragged()[-3:]
    again = generate(model, requests)
    other_seed = generate(model, ragged(seed=SEED + 1)[-3:])
    other_high_bits = generate(model, ragged(seed=2**61 + 5)[-3:])
    other_counter = generate(model, [replace(r, id=r.id + 2**40) for r in requests])
    renamed = generate(model, [replace(r, id=i, noise=r.id) for i, r in enumerate(requests)])
    assert [t.response_ids.tolist() for t in renamed] == [alone[r.id].response_ids.tolist() for r in requests]
    assert_same(again, [alone[r.id] for r in requests])
    for t, *others in zip(again, other_seed, other_high_bits, other_counter, strict=True):
        assert all(t.response_ids.tolist() != other.response_ids.tolist() for other in others)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_experts_are_the_learners(model: DeepseekV4, temperature: float):
    """The packed forward over finished trajectories, at the sampler's temperature."""
    tight = {"memory": small(model, 6, 9), "max_batch": 6, "prefill_tokens": 11}
    found = generate(model, ragged(temperature=temperature), **tight)
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
    found = generate(model, ragged(temperature=0.0)[::3])
    assert_same(generate(model, ragged(temperature=0.0, seed=9)[::3]), found)
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
    (at_limit,) = generate(model, tiny.asked([request], max_new_tokens=length, seed=SEED))
    assert at_limit.finish == "stop"
    assert at_limit.response_ids.tolist() == whole.response_ids.tolist()
    (cut,) = generate(model, tiny.asked([request], max_new_tokens=length - 1, seed=SEED))
    assert cut.finish == "length"
    assert cut.response_ids.tolist() == whole.response_ids.tolist()[:-1]


def test_a_stop_token_of_the_request_ends_it(model: DeepseekV4, alone: dict):
    request, whole = next((r, alone[r.id]) for r in ragged() if len(alone[r.id].response_ids) > 10)
    stop = int(whole.response_ids[7])
    first = whole.response_ids.tolist().index(stop)
    (t,) = generate(model, tiny.asked([request], max_new_tokens=LIMIT, seed=SEED, stop_ids=(stop,)))
    assert (t.finish, t.response_ids.tolist()) == ("stop", whole.response_ids[: first + 1].tolist())


@pytest.mark.parametrize("lag", [False, True])
def test_a_stop_string_ends_it_and_is_not_part_of_the_text(lag: bool):
    model, tokenizer = tiny.model(0), Tokenizer.from_file(str(PRESETS / "tiny" / "tokenizer.json"))
    requests = tiny.asked(tiny.requests(4, 2), max_new_tokens=LIMIT)
    plain = Engine(model, [tiny.END], tokenizer=tokenizer).generate(requests)
    for t in plain:
        shown = t.response_ids[:-1] if t.finish == "stop" else t.response_ids
        assert t.text == tokenizer.decode(shown.tolist(), skip_special_tokens=False)
    stops = [
        replace(r, params=replace(r.params, stop=(t.text[9:12], "never"))) for r, t in zip(requests, plain, strict=True)
    ]
    for t, whole in zip(Engine(model, [tiny.END], tokenizer=tokenizer, lag=lag).generate(stops), plain, strict=True):
        assert t.text == whole.text[: whole.text.index(whole.text[9:12])]
        assert t.finish == "stop" and len(t.logprobs) == len(t.response_ids) < len(whole.response_ids)
        assert t.response_ids.tolist() == whole.response_ids[: len(t.response_ids)].tolist()


WAYS: list[dict] = [
    {},
    {"top_k": 3},
    {"top_p": 0.5, "temperature": 0.7},
    {"min_p": 0.3, "temperature": 1.6},
    {"allowed": np.arange(VOCABULARY) % 2 == 1},
    {"allowed": np.arange(VOCABULARY) % 3 == 0, "top_k": 4, "top_p": 0.9, "min_p": 0.01},
]


def test_each_request_is_drawn_from_in_its_own_way(model: DeepseekV4):
    """All ways in one batch: tokens as alone, from their sets, with the log-probs of the learner under these."""
    requests = [
        replace(r, params=SamplingParams(**{"max_new_tokens": 12, "seed": SEED, **WAYS[i % len(WAYS)]}))
        for i, r in enumerate(ragged())
    ]
    found = generate(model, requests, sets=True, max_batch=7)
    assert_same(found[:6], [generate(model, [r])[0] for r in requests[:6]])
    for t, params in zip(found, (r.params for r in requests), strict=True):
        tokens = torch.from_numpy(t.row()["tokens"]).long()
        with torch.no_grad():
            logits = model.logits(model(tokens, torch.tensor([0, len(tokens)])).hidden)[len(t.prompt_ids) - 1 : -1]
        assert t.sets is not None
        for row, token, logprob, among in zip(logits, t.response_ids, t.logprobs, t.sets, strict=True):
            assert token in among and len(among) <= (params.top_k or VOCABULARY)
            assert params.allowed is None or params.allowed[among].all()
            assert params != SamplingParams(12, SEED) or len(among) == VOCABULARY
            chosen = torch.log_softmax(row[torch.from_numpy(among).long()] / params.temperature, 0)
            assert abs(float(chosen[among.tolist().index(token)]) - logprob) < 1e-5


@pytest.mark.parametrize("kinds", [{}, {"picks": True, "sets": True}])
def test_what_a_journal_has_of_a_broken_off_run_is_gone_on_with(model: DeepseekV4, tmp_path: Path, kinds: dict):
    """Engines that are left at once, one after the other, with what they had in flight; the last one finishes."""
    settings = EngineSettings(**kinds)
    requests = ragged(top_k=30)
    whole, found, rng = generate(model, requests, **kinds), {}, random.Random(0)
    coming = list(requests)
    for number in range(4):
        journal = Journal(tmp_path, f"worker{number}", **recorded(model, settings))
        made = engine(model, True, max_batch=6, journal=journal, **kinds)
        made.version = 3
        for request in coming:
            made.submit(request)
        for _ in range(rng.randrange(15) if number < 3 else 1000):
            found |= {update.id: update.finished for update in made.step() if update.finished}
        journal.close()
        coming = list(recover(tmp_path))
        assert {r.id for r in coming} == {r.id for r in requests} - found.keys()
    assert_same([found[r.id] for r in requests], whole)
    for one, other in zip((found[r.id] for r in requests), whole, strict=True):
        assert (one.sets is None) == (other.sets is None) == (not kinds)
        assert all(a.tolist() == b.tolist() for a, b in zip(one.sets or [], other.sets or [], strict=True))


def test_a_journal_that_fails_is_given_up(model: DeepseekV4, alone: dict, caplog):
    class Full:
        def begin(self, request) -> None:
            pass

        def append(self, *arrays, **more) -> None:
            raise JournalError("worker.journal: no space left on the device")

    made = engine(model, journal=Full())
    assert_same(made.generate(ragged()[:3], 3), list(alone.values())[:3])
    assert made.metrics()["journal_lost"] == 1
    assert caplog.messages == ["the engine goes on without its journal: worker.journal: no space left on the device"]


def test_no_requests_and_one_token(model: DeepseekV4):
    assert generate(model, []) == []
    made = engine(model)
    assert not made.busy and made.step() == [] and made.context == 112
    for t in generate(model, ragged(max_new_tokens=1)):
        assert len(t.response_ids) == 1
        assert len(t.experts) == len(t.prompt_ids) + 1


def test_a_stream_is_what_generate_gives_and_may_be_left(model: DeepseekV4, alone: dict):
    made = engine(model)
    for request in ragged()[::4]:
        assert [int(i) for new in made.stream(request) for i in new] == alone[request.id].response_ids.tolist()
    for new in made.stream(ragged()[-1]):
        assert new.tolist() == alone[ragged()[-1].id].response_ids[:1].tolist()
        break
    assert not made.busy and made.metrics()["running"] == 0


def test_new_weights_between_two_steps(model: DeepseekV4):
    """Each token has its version. With a cache that is rebuilt, what follows is what the new weights alone would draw
    behind it; with the old cache, the first token is drawn from states of both."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = tiny.model(1, vocab_size=VOCABULARY).state_dict()
    found = {}
    try:
        for cache in ("keep", "rebuild"):
            model.load_state_dict(weights)
            made = engine(model, True, prefill_tokens=9)
            for request in ragged():
                made.submit(request)
            done = {}
            for step in range(200):
                if step == 20:
                    made.update(lambda m: m.load_state_dict(other), 1, cache)
                done |= {update.id: update.finished for update in made.step() if update.finished}
            assert not made.busy
            found[cache] = [done[r.id] for r in ragged()]
        mixed = [t for t in found["rebuild"] if 0 < t.versions.sum() < len(t.versions)]
        assert len(mixed) > 3 and all((np.diff(t.versions) >= 0).all() for t in mixed)
        requests = []
        for t in found["rebuild"]:
            old = int((t.versions == 0).sum())
            past = Past(t.response_ids[:old], t.logprobs[:old], t.versions[:old])
            requests.append(replace(next(r for r in ragged() if r.id == t.request), past=past))
        again = engine(model).generate(requests, 1)
        for t, other_t in zip(found["rebuild"], again, strict=True):
            assert t.response_ids.tolist() == other_t.response_ids.tolist()
            np.testing.assert_allclose(t.logprobs, other_t.logprobs, rtol=0, atol=1e-5)
        same = [(a.response_ids.tolist(), b.response_ids.tolist()) for a, b in zip(*found.values(), strict=True)]
        assert any(a != b for a, b in same), "the kept cache is of the old weights"
    finally:
        model.load_state_dict(weights)


@pytest.mark.parametrize("lag", [False, True])
@torch.no_grad()
def test_what_is_not_finite_fails_alone(alone: dict, lag: bool):
    """A token whose embedding is broken: requests with it in the prompt fail, those beside and after them do not."""
    model = tiny.model(0, vocab_size=VOCABULARY)
    broken = VOCABULARY - 1
    weight = model.model.embed_tokens.weight
    tight = engine(model, lag, memory=small(model, 6, 9), max_batch=6, prefill_tokens=11)
    clean = [r for r in ragged() if broken not in r.prompt_ids and broken not in alone[r.id].response_ids]
    assert len(clean) > 3
    sound, weight[broken] = weight[broken].clone(), torch.nan
    prompt = np.array([5, 6, broken, *range(7, 30)], np.int32)
    bad = tiny.asked([Request(i, 77, prompt) for i in range(3)], max_new_tokens=5)
    order = [bad[0], *clean[:2], bad[1], *clean[2:], bad[2]]
    found = {t.request: t for t in tight.generate(order, 3)}
    for request in bad:
        assert found[request.id].finish == "failed" and len(found[request.id].response_ids) == 0
        assert found[request.id].error == f"its logits at position {len(prompt)} are not finite"
    assert_same([found[r.id] for r in clean], [alone[r.id] for r in clean])
    weight[broken] = sound
    assert_same(tight.generate(ragged(), 3), alone.values())


def test_what_can_never_run_is_refused(model: DeepseekV4):
    made = engine(model)
    good = ragged()[5]

    def refused(message: str, request: Request) -> None:
        with pytest.raises(ValueError, match=f"^request {request.id}: {message}"):
            made.submit(request)

    long = np.full(80, 5, np.int32)
    refused(
        "a prompt of 80 tokens and a response of up to 40 are more than the 112 tokens that a request may hold$",
        replace(good, prompt_ids=long),
    )
    refused("its prompt is empty", replace(good, prompt_ids=long[:0]))
    refused(
        "its prompt has a token outside the vocabulary of 40", replace(good, prompt_ids=np.array([3, 40], np.int32))
    )
    for message, params in {
        "stop_ids: 40 is no token of the vocabulary of 40": {"stop_ids": (3, 40)},
        "stop strings need the engine to have a tokenizer": {"stop": ("a",)},
        "temperature: nan; want 0, or a finite number from": {"temperature": float("nan")},
        "max_new_tokens: 0; want at least 1": {"max_new_tokens": 0},
        r"top_k 0, top_p 1.5, min_p 0.0; want top_k from 0 on": {"top_p": 1.5},
        r"allowed: want bool \[40\], not all of it False": {"allowed": np.zeros(40, bool)},
    }.items():
        refused(message, tiny.asked([good], **params)[0])
    made.submit(good)
    refused("there is an unfinished request of that id", good)
    refused(f"its prompt is not that of the others in group {good.group}", replace(good, id=1, prompt_ids=long[:9]))
    with pytest.raises(ValueError, match="while other requests are under way"):
        made.generate(ragged())
    assert made.cancel(good.id) and not made.cancel(good.id)
    (update,) = made.step()
    assert update.finished is not None and update.finished.finish == "cancelled"
    assert len(update.finished) == len(good.prompt_ids)
    assert not made.busy


def test_a_past_without_the_sets_that_are_written_down_is_refused(model: DeepseekV4):
    one = np.zeros(1, np.int32)
    past, made = Past(one + 7, one.astype(np.float32), one), engine(model, sets=True)
    with pytest.raises(ValueError, match="sets, and its past does not have one for each token$"):
        made.submit(replace(ragged()[5], past=past))
    made.submit(replace(ragged()[5], past=replace(past, sets=[one + 7])))
    assert made.busy


def test_a_budget_without_room_for_one_request_is_refused(model: DeepseekV4):
    need = small(model, 1, 4)
    assert engine(model, memory=need, max_batch=1)._scheduler.pool.size == 4
    message = f"a cache of {need - 1} bytes has no room for a request of 112 tokens: that takes {need} bytes"
    with pytest.raises(ValueError, match=message):
        engine(model, memory=need - 1, max_batch=1)


def test_one_that_was_swapped_goes_on_from_its_snapshot(model: DeepseekV4, tmp_path: Path):
    """In another engine, which prefills nothing of it; but for a torn snapshot."""
    (request,), kinds = ragged(max_new_tokens=30)[-1:], {"picks": True, "snapshots": tmp_path}
    (whole,) = engine(model, ends=(), picks=True).generate([request], 3)
    assert whole.picks is not None
    for torn in (False, True):
        made, tokens = engine(model, True, (), **kinds), 0
        made.version = 3
        made._scheduler.seconds_per_byte = made._batch.seconds_per_byte = 0.0
        made.submit(request)
        while tokens < 9:
            tokens += sum(len(update.token_ids) for update in made.step())
        made._scheduler._fork = lambda s=made._scheduler: s._preempt(s.running[0])  # as the plan begins
        made.step()
        (file,) = tmp_path.glob("*.snapshot")
        if torn:
            file.write_bytes(file.read_bytes()[:-9])
        known = len(made._responses[request.id].tokens)
        at = slice(len(request.prompt_ids), len(request.prompt_ids) + known)
        experts, picks = whole.experts[at].copy(), whole.picks[at].copy()
        experts[-1] = picks[-1] = -1
        past = Past(whole.response_ids[:known], whole.logprobs[:known], whole.versions[:known], experts, picks)
        other = engine(model, ends=(), **kinds)
        assert_same(other.generate([replace(request, past=past)], 3), [whole])
        assert (other.metrics()["prefilled_tokens"] == 0) == (not torn)
        assert torn or not list(tmp_path.glob("*.snapshot"))
