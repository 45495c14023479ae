"""Sandboxes that are started ahead of time, each used for one program: `Sandboxes`.

A sandbox is Python as process 1 of its own namespaces, started by `chain.py`, with the root of `root.py`, the filter
of `bpf.py` and the program of `guest.py`. What comes out of it is data: text that a program printed, how it ended, or
plain values. What it ought to be never goes in.
"""

import contextlib
import json
import marshal
import os
import selectors
import socket
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from .chain import Command, command

START = 30.0  # seconds for a sandbox to be ready
GRACE = 2.0  # seconds for a sandbox that is done to end by itself
SPARE = 5.0  # seconds beyond a job's own wall time until its sandbox counts as lost


@dataclass(frozen=True)
class Limits:
    """What one job may take. All are our choice."""

    wall: float = 10.0
    """Seconds; of a whole problem's unit tests, or of one run with one input. CPU time of each process: as much."""
    memory: int = 512 * 2**20
    """Bytes that all its processes hold at once, and the files in /tmp; a process may map twice as much."""
    disk: int = 64 * 2**20
    """Bytes in /tmp, and in one file. Fixed when a sandbox starts."""
    processes: int = 32
    """Processes and threads at once."""
    output: int = 2**20
    """Bytes of output and errors together, and of one message of unit tests."""


@dataclass(frozen=True)
class Ended:
    """How a program ended in its sandbox."""

    end: str
    """"exit 0", "signal 9", "raised" (unit tests: while it was loaded), "timeout", "memory", "output" or "files" (the
    limit that it broke), or "lost" (it took the sandbox with it)."""
    output: str = ""
    errors: str = ""
    """The last 2,000 bytes."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    """The most memory seen, by looks 10 ms apart; 0 for a program that was done before the first."""


@dataclass(frozen=True)
class Verdict:
    """One unit test."""

    ok: bool
    note: str = ""


class Lost(RuntimeError):
    """A sandbox that did not answer in time, or is gone."""


class Sandboxes:
    """A context manager that keeps `ready` sandboxes started. For one thread, which has to live as long as they do.

    Args:
        ready: sandboxes to keep started; a run of unit tests uses two at once.
        limits: of a job, unless it brings its own.
        python: the interpreter, whose standard library programs get; None for the one that runs this.

    Raises: UserError where no sandbox can run, with bubblewrap's own words.
    """

    def __init__(self, ready: int = 2, limits: Limits = Limits(), python: Path | None = None) -> None:
        self.limits = limits
        self._command = command(limits.disk, python)
        self._ready = ready
        self._pool: deque[_Sandbox] = deque()
        self._leaving: list[_Sandbox] = []

    def __enter__(self) -> "Sandboxes":
        self._fill()
        try:
            for sandbox in self._pool:
                sandbox.await_ready()
        except Lost as error:
            self.close()
            raise UserError(
                f"sandbox: cannot run here: {error}; it needs unprivileged user namespaces (some systems and most "
                "containers switch them off) and Linux 5.14; untrusted code is run nowhere else"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every sandbox and waits until they are gone."""
        while self._pool:
            self._leave(self._pool.popleft())
        for sandbox in self._leaving:
            sandbox.wait(GRACE)
        self._leaving.clear()

    def runs(self, source: str, inputs: Sequence[str], limits: Limits | None = None) -> Iterator[Ended]:
        """How the program ends with each input on its standard input, one after another in one sandbox.

        Closing the iterator ends the sandbox. Processes do not outlive their run; files in /tmp do.
        """
        limits = limits or self.limits
        sandbox, lost = self._take(), ""
        try:
            for given in inputs:
                if lost:  # its late answer would be taken for this input's
                    yield Ended("lost", errors=lost)
                    continue
                try:
                    sandbox.send(_job("run", limits, source=source, stdin=given))
                    yield sandbox.reply(time.monotonic() + limits.wall + SPARE)
                except Lost as error:
                    lost = str(error)
                    yield Ended("lost", errors=lost)
        finally:
            self._leave(sandbox)

    def check(
        self, source: str, tests: Sequence[str], setup: str = "", entry: str = "", limits: Limits | None = None
    ) -> tuple[list[Verdict], Ended]:
        """Unit tests of a program's functions: each test's verdict, and how the program ended.

        The tests run in a sandbox of their own. What they call there is the program's only by name: arguments and
        results travel as plain data, by value, and exceptions as builtin ones, so that the program neither sees a test
        nor touches what judges it.

        Args:
            tests: Python, each with names of its own.
            setup: Python that runs once before the tests, in their sandbox.
            entry: the one name that is the program's, even if `setup` defines it; `candidate` is another for it.
                Without it, that is every name which neither a test, nor `setup`, nor the standard library defines.
        """
        limits = limits or self.limits
        until = time.monotonic() + limits.wall
        program, judge = self._take(), self._take()
        try:
            program.send(_job("serve", limits, source=source))
            judge.send(_job("test", limits, tests=list(tests), setup=setup, entry=entry))
            return _Relay(program, judge, limits.output).verdicts(len(tests), until)
        finally:
            self._leave(program)
            self._leave(judge)

    def _take(self) -> "_Sandbox":
        """A fresh sandbox; the next one starts meanwhile."""
        while self._pool:
            sandbox = self._pool.popleft()
            try:
                sandbox.await_ready()
                break
            except Lost:  # it died while it waited, as when the thread that started it has ended
                self._leave(sandbox)
        else:
            sandbox = _Sandbox(self._command)
            sandbox.await_ready()
        self._fill()
        return sandbox

    def _leave(self, sandbox: "_Sandbox") -> None:
        """Lets a sandbox end by itself, which takes some milliseconds, and ends those that have had their time."""
        sandbox.close()
        self._leaving = [each for each in [*self._leaving, sandbox] if not each.gone()]

    def _fill(self) -> None:
        while len(self._pool) < self._ready:
            self._pool.append(_Sandbox(self._command))


