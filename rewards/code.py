"""Programs that a model wrote, run in the sandbox: on standard input, or by unit tests of their functions.

The parent process never sees the program run, and the program never sees what it ought to give: outputs are compared
here, unit tests are judged in a sandbox of their own (`sandbox.pool`).
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from .answers import answer, blocks, bounded
from .problem import Problem, Response, Score
from .sandbox import Limits, Sandboxes

_pool: Sandboxes | None = None


def code(
    trajectory: Response,
    problem: Problem,
    *,
    partial: bool = False,
    compare: Literal["lines", "words", "numbers"] = "lines",
    wall: float = 10.0,
    memory: int = 512 * 2**20,
) -> Score:
    """1 if the program passes all of the problem's tests, else 0; with `partial`, the share that it passes.

    The program is the last fenced block of Python in the content, else what `<answer>` holds, else all of the content.
    The problem's entry has either `inputs` and `outputs`, lists of texts, or `tests`, a list of Python sources (or
    one), and with these, if it likes, `setup` (runs before the tests), `entry_point` (the function that is tested) and
    `prompt` (the program's beginning, put before it unless it defines the entry point itself).

    Args:
        compare: `lines`: equal but for white space at the ends of lines and of the text. `words`: equal but for white
            space. `numbers`: as `words`, with numbers within 1e-6, absolute or relative.
        wall: seconds for one input, or for all unit tests; a program that hangs on one input is not run on more.
        memory: bytes, over all processes of the program.
    """
    source = program(trajectory)
    if source is None:
        return Score(0.0, False, note="no content to grade")
    entry, limits = problem.entry, Limits(wall=wall, memory=memory)
    if "tests" in entry:
        tests = [entry["tests"]] if isinstance(entry["tests"], str) else entry["tests"]
        total, results = len(tests), _unit_tests(source, tests, entry, limits)
    else:
        total, results = len(entry["inputs"]), _runs(source, entry["inputs"], entry["outputs"], compare, limits)
    passed, failed = 0, ""
    for note in results:
        passed += not note
        failed = failed or note
        if failed and not partial:
            break
    right = total > 0 and passed == total
    value = passed / total if partial and total else float(right)
    return Score(value, right, note=f"{passed} of {total}: {failed}" if failed else "" if total else "no tests")


def prepare(problem: Problem) -> None:
    """Starts this process's sandboxes. Raises: UserError where none can run."""
    _sandboxes()


def seconds(wall: float = 10.0, **_: Any) -> float:
    """What one grade may take: inputs run one after another until one hangs."""
    return 3 * wall + 20.0


def program(response: Response) -> str | None:
    """The program in a response; None without a content. Raises: TooLong."""
    content = response.content
    found = blocks(content, "python", "py", "python3") if content is not None else []
    return bounded(found[-1]) if found else answer(response)


def same(given: str, wanted: str, compare: str) -> bool:
    if compare == "lines":
        return _stripped(given) == _stripped(wanted)
    one, other = given.split(), wanted.split()
    if compare == "words" or len(one) != len(other):
        return one == other
    return all(a == b or _close(a, b) for a, b in zip(one, other, strict=True))


def _sandboxes() -> Sandboxes:
    """Started once in a process; they end with it."""
    global _pool
    if _pool is None:
        _pool = Sandboxes(ready=2).__enter__()
    return _pool


def _runs(source: str, inputs: Sequence[str], outputs: Sequence[str], compare: str, limits: Limits) -> Iterator[str]:
    """For each test why it fails, or nothing; up to the first that cost all of its time."""
    for ended, wanted in zip(_sandboxes().runs(source, inputs, limits), outputs, strict=True):
        if ended.end != "exit 0":
            last = ended.errors.strip().splitlines()[-1:] or [""]
            yield f"{ended.end} {last[0]}".strip()[:200]
            if ended.end in ("timeout", "lost"):
                return
        elif same(ended.output, wanted, compare):
            yield ""
        else:
            yield f"printed {ended.output.strip()!r:.80}"


def _unit_tests(source: str, tests: Sequence[str], entry: dict[str, Any], limits: Limits) -> Iterator[str]:
    name, prompt = entry.get("entry_point", ""), entry.get("prompt", "")
    if prompt and name and f"def {name}(" not in source:
        source = prompt + source
    verdicts, ended = _sandboxes().check(source, tests, entry.get("setup", ""), name, limits)
    for verdict in verdicts:
        why = ended.errors.strip().splitlines()[-1:] if ended.end != "exit 0" else []
        yield "" if verdict.ok else " ".join([verdict.note or "failed", *why])[:200]


def _stripped(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


@functools.lru_cache(maxsize=4096)
def _close(one: str, other: str) -> bool:
    try:
        return math.isclose(float(one), float(other), rel_tol=1e-6, abs_tol=1e-6)
    except ValueError:
        return False
