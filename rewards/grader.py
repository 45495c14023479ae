"""Grading in child processes that can be killed: a reward that hangs, raises or crashes costs its own sample.

The parent sends responses and problems, as JSON over a socket, to a child, which runs their rewards under a memory
limit. Requests travel in chunks, so that a child never waits for the next one; outcomes come one by one, and each
restarts the deadline. The child does not import torch, and lets none of our rewards compile code: several of
reasoning-gym's scorers call `eval` on the answer (`countdown` through sympy). A judge, being a model, is asked in the
parent.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from ..errors import UserError
from . import registry
from .answers import TooLong
from .judge import Generator, judge_all
from .problem import Problem, Response, Score
from .registry import Part

MAX_TEXT = 1_000_000  # characters of a response; a longer one fails unread
MEMORY = 2 * 2**30  # bytes of address space for a child
START = 120.0  # seconds for a child to start, and again to prepare the rewards of a chunk
CHUNK = 64  # requests
# -P: the working directory stays off sys.path, where a folder could shadow a library.
COMMAND = (sys.executable, "-P", "-m", "amalgam.rewards.grader")

Item = tuple[Problem, str, bool, str] | tuple[Problem, str, bool, str, int]
"""A problem and the fields of a `Response`: text, whether it ended, mode, tokens."""
Outcome = tuple[str, Any]  # ("score", a list of parts' scores) or (kind of failure, note)


@dataclass(frozen=True)
class _Request:
    index: int  # of the item
    problem: Problem
    response: Response
    parts: tuple[Part, ...]  # of its mix; the judge's are not the child's
    deadline: float  # seconds

    @property
    def preparation(self) -> str:
        """The child's key of what has to be prepared: JSON of the task, its parameters, and the mix."""
        return json.dumps([self.problem.task, self.problem.parameters, self.problem.rewards])

    def to_json(self) -> dict[str, Any]:
        response = self.response
        return {
            "problem": self.problem.to_json(),
            "response": [response.text, response.ended, response.mode, response.tokens],
            "deadline": self.deadline,
        }


