"""A command with all its descendants: the CPU seconds and the memory they use, read from /proc (Linux)."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_TICK = os.sysconf("SC_CLK_TCK")
_READING_SECONDS = 0.5  # between two readings of all processes

AMALGAM = (sys.executable, "-P", "-m", "amalgam.pipelines.cli")
ENVIRONMENT = {  # of every command: one thread a process, nothing from the Hub
    **os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}  # fmt: skip


class Job:
    """A running command. A context manager that leaves no process of it behind, however it ends.

    Its descendants are all descendants of this process: while a Job exists, orphans come to us and not to init (Ray's
    servers outlive their parents). So use one Job at a time, and start no other process beside it.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str], folder: Path):
        self.log = log
        self.peak_bytes = 0  # highest sum of the processes' proportional set sizes
        self._used: dict[tuple[int, str], float] = {}  # (pid, its start) -> its own CPU seconds at its last reading
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
        with log.open("wb") as out:
            self.root = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, cwd=folder,
                start_new_session=True,
            )  # fmt: skip
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()
        self._take_readings()
        while pids := _descendants():
            for pid in pids:
                with suppress(ProcessLookupError):  # its parent has waited for it meanwhile
                    os.kill(pid, signal.SIGKILL)
            for pid in pids:
                with suppress(ChildProcessError):  # its parent is another of them: it comes to us in the next round
                    os.waitpid(pid, 0)
            time.sleep(0.01)

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of all processes, ended ones too, each at its last reading (each 0.5 s, and the block's end)."""
        return sum(self._used.values())

    def tail(self) -> str:
        """The end of the command's output."""
        return self.log.read_text(errors="replace")[-2000:]

    def cpu(self) -> Counter[str]:
        """CPU seconds so far by role (`_role`), those of ended processes with the parent that waited for them.

        Nobody waits for orphans before the end, so none of their seconds is lost. Those of an actor are when it ends:
        its parent, the raylet, ignores SIGCHLD and never waits for it. Then use `cpu_seconds`.
        """
        seconds: Counter[str] = Counter()
        for pid, fields in _descendants().items():
            used = sum(int(ticks) for ticks in fields[11:15])  # utime, stime, cutime, cstime: man 5 proc
            seconds[self._role(pid)] += used / _TICK  # pyright: ignore[reportArgumentType]
        return seconds

    def _role(self, pid: int) -> str:
        """`main`, the class of a Ray actor, `grader`, or `ray` for everything else."""
        command = _read(pid, "cmdline").decode(errors="replace")
        if pid == self.root.pid:
            return "main"
        if command.startswith("ray::") and "Worker" in command:
            return command.removeprefix("ray::").split(".")[0].strip("\0 ")
        return "grader" if "amalgam.rewards.grader" in command else "ray"

    def _watch(self) -> None:
        while not self._ended.wait(_READING_SECONDS):
            self._take_readings()

    def _take_readings(self) -> None:
        found = _descendants()
        for pid, fields in found.items():
            self._used[pid, fields[19]] = (int(fields[11]) + int(fields[12])) / _TICK  # utime, stime; start
        self.peak_bytes = max(self.peak_bytes, sum(map(_pss, found)))


def _descendants() -> dict[int, list[str]]:
    """pid -> the fields of /proc/PID/stat from the third on, of all our descendants, zombies too."""
    fields = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := _read(int(entry), "stat")):
            fields[int(entry)] = stat.decode(errors="replace").rpartition(")")[2].split()
    children: dict[int, list[int]] = {}
    for pid, values in fields.items():
        children.setdefault(int(values[1]), []).append(pid)
    found: dict[int, list[str]] = {}
    new = children.get(os.getpid(), [])
    while new:
        found |= {pid: fields[pid] for pid in new}
        new = [child for pid in new for child in children.get(pid, [])]
    return found


def _pss(pid: int) -> int:
    """Proportional set size in bytes: pages that n processes share count as 1/n for each."""
    lines = _read(pid, "smaps_rollup").decode().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def _read(pid: int, name: str) -> bytes:
    """A file of /proc/PID; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