class _Sandbox:
    """One sandbox, and our ends of its two sockets: for jobs, and the wire for unit tests."""

    def __init__(self, command: Command) -> None:
        self.control, theirs = socket.socketpair()
        self.wire, wire = socket.socketpair()
        self.lines: dict[socket.socket, bytes] = {self.control: b"", self.wire: b""}
        self._ready = False
        rules = os.open(command.filter, os.O_RDONLY)
        try:
            with theirs, wire:
                self._process = subprocess.Popen(
                    command.of(rules, wire.fileno()),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=(rules, wire.fileno()),
                    start_new_session=True,
                    env={},
                )
        finally:
            os.close(rules)

    def await_ready(self) -> None:
        """Raises Lost, with what the chain wrote, if it does not start."""
        if self._ready:
            if self._process.poll() is not None:
                raise Lost("it ended")
            return
        try:
            started = self.line(self.control, time.monotonic() + START)
        except Lost as error:
            self._process.kill()
            words = self._process.communicate(timeout=START)[1].decode(errors="replace")
            raise Lost(" ".join(words.split())[-300:] or str(error)) from None
        if started != b"ready":
            raise Lost(f"it said {started!r:.80}")
        self._ready = True

    def send(self, job: dict[str, Any]) -> None:
        data = marshal.dumps(job, 4)
        self.write(self.control, len(data).to_bytes(8, "little") + data, time.monotonic() + SPARE)

    def reply(self, until: float) -> Ended:
        """How the job ended, which `guest.run` says."""
        end, seconds, cpu, peak, out, err = self.line(self.control, until).decode().split(",")
        while len(self.lines[self.control]) < int(out) + int(err):
            self.receive(self.control, until, int(out) + int(err))
        data, self.lines[self.control] = self.lines[self.control], b""
        output, errors = (each.decode(errors="replace") for each in (data[: int(out)], data[int(out) :]))
        return Ended(end, output, errors, float(seconds), float(cpu), int(peak))

    def write(self, link: socket.socket, data: bytes, until: float) -> None:
        """Raises Lost if the sandbox takes no more."""
        link.settimeout(max(0.001, until - time.monotonic()))
        try:
            link.sendall(data)
        except OSError as error:
            raise Lost(f"it took no message: {error}") from None

    def line(self, link: socket.socket, until: float, longest: int = 1 << 26) -> bytes:
        """The next line from one of the sockets. Raises Lost at its end, at `until`, or if it is too long."""
        while b"\n" not in self.lines[link]:
            self.receive(link, until, longest)
        line, _, self.lines[link] = self.lines[link].partition(b"\n")
        return line

    def receive(self, link: socket.socket, until: float, longest: int) -> None:
        link.settimeout(max(0.001, until - time.monotonic()))
        try:
            data = link.recv(1 << 16)
        except TimeoutError:
            raise Lost("it did not answer in time") from None
        except OSError as error:
            raise Lost(str(error)) from None
        self.lines[link] += data
        if not data or len(self.lines[link]) > longest:
            raise Lost("it ended" if not data else f"its message is over {longest} bytes")

    def close(self) -> None:
        """Closes the sockets. Process 1 ends when it sees that, and bubblewrap then reaps it."""
        self._closed = time.monotonic()
        for link in self.lines:
            link.close()

    def gone(self) -> bool:
        """Whether a closed sandbox has ended; it is killed if it has not within `GRACE` seconds."""
        if self._process.poll() is None and time.monotonic() > self._closed + GRACE:
            self.wait(0.0)
        if self._process.returncode is not None and self._process.stderr is not None:
            self._process.stderr.close()
        return self._process.returncode is not None

    def wait(self, seconds: float) -> None:
        """Ends with bubblewrap, and with it (--die-with-parent) everything inside, after so many seconds at most."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(START)
        assert self._process.stderr is not None
        self._process.stderr.close()


class _Relay:
    """Carries calls from the tests' sandbox to the program's, and the answers back, until all have a verdict."""

    def __init__(self, program: _Sandbox, judge: _Sandbox, longest: int) -> None:
        self._program, self._judge, self._longest = program, judge, longest

    def verdicts(self, count: int, until: float) -> tuple[list[Verdict], Ended]:
        tested: list[Verdict] = []
        try:
            loaded = json.loads(self._from_program(until))["loaded"]
            if "raise" in loaded:
                ended = Ended("raised", errors=f"{loaded['raise']}: {loaded['text']}")
                return [Verdict(False, "the program does not load")] * count, ended
            while len(tested) < count:
                message = self._from_judge(until)
                told = json.loads(message)
                if "test" in told:
                    tested.append(Verdict(told["ok"] is True, str(told["note"])))
                    continue
                self._program.write(self._program.wire, message + b"\n", until)
                self._judge.write(self._judge.wire, self._from_program(until) + b"\n", until)
        except (Lost, ValueError, KeyError, TypeError, RecursionError) as error:
            ended = Ended("timeout") if time.monotonic() >= until else self._ended(f"{error}")
            note = f"the run ended: {ended.end}"
            return [*tested, *[Verdict(False, note)] * (count - len(tested))], ended
        return tested, Ended("exit 0")

    def _from_program(self, until: float) -> bytes:
        return self._line(self._program, until)

    def _from_judge(self, until: float) -> bytes:
        return self._line(self._judge, until)

    def _line(self, sandbox: _Sandbox, until: float) -> bytes:
        """The next line on a wire. Raises Lost as soon as its job has ended, too."""
        with selectors.DefaultSelector() as selector:
            selector.register(sandbox.wire, selectors.EVENT_READ)
            selector.register(sandbox.control, selectors.EVENT_READ)
            while b"\n" not in sandbox.lines[sandbox.wire]:
                ready = {key.fileobj for key, _ in selector.select(max(0.0, until - time.monotonic()))}
                if sandbox.wire in ready:
                    sandbox.receive(sandbox.wire, until, self._longest)
                elif ready:
                    raise Lost("its process ended")
                else:
                    raise Lost("timeout")
        return sandbox.line(sandbox.wire, until)

    def _ended(self, note: str) -> Ended:
        """What the program's process 1 says of its end, if it ended by itself."""
        with contextlib.suppress(Lost, ValueError):
            return self._program.reply(time.monotonic() + 0.05)
        return Ended("lost", errors=note)


def _job(kind: str, limits: Limits, **more: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "wall": limits.wall,
        "memory": limits.memory,
        "disk": limits.disk,
        "processes": limits.processes,
        "output": limits.output,
        **more,
    }
