"""kill -9 of rollout workers at random moments: what is sampled twice or lost, how soon it goes on, which lengths come.

    python benchmarks/kills.py                30 kills of three workers with the tiny preset; writes results/kills.json
    python benchmarks/kills.py --kills 3      printed only

Rounds of requests are sampled, with kills until there were enough, and all of them again without. A token counts as
sampled twice if two workers have journaled it as their own work; as lost if a journal has it and the response does not.
Only what a worker had drawn in the very step in which it died, and not yet written, is in no journal.
"""

import argparse
import os
import random
import signal
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from results import machine, print_table, write_result

from amalgam.model.config import PRESETS
from amalgam.rl.cluster import start_ray, wait
from amalgam.rl.journal.reading import read_all
from amalgam.rl.rollout import Rollouts
from amalgam.rl.rollout_worker import RolloutWorker
from amalgam.rl.settings import EngineSettings
from amalgam.rl.trajectory import Request, SamplingParams, Trajectory

GROUPS, MEMBERS, LIMIT = 32, 16, 512  # of a round
SETTINGS = EngineSettings(max_batch=64)
GAP = (0.5, 3.0)  # seconds between two kills, if another worker is there, drawn evenly
SEED = 0


class Clocked(RolloutWorker):
    """Writes down when it sampled the first token of each request: lines of id and seconds of the system's clock."""

    def _deliver(self, updates: list[Any]) -> None:
        now = time.monotonic()
        new = [update.id for update in updates if len(update.token_ids) and self._began.get(update.id)]
        if new:
            with open(self._folder.parent / f"{self._folder.name}.first", "a") as file:
                file.writelines(f"{each} {now}\n" for each in new)
        super()._deliver(updates)


class Watched(Rollouts):
    """Rollouts that write down what each worker was sent, and what dead ones left."""

    kind = Clocked

    def load(self, *args: Any, **kinds: Any) -> None:
        self.sent: dict[tuple[str, int], int] = {}  # (worker's folder, request) -> tokens that it came with
        self.left: list[list[Request]] = []  # by each death: unfinished requests with a past
        self.noticed: list[float] = []  # when
        super().load(*args, **kinds)

    def _dispatch(self) -> None:
        before = {place.worker: {r.id for r in self._router.holds(place.worker)} for place in self._serving()}
        super()._dispatch()
        for place in self._serving():
            for request in self._router.holds(place.worker):
                if request.id not in before[place.worker]:
                    self.sent[place.folder.name, request.id] = tokens(request)

    def _serving(self) -> list[Any]:
        return [place for place in self._places if place.serves]

    def _died(self, place: Any, why: Exception) -> None:
        self.noticed.append(time.monotonic())
        again, after = self._router.again, []
        self._router.again = lambda requests: after.extend(requests) or again(requests)
        super()._died(place, why)
        self._router.again = again
        self.left.append([request for request in after if request.past is not None])

    def kill(self, rng: random.Random) -> bool:
        """Kills one of those that have requests, where another one is there to take them."""
        able = [place for place in self._serving() if self._router.holds(place.worker)]
        if len(self._serving()) < 2 or not able:
            return False
        place = rng.choice(able)
        pid = wait(self.workers[place.index].__ray_call__.remote(lambda _: os.getpid()), "a worker's pid", 60.0)
        os.kill(pid, signal.SIGKILL)
        return True


def tokens(request: Request) -> int:
    return len(request.past.response_ids) if request.past is not None else 0


def requests(number: int) -> list[Request]:
    """A round's, with prompts of its own."""
    rng = np.random.default_rng([SEED, number])
    params = SamplingParams(max_new_tokens=LIMIT, seed=SEED)
    made = []
    for group in range(number * GROUPS, (number + 1) * GROUPS):
        prompt = rng.integers(3, 512, rng.integers(4, 64)).astype(np.int32)
        made += [Request(group * MEMBERS + i, group, prompt, params) for i in range(MEMBERS)]
    return made


