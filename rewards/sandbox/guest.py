"""What runs inside a sandbox, as its process 1: starts the program, watches it, and says how it ended.

It is copied into the sandbox's root and imports nothing but the standard library. Nothing that it says is believed
beyond what the program might have printed itself: verdicts are reached outside, or in another sandbox.

The host sends jobs, {"kind": "run" | "serve" | "test", ...}: a length in 8 bytes, then marshal's. For each it gets a
line "END SECONDS CPU PEAK OUT ERR", the last two being lengths, then so many bytes of output and of errors. `serve` and
`test` talk on a second socket meanwhile, the wire.

Starting takes most of a sandbox's time: this imports no more than it must, some of it without the half in Python.
"""

import _signal  # pyright: ignore[reportMissingImports]
import _socket
import builtins
import marshal
import os
import resource
import select
import sys
import time

TICK = 0.01  # seconds between two looks at the memory
NOTE = 2000  # bytes kept of a program's errors
FILES = 10_000  # inodes in /tmp, which cost the kernel memory


def main():
    """Jobs until the host closes its end. As process 1, this one takes no signal from inside of the sandbox."""
    wire, control = int(sys.argv[1]), _socket.socket(fileno=os.dup(0))
    builtins.exit = builtins.quit = sys.exit  # which `site`, not loaded here, would have set
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # process 1 gets no signal from inside but those that it handles
    control.sendall(b"ready\n")
    while True:
        job = marshal.loads(_exactly(control, int.from_bytes(_exactly(control, 8), "little")))
        control.sendall(run(job, wire, control))


def _exactly(link, count):
    data = b""
    while len(data) < count:
        more = link.recv(count - len(data))
        if not more:
            os._exit(0)  # the host is gone, and with process 1 goes everything
        data += more
    return data


def run(job, wire, control):
    """Starts the job in a child, waits for its end, kills whatever it left, and reports."""
    given = _file_of(job.get("stdin", ""))
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    began = time.monotonic()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if not child:
        control.detach()
        _become(job, wire, given, out_end, err_end)
        _leave(_program(job, wire))
    for fd in (given, out_end, err_end):
        os.close(fd)
    watch = Watch(job, child, {out: bytearray(), err: bytearray()})
    end = watch.until_the_end(control, began + job["wall"])
    status = sweep(child)
    watch.drain()
    if end is None:
        code = os.waitstatus_to_exitcode(status)
        end = f"signal {-code}" if code < 0 else f"exit {code}"
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, cpu = time.monotonic() - began, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    printed, errors = watch.pipes[out][: job["output"]], watch.pipes[err][-NOTE:]
    return f"{end},{seconds},{cpu},{watch.peak},{len(printed)},{len(errors)}\n".encode() + printed + errors


class Watch:
    """Reads a job's pipes and looks at the memory of all processes together, and at the files that they made."""

    def __init__(self, job, child, pipes):
        self.job, self.pipes, self.open = job, pipes, set(pipes)
        self.peak = self.read = 0
        self.ended = os.pidfd_open(child)

    def until_the_end(self, control, deadline):
        """None once the child is gone, else why it has to go: "timeout", "memory", "files" or "output"."""
        poll = select.poll()
        for fd in (*self.open, self.ended):
            poll.register(fd, select.POLLIN)
        poll.register(control, select.POLLRDHUP)
        look = time.monotonic() + TICK
        while True:
            now = time.monotonic()
            if now >= deadline:
                return "timeout"
            if now >= look:
                if broken := self.look():
                    return broken
                look = time.monotonic() + TICK
            wait = max(0.0, min(deadline, look) - now)
            for fd, _ in poll.poll(wait * 1000 + 1):
                if fd == control.fileno():
                    os._exit(0)  # the host is gone
                if fd == self.ended:
                    return None
                if not self.take(fd):
                    poll.unregister(fd)
                if self.read > self.job["output"]:
                    return "output"

    def look(self):
        disk = os.statvfs("/tmp")
        total = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        for name in os.listdir("/proc"):
            if name.isdigit() and name != "1":
                try:
                    total += _held(name)
                except (FileNotFoundError, ProcessLookupError):
                    continue  # it has ended
        self.peak = max(self.peak, total)
        if total > self.job["memory"]:
            return "memory"
        return "files" if disk.f_files - disk.f_ffree > FILES else None

    def take(self, fd):
        """Reads what is there; False at the end of the pipe."""
        data = os.read(fd, 1 << 16)
        self.read += len(data)
        self.pipes[fd] += data
        if not data:
            self.open.discard(fd)
        return bool(data)

    def drain(self):
        """What is left in the pipes, now that nobody writes into them any more."""
        for fd in list(self.open):
            while self.take(fd):
                pass
        for fd in (*self.pipes, self.ended):
            os.close(fd)


