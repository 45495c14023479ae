"""Grading in child processes that can be killed: a scorer that hangs, raises or crashes costs its own sample.

The parent reads the answer out of the response and sends it, as JSON over a socket, to a child, which runs
the task's own scorer under a memory limit. Requests travel in chunks, so that a child never waits for the
next one; outcomes come one by one, and each restarts the deadline. The child does not import torch, and lets
no scorer compile code: several of reasoning-gym's call `eval` on the answer (`countdown` through sympy).
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

from .problem import Problem, Score, decode, encode

WEIGHTS = {"task": 0.9, "format": 0.1}  # our choice
MAX_ANSWER = 20_000  # characters
MEMORY = 2 * 2**30  # bytes of address space for a child
START = 120.0  # seconds for a child to import reasoning-gym, and again to build the scorers of a chunk
CHUNK = 64  # requests
# -P: the working directory stays off sys.path, where a folder could shadow a library.
COMMAND = (sys.executable, "-P", "-m", "amalgam.rewards.grader")

Item = tuple[Problem, str, bool, str]
Scorer = Callable[[str, dict[str, Any]], float]
Outcome = tuple[str, Any]  # ("score", 0..1) or (kind of failure, note)


def parse(text: str, mode: str) -> tuple[str | None, bool]:
    """The answer in a response, and whether its content is nothing but the answer.

    The content is all of the response in mode "chat", and what follows `</think>` in mode "high". There is no
    answer without that `</think>`, with a further think tag, or unless the content has exactly one
    `<answer>...</answer>` (our choice; reasoning-gym takes the last of several). White space around the
    answer is dropped.
    """
    content = text
    if mode == "high":
        _, end, content = text.partition("</think>")
        if not end:
            return None, False
    elif mode != "chat":
        raise ValueError(f"unknown mode {mode!r}")
    if "<think>" in content or "</think>" in content:
        return None, False
    if content.count("<answer>") != 1 or content.count("</answer>") != 1:
        return None, False
    before, _, rest = content.partition("<answer>")
    answer, closed, after = rest.partition("</answer>")
    if not closed:
        return None, False
    return answer.strip(), not (before.strip() or after.strip())


@dataclass(frozen=True)
class _Request:
    index: int  # of the item
    problem: Problem
    answer: str
    form: float  # the format part

    @property
    def scorer(self) -> str:
        """The child's key of the scorer: JSON of the task and its parameters."""
        return json.dumps([self.problem.task, self.problem.parameters])

    def to_json(self) -> dict[str, Any]:
        return {"scorer": self.scorer, "answer": self.answer, "entry": encode(self.problem.entry)}