def with_kills(pool: Watched, kills: int, folder: Path) -> tuple[list[Trajectory], dict[str, Any]]:
    """Rounds until there were so many kills: their responses in order, and what the deaths cost."""
    rng, found, counts = random.Random(SEED), [], defaultdict(int)
    noticed, first, resumed = [], [], []  # seconds from the kill: to its notice, to the first token, to each request's
    done = rounds = 0
    while done < kills:
        pool.load(PRESETS / "tiny", journal=folder / f"round-{rounds}", settings=SETTINGS)
        wanted, came, moments = requests(rounds), {}, []
        pool.submit(wanted)
        next_kill = time.monotonic() + rng.uniform(*GAP)
        while len(came) < len(wanted):
            came |= {t.request: t for t in pool.results(max(0.0, next_kill - time.monotonic()))}
            if time.monotonic() >= next_kill:
                deaths = pool.deaths
                if done < kills and len(came) < len(wanted) and pool.kill(rng):
                    moments.append(time.monotonic())
                    done += 1
                    while pool.deaths == deaths:  # one after the other: each death has its moment
                        came |= {t.request: t for t in pool.results(0.0)} or {}
                        pool._turn(0.1)
                next_kill = time.monotonic() + rng.uniform(*GAP)
        found += [came[request.id] for request in wanted]
        for name, count in journaled(folder / f"round-{rounds}", pool.sent, came).items():
            counts[name] += count
        counts["responses that a kill broke off"] += len({r.id for left in pool.left for r in left})
        each = went_on(folder / f"round-{rounds}", pool.left, moments)
        noticed += [at - moment for at, moment in zip(pool.noticed, moments, strict=True)]
        resumed += [seconds for kill in each for seconds in kill]
        first += [min(kill) for kill in each if kill]
        print(f"round {rounds}: {len(moments)} kills, {len(wanted)} responses", flush=True)
        rounds += 1
    return found, {
        "rounds": rounds, "kills": done, **counts,
        "seconds_to_go_on": {
            f"{name}, {kind}": of(seconds)
            for name, seconds in (
                ("the driver knows, and sends on", noticed),
                ("the first of its requests goes on", first),
                ("any of its requests goes on", resumed),
            )
            for kind, of in (("median", statistics.median), ("most", max))
        },
    }  # fmt: skip


def journaled(folder: Path, sent: dict[tuple[str, int], int], came: dict[int, Trajectory]) -> dict[str, int]:
    """Tokens of all, those that were sampled twice, and those that a journal has and the response has not."""
    sampled: dict[int, list[int]] = defaultdict(list)  # positions, by request
    lost = 0
    for worker in (each for each in folder.iterdir() if each.is_dir()):
        for file in read_all(worker, keep_finished=True):
            for life in (*file.finished, *file.unfinished):
                request, past = life.request.id, life.past(file.recorded)
                count = 0 if past is None else len(past.response_ids)
                sampled[request] += range(sent[worker.name, request], count)
                response = came[request].response_ids
                lost += count if past is not None and response[:count].tolist() != past.response_ids.tolist() else 0
    twice = sum(len(positions) - len(set(positions)) for positions in sampled.values())
    missing = sum(len(came[request].response_ids) - len(set(positions)) for request, positions in sampled.items())
    return {"tokens": sum(map(len, sampled.values())), "twice": twice, "lost": lost, "unaccounted": missing}


def went_on(folder: Path, left: list[list[Request]], moments: list[float]) -> list[list[float]]:
    """For each kill, the seconds until each request that it broke off got its next token."""
    firsts: dict[int, list[float]] = defaultdict(list)
    for file in folder.glob("*.first"):
        for line in file.read_text().splitlines():
            request, at = line.split()
            firsts[int(request)].append(float(at))
    return [
        [min(later) - moment for r in requests if (later := [at for at in firsts[r.id] if at > moment])]
        for requests, moment in zip(left, moments, strict=True)
    ]


def lengths(found: list[Trajectory]) -> dict[str, float]:
    counts = np.array([len(t.response_ids) for t in found])
    quantiles = {f"{q} %": float(np.percentile(counts, q)) for q in (10, 50, 90, 99)}
    return {"mean": float(counts.mean()), **quantiles, "cut": float(np.mean([t.finish == "length" for t in found]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--workers", type=int, default=3)
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "workers": args.workers}
    start_ray()
    with tempfile.TemporaryDirectory() as folder:
        pool = Watched(args.workers, deadline=300.0)
        try:
            began = time.monotonic()
            killed, costs = with_kills(pool, args.kills, Path(folder))
            seconds = [time.monotonic() - began]
            began, whole = time.monotonic(), []
            for number in range(costs["rounds"]):
                pool.load(PRESETS / "tiny", settings=SETTINGS)
                whole += pool.generate(requests(number))
            seconds.append(time.monotonic() - began)
        finally:
            pool.close()
    pairs = list(zip(killed, whole, strict=True))
    result |= costs | {
        "responses": len(whole),
        "same_tokens": sum(a.response_ids.tolist() == b.response_ids.tolist() for a, b in pairs),
        "logprob_difference": max(
            float(abs(a.logprobs - b.logprobs).max()) for a, b in pairs if len(a.logprobs) == len(b.logprobs)
        ),
        "seconds": dict(zip(("with kills", "without"), seconds, strict=True)),
        "lengths": {"with kills": lengths(killed), "without": lengths(whole)},
    }
    print_table(
        ["tokens a response", *result["lengths"]["without"]],
        [(name, *(f"{value:.4g}" for value in row.values())) for name, row in result["lengths"].items()],
    )
    print(f"{result['kills']} kills, {result['responses']} responses, {result['tokens']} tokens: ", end="")
    print(f"{result['twice']} sampled twice, {result['lost']} lost, {result['unaccounted']} unaccounted for")
    print(f"{result['same_tokens']} responses are as without kills; log-probs to {result['logprob_difference']:.1e}")
    print_table(["seconds from a kill until", ""], [(n, f"{s:.2f}") for n, s in costs["seconds_to_go_on"].items()])
    if args.kills >= 30:
        print(f"written: {write_result('kills', result)}")


if __name__ == "__main__":
    main()