def _held(process):
    """Bytes that a process holds, other than files' own pages. What several share is counted for each of them."""
    with open(f"/proc/{process}/status", "rb") as file:
        lines = [line for line in file.read().splitlines() if line.startswith((b"RssAnon", b"RssShmem"))]
    return 1024 * sum(int(line.split()[1]) for line in lines)


def sweep(child):
    """Kills every process but this one, and reaps them all; the child's status."""
    status = 0
    try:  # noqa: SIM105 - no contextlib here
        os.kill(-1, _signal.SIGKILL)
    except ProcessLookupError:
        pass  # nobody is left
    while True:
        try:
            pid, ended = os.waitpid(-1, 0)
        except ChildProcessError:
            return status
        if pid == child:
            status = ended


def _file_of(text):
    """A file that has no name, with this text in it, open for reading."""
    fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
    with open(fd, "wb", closefd=False) as file:
        file.write(text.encode(errors="replace"))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _become(job, wire, given, out, err):
    """Turns the forked child into a process that has its job's files and limits and nothing of process 1."""
    os.setsid()
    for source, target in ((given, 0), (out, 1), (err, 2)):
        os.dup2(source, target)
    keep = wire if job["kind"] != "run" else 2
    os.closerange(3, keep)
    os.closerange(keep + 1, 1 << 10)
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        file = open(fd, "w" if fd else "r", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)
    sys.argv = ["main.py"]
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    os.nice(5)  # the watch goes first
    seconds = int(job["wall"]) + 1
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, 2 * job["memory"]),
        (resource.RLIMIT_NPROC, job["processes"]),
        (resource.RLIMIT_FSIZE, job["disk"]),
        (resource.RLIMIT_NOFILE, 128),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _program(job, wire):
    """Runs the child's job; its exit code."""
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    try:
        if job["kind"] == "test":
            test(job, _socket.socket(fileno=wire))
        elif job["kind"] == "serve":
            serve(job, _socket.socket(fileno=wire), main.__dict__)
        else:
            exec(compile(job["source"], "main.py", "exec"), main.__dict__)
    except SystemExit as error:
        if isinstance(error.code, int) or error.code is None:
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    return 0


def _leave(code):
    """Ends the child as Python does (threads, atexit, buffers) without taking every object apart."""
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        import atexit

        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 255)


# The wire: calls of the program's functions, from the tests' sandbox to the program's. JSON lines, and values as `pack`
# writes them: whatever the other side sends, only plain data comes out.


class Opaque(TypeError):
    """What is not plain data."""