class Grader:
    """A context manager around `workers` child processes; for one thread at a time, in any thread.

    Args:
        workers: child processes.
        deadline: seconds for one answer; the child that takes longer is killed and replaced.
        weights: of "task" and "format", for problems that name no rewards.
        command: the child's program.
        judge: prompts to texts, for the reward `judge`.

    `failures` counts the failed samples by kind: "timeout", "raised" (a reward did), "died" (the child did) and "too
    long". `graded` counts all samples, and `seconds` the time that grading them took.
    """

    def __init__(
        self,
        workers: int = 1,
        deadline: float = 5.0,
        weights: Mapping[str, float] | None = None,
        command: Sequence[str] = COMMAND,
        judge: Generator | None = None,
    ) -> None:
        self.failures: Counter[str] = Counter()
        self.graded, self.seconds = 0, 0.0
        self._deadline = deadline
        given = {label: {"weight": weight} for label, weight in (weights or {}).items()}
        self._default = {label: {**part, **given.get(label, {})} for label, part in registry.DEFAULT.items()}
        self._judge = judge
        self._mixes: dict[str, list[Part]] = {}
        self._children = [_Child(command) for _ in range(workers)]

    def __enter__(self) -> Grader:
        for child in self._children:
            child.spawn()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for child in self._children:
            child.kill()

    def grade(self, items: Sequence[Item]) -> list[Score]:
        """Scores of (problem, response without the end token, whether it ended with one, mode[, tokens]), in order.

        A problem's `rewards` say what it is graded by (see `registry.mix`); where it names none, that is its task's own
        scorer and the format. A sample fails, with every part 0 and a note, where a reward misses the deadline, raises,
        or takes the child with it, and where its answer or the whole of it is too long.

        Raises: RuntimeError, with the child's own message, where a child cannot start or prepare a reward; UserError
        for a mix that is none, or a judge that nobody handed in.
        """
        began = time.monotonic()
        requests = [self._request(i, item[0], Response(*list[Any](item[1:]))) for i, item in enumerate(items)]
        outcomes: dict[int, Outcome] = {}
        todo: deque[_Request] = deque()
        for request in requests:
            if (length := len(request.response.text)) > MAX_TEXT:
                outcomes[request.index] = "too long", f"a response of {length} characters; at most {MAX_TEXT}"
            elif any(part.name != "judge" for part in request.parts):
                todo.append(request)
            else:
                outcomes[request.index] = "score", []
        try:
            for request, outcome in self._outcomes(todo):
                outcomes[request.index] = outcome
        except BaseException:
            self.close()  # a child in the middle of a chunk would send the next call this one's outcomes
            raise
        verdicts = self._judged([request for request in requests if outcomes[request.index][0] == "score"])
        scores = [self._score(request, outcomes[request.index], verdicts) for request in requests]
        self.graded, self.seconds = self.graded + len(items), self.seconds + time.monotonic() - began
        return scores

    def _request(self, index: int, problem: Problem, response: Response) -> _Request:
        key = json.dumps(problem.rewards)
        if key not in self._mixes:
            self._mixes[key] = registry.mix(problem.rewards or self._default)
        parts = tuple(self._mixes[key])
        deadline = max(self._deadline, sum(part.seconds for part in parts))
        return _Request(index, problem, response, parts, deadline)

    def _judged(self, requests: list[_Request]) -> dict[tuple[int, str], Score]:
        """The judge's score for each of these, by index and label; it is asked once for each instruction."""
        groups: dict[str, list[tuple[_Request, Part]]] = {}
        for request in requests:
            for part in request.parts:
                if part.name == "judge":
                    groups.setdefault(part.parameters.get("instruction", ""), []).append((request, part))
        scores = {}
        for instruction, group in groups.items():
            if self._judge is None:
                raise UserError("rewards.judge: nobody handed in a generator to judge with")
            verdicts = judge_all([(r.response, r.problem) for r, _ in group], self._judge, instruction)
            scores |= {(r.index, part.label): verdict for (r, part), verdict in zip(group, verdicts, strict=True)}
        return scores

    def _outcomes(self, todo: deque[_Request]) -> Iterator[tuple[_Request, Outcome]]:
        """Every request's outcome, as they come."""
        while todo or any(child.pending for child in self._children):
            for child in self._children:
                if todo and not child.pending:
                    size = min(CHUNK, math.ceil(len(todo) / len(self._children)))
                    child.send([todo.popleft() for _ in range(size)])
            busy = [child for child in self._children if child.pending]
            left = min(child.until for child in busy) - time.monotonic()
            wait([child.link for child in busy], max(0.0, left))
            for child in busy:
                yield from child.outcomes()
                if not child.running:
                    todo.extendleft(reversed(child.pending))
                    child.pending.clear()

    def _score(self, request: _Request, outcome: Outcome, verdicts: dict[tuple[int, str], Score]) -> Score:
        kind, detail = outcome
        if kind != "score":
            self.failures[kind] += 1
            return Score(0.0, False, dict.fromkeys((part.label for part in request.parts), 0.0), detail)
        own = iter(detail)
        scores = [
            verdicts[request.index, part.label] if part.name == "judge" else Score(*next(own)) for part in request.parts
        ]
        return registry.combine(request.parts, scores)