class Grader:
    """A context manager around `workers` child processes; for one thread at a time, in any thread.

    Args:
        workers: child processes.
        deadline: seconds for one answer; the child that takes longer is killed and replaced.
        weights: of the parts in `Score.value`, summing to 1.
        command: the child's program.

    `failures` counts the failed samples by kind: "timeout", "raised" (the scorer did), "died" (the child did)
    and "too long".
    """

    def __init__(
        self,
        workers: int = 1,
        deadline: float = 5.0,
        weights: Mapping[str, float] = WEIGHTS,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.failures: Counter[str] = Counter()
        self._deadline = deadline
        self._weights = weights
        self._children = [_Child(command, deadline) for _ in range(workers)]

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
        """Scores of (problem, response without the end token, whether it ended with one, mode), in order.

        The task part is the score of the task's own scorer, clipped to 0..1, and 0 without an answer (see
        `parse`). The format part is 1 where the response ended with the end token and its content is nothing
        but the answer. A sample fails, with every part 0 and a note, where its scorer misses the deadline,
        raises, or takes the child with it, and where its answer is over 20,000 characters.

        Raises: RuntimeError, with the child's own message, where a child cannot start or build a scorer.
        """
        scores: dict[int, Score] = {}
        todo: deque[_Request] = deque()
        for index, (problem, text, ended, mode) in enumerate(items):
            answer, alone = parse(text, mode)
            request = _Request(index, problem, answer or "", float(ended and alone))
            if answer is None:
                scores[index] = self._score(request, ("score", 0.0))
            elif len(answer) > MAX_ANSWER:
                note = f"an answer of {len(answer)} characters; at most {MAX_ANSWER}"
                scores[index] = self._score(request, ("too long", note))
            else:
                todo.append(request)
        try:
            for request, outcome in self._outcomes(todo):
                scores[request.index] = self._score(request, outcome)
        except BaseException:
            self.close()  # a child in the middle of a chunk would send the next call this one's outcomes
            raise
        return [scores[index] for index in range(len(items))]

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

    def _score(self, request: _Request, outcome: Outcome) -> Score:
        kind, detail = outcome
        if kind != "score":
            self.failures[kind] += 1
            return Score(0.0, False, {"task": 0.0, "format": 0.0}, detail)
        parts = {"task": detail, "format": request.form}
        value = sum(self._weights[part] * parts[part] for part in parts)
        return Score(value, parts == {"task": 1.0, "format": 1.0}, parts)


class _Child:
    """A grading process and our end of the socket to it (a socket, because its writes can time out)."""

    def __init__(self, command: Sequence[str], deadline: float) -> None:
        self.pending: deque[_Request] = deque()  # sent, without an outcome yet
        self.until = math.inf  # when the first of them is late
        self._command = command
        self._deadline = deadline
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether it was spawned and not killed since; it may have ended by itself."""
        return self._process is not None

    def spawn(self) -> None:
        self.link, theirs = socket.socketpair()
        self._received = b""
        self._started = False
        self._built: set[str] = set()
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
        """Hands a chunk to the idle child, which is started where it is not alive, with its scorers built."""
        if self._process and self._process.poll() is not None:
            self.kill()
        if not self.running:
            self.spawn()
        if not self._started:
            self._await("started")
            self._started = True
        if scorers := {request.scorer for request in requests} - self._built:
            self._write({"build": sorted(scorers)})
            self._await("built")
            self._built |= scorers
        self._write({"deadline": self._deadline, "grade": [request.to_json() for request in requests]})
        self.pending.extend(requests)
        self.until = time.monotonic() + self._deadline

    def outcomes(self) -> Iterator[tuple[_Request, Outcome]]:
        """Those that came. A child that died or is late is killed, and its first pending request fails."""
        lines, open_ = self._read(timeout=0.0)
        for line in lines:
            self.until = time.monotonic() + self._deadline
            kind, detail = json.loads(line)
            yield self.pending.popleft(), (kind, detail)
        if not self.pending:
            return
        if not open_:
            yield self.pending.popleft(), ("died", f"grader died: {self.kill()[0]}")
        elif time.monotonic() > self.until:
            self.kill()
            late = self.pending.popleft()
            yield late, ("timeout", f"timeout after {self._deadline:g} s: {late.problem.task}")

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

    It says "started"; {"build": scorers} gets "built"; {"deadline": seconds, "grade": requests} gets one line
    for each request: ["score", 0..1] or ["raised", what the scorer raised].
    """
    from . import domains

    link = socket.socket(fileno=os.dup(0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    domains.task_names()  # imports reasoning-gym
    sys.addaudithook(_no_code)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)  # a scorer shall read no requests,
    os.dup2(nothing, 2)  # and fill no pipe with warnings
    _say(link, "started")
    scorers: dict[str, Scorer] = {}
    for line in link.makefile("rb"):
        message = json.loads(line)
        if "build" in message:
            _say(link, _build(scorers, message["build"]))
            continue
        for request in message["grade"]:
            # Should the parent be gone by now, nobody else ends a scorer that hangs: SIGALRM does.
            signal.setitimer(signal.ITIMER_REAL, message["deadline"] + 5.0)
            _say(link, _outcome(scorers[request["scorer"]], request))
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _build(scorers: dict[str, Scorer], keys: list[str]) -> str:
    from .domains import make_scorer

    try:
        scorers.update({key: make_scorer(*json.loads(key)) for key in keys})
    except Exception as error:  # the parent raises it
        return f"{type(error).__name__}: {error}"
    return "built"


class _NoCode:
    """The audit hook that keeps a scorer from running an answer: `eval` of a string compiles it first."""

    active = False

    def __call__(self, event: str, _: tuple[object, ...]) -> None:
        if self.active and event == "compile":
            raise PermissionError("a scorer may not compile code")


_no_code = _NoCode()


def _outcome(scorer: Scorer, request: dict[str, Any]) -> Outcome:
    _no_code.active = True
    try:
        score = float(scorer(request["answer"], decode(request["entry"])))
        if not math.isfinite(score):
            raise ValueError(f"its score is {score}")
    except (Exception, SystemExit) as error:
        return "raised", " ".join(f"{type(error).__name__}: {error}".split())[:200]
    finally:
        _no_code.active = False
    return "score", min(max(score, 0.0), 1.0)


def _say(link: socket.socket, words: object) -> None:
    link.sendall(json.dumps(words).encode() + b"\n")


if __name__ == "__main__":
    main()
