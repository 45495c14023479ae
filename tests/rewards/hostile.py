"""Programs that try to get out of the sandbox, to take more than they may, or to forge a verdict; and the host's bait.

A program that gets what it wants prints GOT. `Bait` holds what it may want of the host: listeners, a secret in a file
and in the environment, a process to kill. Run the programs nowhere but in the sandbox: one of them mounts over /tmp.
"""
# ruff: noqa: E501 - a program is one string

import os
import platform
import secrets
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from amalgam.rewards.sandbox import Ended, Limits, Sandboxes

LIMITS = Limits(wall=2.0, memory=128 * 2**20, disk=32 * 2**20, processes=16, output=100_000)
QUICK = Limits(wall=0.5, memory=128 * 2**20, disk=32 * 2**20, processes=16, output=100_000)  # for what never ends

# System calls that Python has no function for.
_NUMBERS = {
    "x86_64": {
        "ptrace": 101, "process_vm_readv": 310, "mount": 165, "umount2": 166, "pivot_root": 155, "unshare": 272,
        "setns": 308, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425, "keyctl": 250,
        "add_key": 248, "open_by_handle_at": 304, "memfd_create": 319, "shmget": 29, "init_module": 175, "reboot": 169,
        "clone": 56, "clone3": 435, "personality": 135, "kexec_load": 246, "swapon": 167, "sethostname": 170,
        "pidfd_send_signal": 424, "process_madvise": 440, "syslog": 103, "clock_settime": 227, "mlock": 149,
        "fsopen": 430, "move_mount": 429, "landlock_create_ruleset": 444, "chroot": 161, "quotactl": 179,
    },
    "aarch64": {
        "ptrace": 117, "process_vm_readv": 270, "mount": 40, "umount2": 39, "pivot_root": 41, "unshare": 97,
        "setns": 268, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "io_uring_setup": 425, "keyctl": 219,
        "add_key": 217, "open_by_handle_at": 265, "memfd_create": 279, "shmget": 194, "init_module": 105, "reboot": 142,
        "clone": 220, "clone3": 435, "personality": 92, "kexec_load": 104, "swapon": 224, "sethostname": 161,
        "pidfd_send_signal": 424, "process_madvise": 440, "syslog": 116, "clock_settime": 112, "mlock": 228,
        "fsopen": 430, "move_mount": 429, "landlock_create_ruleset": 444, "chroot": 51, "quotactl": 60,
    },
}[platform.machine()]  # fmt: skip

_PRELUDE = f"""
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
NUMBERS = {_NUMBERS!r}
def call(name, *args):
    args = [ctypes.c_char_p(a) if isinstance(a, bytes) else ctypes.c_long(a) for a in args]
    return libc.syscall(ctypes.c_long(NUMBERS[name]), *args)
def got(name, *args):
    result = call(name, *args)
    print("GOT" if result >= 0 else "no", name, result, ctypes.get_errno())
"""
_TRY = "try:\n{body}\nexcept BaseException as error:\n    print('no', type(error).__name__, error)\n"


def attempt(body: str) -> str:
    """The body, and GOT unless it raises."""
    lines = "\n".join(f"    {line}" for line in [*body.strip().splitlines(), "print('GOT')"])
    return _TRY.format(body=lines)


def system(name: str, *arguments: object) -> str:
    return f"{_PRELUDE}\ngot({', '.join(map(repr, [name, *arguments]))})"


FORK = "import os\nfor _ in range({count}):\n    if not os.fork():\n        {body}\n        os._exit(0)\n"