class _Child:
    """A grading process and our end of the socket to it (a socket, because its writes can time out)."""

    def __init__(self, command: Sequence[str]) -> None:
        self.pending: deque[_Request] = deque()  # sent, without an outcome yet
        self.until = math.inf  # when the first of them is late
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether it was spawned and not killed since; it may have ended by itself."""
        return self._process is not None

    def spawn(self) -> None:
        self.link, theirs = socket.socketpair()
        self._received = b""
        self._started = False
        self._prepared: set[str] = set()
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # else their stacks fill MEMORY
        with theirs:
            self._process = subprocess.Popen(
                self._command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, **one_thread},
                start_new_session=True,
            )

    def kill(self) -> tuple[str, str]:
        """Ends the process and all that it started; says how it ended, and what it wrote when it started."""
        if self._process is None:
            return "not started", ""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        words = self._process.communicate(timeout=START)[1].decode(errors="replace")
        code = self._process.wait()
        self._process = None
        self.link.close()
        return (f"signal {-code}" if code < 0 else f"exit code {code}"), " ".join(words.split())[-1000:]

    def send(self, requests: Sequence[_Request]) -> None:
        """Hands a chunk to the idle child, which is started where it is not alive, with its rewards prepared."""
        if self._process and self._process.poll() is not None:
            self.kill()
        if not self.running:
            self.spawn()
        if not self._started:
            self._await("started")
            self._started = True
        if new := {request.preparation for request in requests} - self._prepared:
            self._write({"prepare": sorted(new)})
            self._await("prepared")
            self._prepared |= new
        self._write({"grade": [request.to_json() for request in requests]})
        self.pending.extend(requests)
        self.until = time.monotonic() + requests[0].deadline

    def outcomes(self) -> Iterator[tuple[_Request, Outcome]]:
        """Those that came. A child that died or is late is killed, and its first pending request fails."""
        lines, open_ = self._read(timeout=0.0)
        for line in lines:
            kind, detail = json.loads(line)
            done = self.pending.popleft()
            self.until = time.monotonic() + (self.pending[0].deadline if self.pending else 0.0)
            yield done, (kind, detail)
        if not self.pending:
            return
        if not open_:
            yield self.pending.popleft(), ("died", f"grader died: {self.kill()[0]}")
        elif time.monotonic() > self.until:
            self.kill()
            late = self.pending.popleft()
            yield late, ("timeout", f"timeout after {late.deadline:g} s: {late.problem.task}")

    def _write(self, message: object) -> None:
        """One line. That a child is gone is left to the next read to notice."""
        self.link.settimeout(START)
        try:
            self.link.sendall(json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            pass
        except TimeoutError as error:
            raise RuntimeError(f"a grading process took no message within {START:g} s") from error

    def _await(self, word: str) -> None:
        """Reads the line `word`; anything else, or nothing in time, is an error."""
        until = time.monotonic() + START
        lines, open_ = self._read(START)
        while open_ and not lines and (left := until - time.monotonic()) > 0:
            lines, open_ = self._read(left)
        if lines != [json.dumps(word).encode()]:
            how, words = self.kill()
            said = b"".join(lines).decode() or words or "nothing"
            raise RuntimeError(f"no grading process was {word} (deadline {START:g} s; {how}): {said}")

    def _read(self, timeout: float) -> tuple[list[bytes], bool]:
        """Whole lines, those of one read, and whether the child still has its end open."""
        self.link.settimeout(timeout)
        try:
            data = self.link.recv(1 << 16)
        except (TimeoutError, BlockingIOError):
            return [], True
        except ConnectionResetError:
            return [], False
        *lines, self._received = (self._received + data).split(b"\n")
        return lines, bool(data)


def main() -> None:
    """The child: reads lines of JSON from file descriptor 0, a socket, and answers there.

    It says "started"; {"prepare": keys} gets "prepared"; {"grade": requests} gets one line for each request: ["score",
    the scores of its rewards], ["raised", what a reward raised] or ["too long", how long].
    """
    link = socket.socket(fileno=os.dup(0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_guard)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)  # a reward shall read no requests,
    os.dup2(nothing, 2)  # and fill no pipe with warnings
    _say(link, "started")
    mixes: dict[str, list[Part]] = {}
    for line in link.makefile("rb"):
        message = json.loads(line)
        if "prepare" in message:
            _say(link, _prepare(mixes, message["prepare"]))
            continue
        for request in message["grade"]:
            # Should the parent be gone by now, nobody else ends a reward that hangs: SIGALRM does.
            signal.setitimer(signal.ITIMER_REAL, request["deadline"] + 5.0)
            _say(link, _outcome(mixes, Problem.from_json(request["problem"]), Response(*request["response"])))
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _prepare(mixes: dict[str, list[Part]], keys: list[str]) -> str:
    try:
        for key in keys:
            task, parameters, rewards = json.loads(key)
            problem = Problem("", task, 0, "", "", {}, parameters, rewards)
            parts = registry.mix(rewards or registry.DEFAULT)
            mixes[json.dumps(rewards)] = [part for part in parts if part.name != "judge"]
            for part in parts:
                part.prepare(problem)
    except Exception as error:  # the parent raises it
        return f"{type(error).__name__}: {error}"
    return "prepared"


class _Guard:
    """The audit hook that keeps our rewards from running an answer: `eval` of a string compiles it first."""

    allows: Callable[[str], bool] | None = None  # the code that may be compiled; None for any

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allows is None or event != "compile":
            return
        source = arguments[0]
        text = source.decode(errors="replace") if isinstance(source, bytes) else source
        if not isinstance(text, str) or not self.allows(text):
            raise PermissionError("a scorer may not compile code")


_guard = _Guard()


def _outcome(mixes: dict[str, list[Part]], problem: Problem, response: Response) -> Outcome:
    scores = []
    try:
        for part in mixes[json.dumps(problem.rewards)]:
            _guard.allows = part.compiles
            score = part.grade(response, problem)
            scores.append([score.value, score.correct, score.parts, score.note])
    except TooLong as error:
        return "too long", str(error)
    except (Exception, SystemExit) as error:
        return "raised", " ".join(f"{type(error).__name__}: {error}".split())[:200].removesuffix(":")
    finally:
        _guard.allows = None
    return "score", scores


def _say(link: socket.socket, words: object) -> None:
    link.sendall(json.dumps(words).encode() + b"\n")


if __name__ == "__main__":
    main()
