"""The rollout service's decisions, without its processes: order, groups, back-pressure, load, deaths, metrics."""

import random
from dataclasses import replace

import numpy as np
import pytest

from amalgam.rl.router import Deaths, Meter, Report, Router, settle, unsampled
from amalgam.rl.trajectory import Past, Request, SamplingParams


def request(id_: int, group: int, prompt: int = 3, limit: int = 10, past: int = 0) -> Request:
    ids = np.arange(past, dtype=np.int32)
    before = Past(ids, ids.astype(np.float32), ids) if past else None
    return Request(id_, group, np.arange(prompt, dtype=np.int32), SamplingParams(max_new_tokens=limit), before)


def group(number: int, members: int, **kinds) -> list[Request]:
    return [request(1000 * number + i, number, **kinds) for i in range(members)]


def router(room: int, workers: int, *groups: list[Request]) -> Router:
    made = Router(room)
    for worker in range(workers):
        made.join(worker)
    for members in groups:
        made.add(members)
    return made


def sent(assigned: dict[int, list[Request]]) -> dict[int, list[int]]:
    return {worker: [r.id for r in requests] for worker, requests in assigned.items()}


def test_groups_go_whole_to_the_least_loaded():
    """By tokens, not by requests: one long group weighs as much as two short ones."""
    made = router(100, 2, group(1, 2, limit=100), group(2, 2, limit=40), group(3, 2, limit=40), group(4, 1))
    assert sent(made.assign()) == {0: [1000, 1001], 1: [2000, 2001, 3000, 3001, 4000]}
    made = router(100, 2, group(1, 4, prompt=50), group(2, 4, prompt=60), group(3, 1))
    assert sent(made.assign())[0] == [1000, 1001, 1002, 1003, 3000], "a group's prompt counts once"


def test_a_finished_request_makes_its_worker_lighter():
    made = router(100, 2, group(1, 2), group(2, 1))
    made.assign()
    assert made.finish(0, 1000)
    assert made.finish(0, 1001)
    assert not made.finish(0, 1001), "twice"
    assert not made.finish(1, 1000), "not its own"
    made.add(group(3, 1))
    assert sent(made.assign()) == {0: [3000]}
    assert len(made) == 2


def test_back_pressure_holds_the_rest_until_there_is_room():
    made = router(4, 2, *(group(g, 2) for g in range(1, 7)))
    first = made.assign()
    assert [len(requests) for requests in first.values()] == [4, 4]
    assert (made.waiting, len(made)) == (4, 12)
    assert made.assign() == {}
    made.finish(1, 2000)
    assert made.assign() == {}, "a group waits for room for all of it"
    made.finish(1, 2001)
    assert sent(made.assign()) == {1: [5000, 5001]}, "the fast worker gets it"


def test_a_group_larger_than_the_room_follows_its_first_members():
    made = router(4, 1, group(1, 7), group(2, 1))
    assert sent(made.assign()) == {0: [1000, 1001, 1002, 1003]}
    made.join(1)
    made.add(group(3, 4))
    assert sent(made.assign()) == {1: [1004, 1005, 1006, 2000]}, "an idle worker takes the rest rather than wait"
    made = router(4, 2, group(1, 3), group(2, 1))
    made.assign()
    made.add(request(1100 + i, 1) for i in range(3))
    assert sent(made.assign()) == {0: [1100]}, "worker 1 has something to do: the others wait for their prompt's worker"
    made.finish(0, 1000)
    assert sent(made.assign()) == {0: [1101]}


def test_half_of_the_room_is_enough_for_a_group_that_fits_nowhere():
    made = router(4, 1, group(1, 2), group(2, 9))
    assert sent(made.assign()) == {0: [1000, 1001, 2000, 2001]}
    made = router(4, 1, group(1, 3), group(2, 9))
    assert sent(made.assign()) == {0: [1000, 1001, 1002]}


def test_nobody_overtakes_a_group_that_waits_for_room():
    made = router(4, 1, group(1, 3), group(2, 2), group(3, 1))
    assert sent(made.assign()) == {0: [1000, 1001, 1002]}
    for each in (1000, 1001):
        made.finish(0, each)
    assert sent(made.assign()) == {0: [2000, 2001, 3000]}


def test_an_id_is_here_once():
    made = router(4, 1, group(1, 1))
    with pytest.raises(ValueError, match="request 1000 is on its way already"):
        made.add(group(1, 1))
    made.assign()
    with pytest.raises(ValueError, match="request 1000"):
        made.add(group(1, 1))
    made.finish(0, 1000)
    made.add(group(1, 1))