# What each tries for, by name. @WORDS@ are filled in from the bait.
PROGRAMS: dict[str, str] = {
    # the network
    "tcp to a listener of the host": attempt("import socket; socket.create_connection(('127.0.0.1', @PORT@), 1)"),
    "udp to the host": attempt(
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'GOT', ('127.0.0.1', @PORT@))"
    ),
    "tcp over ipv6": attempt("import socket; socket.create_connection(('::1', @PORT@), 1)"),
    "abstract unix socket of the host": attempt(
        "import socket; socket.socket(socket.AF_UNIX).connect('\\x00@ABSTRACT@')"
    ),
    "a name by dns": attempt("import socket; print(socket.getaddrinfo('example.com', 80))"),
    "raw socket": attempt("import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)"),
    "packet socket": attempt("import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
    "netlink socket": attempt("import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)"),
    "vsock to the machine's host": attempt("import socket; socket.socket(40, socket.SOCK_STREAM).connect((2, 1024))"),
    "an http request": attempt("import urllib.request; urllib.request.urlopen('http://127.0.0.1:@PORT@', timeout=1)"),
    # files of the host, and /proc
    "the secret file": attempt("print(open('@SECRET@').read())"),
    "password files": attempt("open('/etc/shadow')") + attempt("open('/etc/passwd')"),
    "home folders": attempt("import os; os.listdir('/home')") + attempt("import os; os.listdir('/root/.ssh')"),
    "out through /proc/1/root": attempt("print(open('/proc/1/root@SECRET@').read())"),
    "out through /proc/self/cwd": attempt("print(open('/proc/self/cwd/../..@SECRET@').read())"),
    "environment of process 1": attempt("print(open('/proc/1/environ').read()); assert 0"),
    "environment of its own": "import os\nfor name, value in os.environ.items():\n    print(name, value)\n",
    "memory of process 1": attempt("open('/proc/1/mem', 'rb+')") + attempt("open('/proc/1/maps')"),
    "files of process 1": attempt("import os; print(os.listdir('/proc/1/fd'))"),
    "other processes of the host": (
        "import os\nfound = [p for p in os.listdir('/proc') if p.isdigit()]\nprint('GOT' if len(found) > 2 else 'no')\n"
    ),
    "devices": "".join(attempt(f"open('/dev/{name}', 'rb+')") for name in ("mem", "kmsg", "sda", "fuse", "kvm", "tty")),
    "a device of its own": attempt("import os, stat; os.mknod('/tmp/m', 0o666 | stat.S_IFBLK, os.makedev(8, 0))"),
    "the guest's code": attempt("open('/guest.py', 'a').write('#')"),
    "the standard library": attempt("import os; open(os.__file__, 'a').write('#')"),
    "its own interpreter": attempt("open('/proc/self/exe', 'rb+')") + attempt("open('/proc/self/exe', 'rb')"),
    "the root folder": attempt("open('/x', 'w')") + attempt("import os; os.mkdir('/y')"),
    "kernel settings": attempt("open('/proc/sys/kernel/core_pattern', 'w').write('|/bin/sh')")
    + attempt("open('/proc/sysrq-trigger', 'w').write('c')")
    + attempt("open('/proc/self/oom_score_adj', 'w').write('-1000')"),
    "symbolic links out": attempt("import os; os.symlink('@SECRET@', '/tmp/l'); print(open('/tmp/l').read())"),
    "a hard link to what is read-only": attempt("import os; os.link('/guest.py', '/tmp/g')"),
    "a shell": attempt("import subprocess; subprocess.run(['/bin/sh', '-c', 'id'], check=True)")
    + "import os\nprint('GOT' if os.system('true') == 0 else 'no')\n",
    "a setuid program": attempt(
        "import os, shutil, sys; open('/tmp/s', 'wb'); os.chmod('/tmp/s', 0o4755); os.setuid(0)"
    ),
    "capabilities": "lines = open('/proc/self/status').read().splitlines()\n"
    "caps = [l for l in lines if l.startswith('Cap') and int(l.split()[1], 16)]\n"
    "bare = 'NoNewPrivs:\\t1' in lines and 'Seccomp:\\t2' in lines\nprint('GOT' if caps or not bare else 'no', caps)\n",
    # the kernel
    "ptrace process 1": system("ptrace", 16, 1, 0, 0),
    "read memory of process 1": system("process_vm_readv", 1, 0, 0, 0, 0, 0),
    "mount over /tmp": system("mount", b"x", b"/tmp", b"tmpfs", 0, 0),
    "bind the host's root": system("mount", b"/", b"/tmp", b"", 4096, 0),
    "make the root writable": system("mount", b"", b"/", b"", 32 | 4096, 0),
    "unmount /proc": system("umount2", b"/proc", 2),
    "mount by file descriptors": system("fsopen", b"tmpfs", 0),
    "pivot_root": system("pivot_root", b"/tmp", b"/tmp"),
    "chroot": system("chroot", b"/tmp"),
    "a user namespace": system("unshare", 0x10000000),
    "a mount namespace": system("unshare", 0x20000),
    "a user namespace by clone": system("clone", 0x10000000 | 17, 0, 0, 0, 0),
    "a user namespace by clone3": system("clone3", 0, 0),
    "the namespaces of process 1": attempt("import os; os.open('/proc/1/ns/mnt', os.O_RDONLY)")
    + system("setns", 0, 0),
    "bpf": system("bpf", 0, 0, 0),
    "perf": system("perf_event_open", 0, 0, -1, -1, 0),
    "userfaultfd": system("userfaultfd", 1),
    "io_uring": system("io_uring_setup", 8, 0),
    "the keyring": system("keyctl", 0, -3, 1) + "\ngot('add_key', b'user', b'k', b'v', 1, -3)",
    "files by handle": system("open_by_handle_at", -100, 0, 0),
    "kernel modules": system("init_module", 0, 0, b"") + "\ngot('kexec_load', 0, 0, 0, 0)\ngot('swapon', b'/tmp', 0)",
    "reboot": system("reboot", 0xFEE1DEAD - (1 << 32), 672274793, 0x1234567),
    "the host's name and clock": system("sethostname", b"got", 3) + "\ngot('clock_settime', 0, 0)",
    "the kernel's log": system("syslog", 3, b"          ", 10),
    "typing into a terminal": "import fcntl\n" + attempt("fcntl.ioctl(0, 0x5412, b'x')"),
    "system calls of 32 bits": (
        "import ctypes, mmap, platform\n"
        "code = b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3'  # mov eax, 20 (getpid); int 0x80; ret\n"
        "page = mmap.mmap(-1, 4096, prot=7)\npage.write(code)\n"
        "call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))\n"
        "print('GOT' if platform.machine() == 'x86_64' and call() > 0 else 'no')\n"
    ),
    "system calls of x32": _PRELUDE
    + "print('GOT' if os.uname().machine == 'x86_64' and libc.syscall(ctypes.c_long(0x40000000 + 39)) > 0 else 'no')",
    "process 1's limits": "import resource\n" + attempt("resource.prlimit(1, resource.RLIMIT_CPU, (1, 1))"),
    "its own limits, higher": "import resource\n" + attempt("resource.setrlimit(resource.RLIMIT_NPROC, (999, 999))"),
    "process 1's priority": "import os\n" + attempt("os.setpriority(os.PRIO_PROCESS, 1, 19)")
    + attempt("os.setpriority(os.PRIO_USER, 0, 19)") + attempt("os.sched_setaffinity(1, {0})"),
    # signals
    "kill process 1": "import os\nfor s in (9, 15, 19, 2, 11):\n    os.kill(1, s)\nprint('GOT away')".replace("GOT", "no"),
    "kill its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nprint('still here')",
    "kill everybody": "import os\nos.kill(-1, 9)\nprint('still here')",
    "kill its group and 0": "import os\nos.killpg(os.getpgid(1), 9)\n",
    "kill a process of the host": attempt("import os; os.kill(@PID@, 9)"),
    "stop the watch": "import os, signal\nos.kill(1, signal.SIGSTOP)\nwhile True: pass",
    # taking too much
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "fork bomb that counts": (
        "import os, time\nn = 0\ntry:\n    while n < 400:\n        if not os.fork(): time.sleep(9)\n        n += 1\n"
        "except OSError: pass\nprint('GOT' if n > 16 else 'no', n)"
    ),
    "thread bomb": (
        "import threading, time\nn = 0\ntry:\n    while n < 400:\n"
        "        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n        n += 1\n"
        "except RuntimeError: pass\nprint('GOT' if n > 16 else 'no', n, flush=True)\nimport os; os._exit(0)"
    ),
    "memory in one process": "x = bytearray(10**9)\nprint('GOT', len(x))",
    "memory bit by bit": "x = []\nwhile True: x.append(bytearray(10**6))",
    "memory in many processes": FORK.format(count=8, body="x = bytearray(50 * 10**6); import time; time.sleep(9)")
    + "import time\ntime.sleep(9)\nprint('GOT')",
    "memory shared by many processes": "import mmap\nmaps = []\n"
    + "for _ in range(8):\n    m = mmap.mmap(-1, 40 * 2**20)\n    m.write(bytes(40 * 2**20))\n    maps.append(m)\nprint('GOT')",
    "memory without a name": system("memfd_create", b"x", 0),
    "system v shared memory": system("shmget", 0, 4096, 0o1666),
    "locked memory": system("mlock", 4096, 4096),
    "a big file": attempt("open('/tmp/f', 'wb').write(bytes(64 * 2**20))"),
    "many files": attempt(
        "for i in range(8):\n    with open(f'/tmp/{i}', 'wb') as f: f.write(bytes(8 * 2**20)); f.flush()"
    ),
    "files in /dev/shm": attempt(
        "for i in range(8):\n    with open(f'/dev/shm/{i}', 'wb') as f: f.write(bytes(8 * 2**20)); f.flush()"
    ),
    "empty files without end": "import os\ni = 0\nwhile True:\n    os.mknod(f'/tmp/{i}')\n    i += 1",
    "folders in folders": "import os\nwhile True:\n    os.mkdir('d')\n    os.chdir('d')",
    "pipes without end": "import os\np = []\n" + attempt("while len(p) < 1000: p.append(os.pipe())"),
    "a loop": "while True: pass",
    "a loop that catches everything": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "sleeping": "import time\ntime.sleep(1000)",
    "deaf to signals": "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\n"
    "while True: pass",
    "a regular expression": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "a big power": "print(len(str(9 ** 9 ** 9)))",
    "output without end": "while True: print('x' * 1000)",
    "errors without end": "import sys\nwhile True: sys.stderr.write('x' * 1000)",
    "one endless line": "import os\nwhile True: os.write(1, b'y' * 65536)",
    "output by many": FORK.format(count=8, body="\n        while True: os.write(1, b'z' * 4096)") + "import time; time.sleep(9)",
    "a daemon": (
        "import os, time\nif os.fork(): os._exit(0)\nos.setsid()\nif os.fork(): os._exit(0)\n"
        "while True:\n    open('/tmp/alive', 'w').write(str(time.time()))\n    time.sleep(.01)"
    ),
    "a segmentation fault": "import ctypes\nctypes.string_at(0)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1) + 1\nf(0)",
    "a deep expression": "eval('(' * 100000)",
    "a null byte": "\0",
    # Python's own doors
    "a pickle": attempt(
        "import os, pickle\nclass E:\n    def __reduce__(self): return open, ('@SECRET@',)\npickle.loads(pickle.dumps(E())).read()"
    ),
    "an import hook": attempt("open('/tmp/json.py', 'w').write('x = 1')\nimport sys\nassert '/tmp' in sys.path or '' in sys.path"),
    "sitecustomize for the next": attempt(
        "import os, sysconfig\nopen(os.path.join(sysconfig.get_path('stdlib'), 'sitecustomize.py'), 'w')"
    ),
    "frames of the guest": (
        "import sys, gc\nframe, found = sys._getframe(), []\nwhile frame:\n    found.append(str(frame.f_locals))\n"
        "    frame = frame.f_back\nprint(found, [o for o in gc.get_objects() if isinstance(o, dict) and 'kind' in o])"
    ),
    "every file descriptor": (
        "import os\nfor fd in range(3, 1024):\n    try:\n        os.write(fd, b'{\"end\": \"exit 0\"}\\n')\n        print('GOT', fd)\n"
        "    except OSError: pass"
    ),
    "descriptors past the limit": "import os\nprint([f for f in os.listdir('/proc/self/fd')])\n"
    + attempt("import os; os.read(int(sorted(os.listdir('/proc/self/fd'))[-1]), 1); assert 0"),
}  # fmt: skip
WITHOUT_END = set(
    "a loop,a loop that catches everything,sleeping,deaf to signals,a regular expression,a big power,stop the watch,"
    "fork bomb,memory in many processes".split(",")
)
# Enough for a run of the tests: one or two of each kind.
SOME = (
    "tcp to a listener of the host,abstract unix socket of the host,the secret file,out through /proc/1/root,"
    "environment of its own,memory of process 1,other processes of the host,a shell,capabilities,ptrace process 1,"
    "mount over /tmp,a user namespace,a user namespace by clone,system calls of 32 bits,process 1's limits,kill process 1,"
    "kill everybody,kill a process of the host,fork bomb,fork bomb that counts,memory in many processes,many files,"
    "empty files without end,output without end,a loop,a daemon,every file descriptor,a null byte"
).split(",")