def pack(value):
    """Plain data in JSON's types. Raises: Opaque for anything else."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 53 else {"int": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {type(value).__name__: value.hex()}
    if isinstance(value, list):
        return [pack(item) for item in value]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [pack(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    raise Opaque(f"{type(value).__name__} is not plain data")


_UNPACK = {
    "int": lambda text: int(text, 16),
    "complex": lambda parts: complex(*parts),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "tuple": lambda items: tuple(map(unpack, items)),
    "set": lambda items: set(map(unpack, items)),
    "frozenset": lambda items: frozenset(map(unpack, items)),
    "dict": lambda pairs: {unpack(key): unpack(item) for key, item in pairs},
}


def unpack(value):
    """The inverse of `pack`; ValueError, TypeError or KeyError for what it does not write."""
    if isinstance(value, dict):
        ((kind, inner),) = value.items()
        return _UNPACK[kind](inner)
    return [unpack(item) for item in value] if isinstance(value, list) else value


def serve(job, wire, namespace):
    """Loads the program, then answers calls: {"target", "path", "args", "kwargs"} -> {"value" | "handle" | "raise"}."""
    import json

    objects = []  # what a call returned that is not plain data; tests may call its methods
    loaded = _answer(lambda: exec(compile(job["source"], "main.py", "exec"), namespace), objects)
    wire.sendall(json.dumps({"loaded": loaded}).encode() + b"\n")
    with open(wire.fileno(), "rb", closefd=False) as lines:
        for line in lines:
            call = json.loads(line)
            answer = _answer(lambda call=call: _called(call, namespace, objects), objects)
            wire.sendall(json.dumps(answer).encode() + b"\n")


def _called(call, namespace, objects):
    target = call["target"]
    if isinstance(target, int):
        found = objects[target]
    elif target in namespace:
        found = namespace[target]
    else:
        raise NameError(f"name {target!r} is not defined")
    for name in call["path"]:
        found = getattr(found, name)
    if call["args"] is None:
        return list(found)
    return found(*unpack(call["args"]), **dict(unpack(call["kwargs"])))


def _answer(action, objects):
    try:
        value = action()
        try:
            return {"value": pack(value)}
        except Opaque:
            objects.append(value)
            return {"handle": len(objects) - 1, "type": type(value).__name__}
    except BaseException as error:
        known = (kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind)
        return {"raise": next(known, "Exception"), "text": f"{error}"[:500]}


class Remote:
    """In the tests' sandbox: an object of the program, to be called. It has no truth and equals nothing."""

    def __init__(self, ask, target, path=()):
        self._ask, self._target, self._path = ask, target, path

    def __call__(self, *args, **kwargs):
        return self._ask(self._target, self._path, pack(args), pack(kwargs))

    def __iter__(self):
        return iter(self._ask(self._target, self._path, None, None))

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Remote(self._ask, self._target, (*self._path, name))

    def _no_data(self, *_):
        raise TypeError("the program gave an object that is not plain data")

    __bool__ = __len__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _no_data
    __contains__ = __getitem__ = _no_data


def test(job, wire):
    """Runs the tests one after another, each in names of its own; {"test": index, "ok", "note"} for each on the wire.

    Without an entry, a name that neither the test nor the setup defines is the program's, unless the standard library
    has such a module: else a program could bring a `math` of its own to be compared with.
    """
    import ast
    import json

    lines = open(wire.fileno(), "rb", closefd=False)  # noqa: SIM115 - as long as the process

    def ask(target, path, args, kwargs):
        wire.sendall(json.dumps({"target": target, "path": path, "args": args, "kwargs": kwargs}).encode() + b"\n")
        answer = json.loads(lines.readline())
        if "value" in answer:
            return unpack(answer["value"])
        if "handle" in answer:
            return Remote(ask, int(answer["handle"]))
        kind = getattr(builtins, str(answer["raise"]), None)
        if not isinstance(kind, type) or not issubclass(kind, Exception) or issubclass(kind, UnicodeError):
            kind = RuntimeError  # UnicodeError's kinds want more than a text
        raise kind(str(answer["text"]))

    setup: dict[str, object] = {"__name__": "tests"}
    exec(compile(job["setup"], "setup.py", "exec"), setup)
    if job["entry"]:
        setup[job["entry"]] = setup["candidate"] = Remote(ask, job["entry"])
    for index, source in enumerate(job["tests"]):
        try:
            tree = ast.parse(source, "test.py")
            names = {} if job["entry"] else {name: _named(name, ask) for name in _free(ast.walk(tree), setup)}
            exec(compile(tree, "test.py", "exec"), {**setup, **names})
            verdict = {"test": index, "ok": True, "note": ""}
        except BaseException as error:
            verdict = {"test": index, "ok": False, "note": f"{type(error).__name__}: {error}"[:300]}
        wire.sendall(json.dumps(verdict).encode() + b"\n")


def _free(nodes, known):
    found = {node.id for node in nodes if type(node).__name__ == "Name"}
    return [name for name in found if name not in known and not hasattr(builtins, name)]


def _named(name, ask):
    return __import__(name) if name in sys.stdlib_module_names else Remote(ask, name)


if __name__ == "__main__":
    main()