def test_what_a_dead_worker_had_goes_first_to_the_living():
    made = router(2, 2, group(1, 2), group(2, 2), group(3, 2))
    made.assign()
    left = made.leave(0)
    assert [r.id for r in left] == [1000, 1001]
    made.again(left)
    assert made.assign() == {}
    made.finish(1, 2000)
    made.finish(1, 2001)
    assert sent(made.assign()) == {1: [1000, 1001]}
    made.join(2)
    assert sent(made.assign()) == {2: [3000, 3001]}


def test_cancelled_while_they_wait():
    made = router(2, 1, group(1, 2), group(2, 2))
    made.assign()
    assert [r.id for r in made.take_back([1000, 2001])] == [2001]
    assert (made.waiting, len(made)) == (1, 3)
    assert [r.id for r in made.take_back([2000])] == [2000]
    assert made.waiting == 0


def test_settling_a_dead_workers_requests():
    """What it had begun or ended goes on from there, what never reached it from its past."""
    one, two, three, four = held = [request(1, 1, past=2), request(2, 1), request(3, 2, past=4), request(4, 2)]
    found = settle(held, [replace(one, past=request(1, 1, past=5).past), request(9, 9, past=3), request(2, 1, past=7)])
    assert [(r.id, len(r.past.response_ids) if r.past else 0) for r in found.again] == [(1, 5), (2, 7), (3, 4), (4, 0)]
    assert found.again[2].past is three.past
    assert found.again[1].params is two.params
    assert found.again[3].prompt_ids is four.prompt_ids
    assert found.tokens == 3 + 7, "not those that it was given"


def test_deaths_count_in_a_row_with_nothing_sampled_between():
    deaths = Deaths()
    assert [deaths.count(0, True, tokens) for tokens in (5, 5, 5, 6, 7, 7)] == [1, 2, 3, 1, 1, 2]
    assert deaths.count(1, True, 7) == 1, "each place for itself"
    assert deaths.count(0, False, 90) == 3, "what others sample does not help a place where none comes to serve"
    assert deaths.total == 8


def test_the_meter_sums_up_all_workers_between_two_looks():
    meter = Meter()
    meter.add(Report(tokens=50, active=10, running=40, waiting=20, cache_use=0.5, first_tokens=[1.0, 2.0]))
    meter.add(Report(tokens=30, active=30, running=80, cache_use=0.2, preemptions=2, first_tokens=[9.0]))
    assert meter.read(4.0, 1) == {
        "rollout/tokens_per_second": 20.0, "rollout/batch": 3.0, "rollout/queue": 0.5, "rollout/cache_use": 0.5,
        "rollout/preemptions": 2.0, "rollout/time_to_first_token": 2.0, "rollout/deaths": 1.0,
    }  # fmt: skip
    assert set(meter.read(0.0, 0).values()) == {0.0}


def test_a_report_sums_up_steps():
    report = Report()
    for running, use, gave_way, lost in ((3, 0.5, 1, 0), (5, 0.2, 2, 1)):
        metrics = {"running": running, "waiting": 2, "cache_use": use, "preemptions": gave_way, "journal_lost": lost}
        report.step(metrics)
    assert (report.active, report.running, report.waiting, report.cache_use) == (2, 8, 4, 0.5)
    assert (report.preemptions, report.journal_lost) == (3, True)


def test_a_whole_service_in_any_order():
    """Random groups, rooms, ends and deaths: all end once, no worker has more than its room."""
    for seed in range(50):
        rng = random.Random(seed)
        room, workers = rng.randint(1, 9), list(range(rng.randint(1, 3)))
        groups = [group(g, rng.randint(1, 12), limit=rng.randint(1, 50)) for g in range(1, rng.randint(2, 12))]
        made, done, serial = router(room, len(workers), *groups), [], len(workers)
        while len(made):
            made.assign()
            held = {worker: made.holds(worker) for worker in workers}
            assert all(len(requests) <= room for requests in held.values())
            assert any(held.values()), "somebody has something to do"
            worker = rng.choice([w for w in workers if held[w]])
            if rng.random() < 0.2:
                workers.remove(worker)
                made.again(made.leave(worker))
                made.join(serial)
                workers.append(serial)
                serial += 1
            else:
                for each in rng.sample(held[worker], rng.randint(1, len(held[worker]))):
                    assert made.finish(worker, each.id)
                    done.append(each.id)
        assert sorted(done) == sorted(r.id for members in groups for r in members)


def test_what_ends_without_an_engine_keeps_its_past():
    assert unsampled(request(1, 1, past=4), "cancelled").response_ids.tolist() == [0, 1, 2, 3]
    bare = unsampled(request(1, 1), "failed", "too long")
    assert (len(bare.response_ids), len(bare.logprobs), len(bare.versions), bare.error) == (0, 0, 0, "too long")