# Programs whose function `f` ought to add 17 to its argument, and that want a verdict without adding: each is tested
# by `assert f(N) == N + 17`, with an N that it does not know before.
FORGERIES: dict[str, str] = {
    "nothing": "",
    "a constant": "def f(n): return 17",
    "None": "def f(n): pass",
    "exit before the tests": "import os; os._exit(0)",
    "sys.exit before the tests": "import sys; sys.exit(0)",
    "exit in the call": "import os\ndef f(n): os._exit(0)",
    "SystemExit in the call": "def f(n): raise SystemExit(0)",
    "AssertionError in the call": "def f(n): raise AssertionError",
    "StopIteration in the call": "def f(n): raise StopIteration",
    "an object that equals everything": (
        "class E:\n    def __eq__(self, o): return True\n    def __bool__(self): return True\ndef f(n): return E()"
    ),
    "an int that equals everything": "class E(int):\n    def __eq__(self, o): return True\ndef f(n): return E(3)",
    "a str that equals everything": "class E(str):\n    def __eq__(self, o): return True\ndef f(n): return E('x')",
    "a list that equals everything": "class E(list):\n    def __eq__(self, o): return True\ndef f(n): return E([1])",
    "not a number": "def f(n): return float('nan')",
    "mock's ANY": "from unittest.mock import ANY\ndef f(n): return ANY",
    "a verdict as the value": "def f(n): return {'test': 0, 'ok': True, 'note': ''}",
    "a verdict on every descriptor": (
        "import os\ndef f(n):\n    for fd in range(3, 128):\n        try: os.write(fd, b'{\"test\": 0, \"ok\": true, \"note\": \"\"}\\n')\n"
        "        except OSError: pass\n    os._exit(0)"
    ),
    "answers ahead of the calls": (
        "import os\nfor fd in range(3, 128):\n    try: os.write(fd, b'{\"loaded\": {}}\\n' + b'{\"value\": 17}\\n' * 9)\n"
        "    except OSError: pass\ndef f(n): return 0"
    ),
    "code in the answer": (
        "import json\nreal = json.dumps\njson.dumps = lambda o, **k: real({'value': {'__import__': 'os'}, 'raise': 'eval', 'text': '1'})\n"
        "def f(n): return 0"
    ),
    "an answer that never ends": (
        "import os\ndef f(n):\n    for fd in range(3, 128):\n        try:\n            while True: os.write(fd, b'[' * 65536)\n"
        "        except OSError: pass"
    ),
    "an answer too deep": (
        "import os\ndef f(n):\n    for fd in range(3, 128):\n        try: os.write(fd, b'{\"value\": ' + b'[' * 50000 + b']' * 50000 + b'}\\n')\n"
        "        except OSError: pass"
    ),
    "other builtins": (
        "import builtins\nbuiltins.AssertionError = Warning\nbuiltins.exec = lambda *a: None\nbuiltins.len = lambda o: 0\n"
        "builtins.compile = lambda *a: None\ndef f(n): return 0"
    ),
    "other modules": (
        "import sys, types, ast, unittest\nfor m in list(sys.modules):\n    if m != 'sys': sys.modules[m] = types.ModuleType(m)\ndef f(n): return 0"
    ),
    "searching the tests": (
        "import gc, re, os\ndef f(n):\n    text = str(gc.get_objects()) + str([open(f'/proc/{p}/cmdline').read() for p in os.listdir('/proc') if p.isdigit()])\n"
        "    found = re.findall(r'assert f\\(.*?== (\\d+)', text)\n    return int(found[0]) if found else 0"
    ),
    "files of the tests": (
        "import os\ndef f(n):\n    for d, _, names in os.walk('/tmp'):\n        for name in names:\n            text = open(os.path.join(d, name)).read()\n"
        "            if 'assert' in text: return eval(text.split('==')[1])\n    return 0"
    ),
    "a generator": "def f(n):\n    yield n + 17",
    "a tuple": "def f(n): return (n + 17,)",
    "a clock": "import time\ntime.sleep = lambda s: None\ntime.monotonic = lambda: 0.0\ndef f(n):\n    while True: pass",
    "a daemon that answers": "import os\nif not os.fork():\n    while True: pass\ndef f(n): return 0",
    "the other's process": "import os\ndef f(n):\n    os.kill(-1, 9)\n    return 0",
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What one program got."""

    escaped: str
    """What it got that it should not have, or empty."""
    ended: Ended


class Bait:
    """What programs may want of the host, and whether any got it. A context manager."""

    def __enter__(self) -> "Bait":
        self.token = secrets.token_hex(16)
        self.folder = Path(tempfile.mkdtemp(prefix="bait-"))
        self.folder.chmod(0o755)
        self.secret = self.folder / "secret.txt"
        self.secret.write_text(self.token)
        self.secret.chmod(0o644)
        os.environ["AMALGAM_SECRET"] = self.token
        self.tcp, self.udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.port = self.tcp.getsockname()[1]
        self.udp.bind(("127.0.0.1", self.port))
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind("\0" + self.token)
        self.unix.listen()
        self.process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(3600)"])
        for link in (self.tcp, self.udp, self.unix):
            link.setblocking(False)
        self.before = self._state()
        return self

    def __exit__(self, *_: object) -> None:
        os.environ.pop("AMALGAM_SECRET", None)
        self.process.kill()
        self.process.wait()
        for link in (self.tcp, self.udp, self.unix):
            link.close()
        self.secret.unlink()
        self.folder.rmdir()

    def fill(self, source: str) -> str:
        words = {"PORT": self.port, "ABSTRACT": self.token, "SECRET": self.secret, "PID": self.process.pid}
        for word, value in words.items():
            source = source.replace(f"@{word}@", str(value))
        return source

    def taken(self, *texts: str) -> str:
        """What is wrong with the host, or told in these texts; empty where all is well."""
        if any(self.token in text for text in texts):
            return "the secret"
        if any("GOT" in text for text in texts):
            return "what it tried for"
        if self.process.poll() is not None:
            return "a process of the host"
        for name, link in (("tcp", self.tcp), ("unix", self.unix)):
            try:
                link.accept()[0].close()
            except BlockingIOError:
                continue
            return f"the host by {name}"
        try:
            self.udp.recv(1)
        except BlockingIOError:
            return "" if self._state() == self.before else "the host's mounts, name or files"
        return "the host by udp"

    def _state(self) -> tuple[object, ...]:
        return (
            Path("/proc/self/mounts").read_text(), socket.gethostname(), self.secret.read_text(),
            sorted(os.listdir(self.folder)),
        )  # fmt: skip


def attack(sandboxes: Sandboxes, bait: Bait, name: str) -> Outcome:
    """Runs one of PROGRAMS, then a harmless one in the same sandbox, which must be alone there."""
    count = "import os; print(len([p for p in os.listdir('/proc') if p.isdigit()]))"
    source = f"import sys\nif sys.stdin.read() == 'count':\n    {count}\n    sys.exit()\n" + bait.fill(PROGRAMS[name])
    if name == "a null byte":
        source = PROGRAMS[name]
    limits = QUICK if name in WITHOUT_END else LIMITS
    ended, after = sandboxes.runs(source, ["attack", "count"], limits)
    escaped = bait.taken(ended.output, ended.errors)
    if not escaped and after.end == "exit 0" and after.output.strip() != "2":
        escaped = f"processes that outlived it: {after.output.strip()}"
    return Outcome(escaped, ended)


def forge(sandboxes: Sandboxes, name: str) -> Outcome:
    """Tests one of FORGERIES with three numbers that nobody knows before."""
    numbers = [secrets.randbelow(10**6) for _ in range(3)]
    tests = [f"assert f({number}) == {number + 17}" for number in numbers]
    tested, ended = sandboxes.check(FORGERIES[name], tests, entry="f", limits=QUICK)
    return Outcome("a verdict" if any(each.ok for each in tested) else "", ended)
