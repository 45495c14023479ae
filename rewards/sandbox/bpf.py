"""The seccomp filter: which system calls a program in the sandbox may make. Everything that is not listed fails.

bubblewrap loads the filter just before it starts Python. Left out on purpose: namespaces, mounts, ptrace and other
processes' memory, keys, BPF, io_uring, perf, userfaultfd, every socket but AF_UNIX, memory that the watch does not see
(memfd, System V and POSIX shared memory, locked pages), priorities, and other processes' limits.

The numbers are the kernel's (asm/unistd_64.h for x86-64, asm-generic/unistd.h for aarch64), the list is our choice.
"""

import platform
import struct
from errno import ENOSYS, ENOTTY, EPERM

from ...errors import UserError

# name:x86-64:aarch64, without a number where the architecture lacks the call.
_ALLOWED = """
# files
read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69 pwritev:296:70
preadv2:327:286 pwritev2:328:287 open:2: openat:257:56 openat2:437:437 creat:85: close:3:57 close_range:436:436
lseek:8:62 fsync:74:82 fdatasync:75:83 sync_file_range:277:84 truncate:76:45 ftruncate:77:46 fallocate:285:47
fadvise64:221:223 readahead:187:213 stat:4: fstat:5:80 lstat:6: newfstatat:262:79 statx:332:291 statfs:137:43
fstatfs:138:44 access:21: faccessat:269:48 faccessat2:439:439 readlink:89: readlinkat:267:78 getdents:78:
getdents64:217:61 getcwd:79:17 chdir:80:49 fchdir:81:50 rename:82: renameat:264:38 renameat2:316:276 mkdir:83:
mkdirat:258:34 rmdir:84: link:86: linkat:265:37 unlink:87: unlinkat:263:35 symlink:88: symlinkat:266:36 mknod:133:
mknodat:259:33 chmod:90: fchmod:91:52 fchmodat:268:53 chown:92: fchown:93:55 lchown:94: fchownat:260:54 umask:95:166
utime:132: utimes:235: utimensat:280:88 futimesat:261: getxattr:191:8 lgetxattr:192:9 fgetxattr:193:10
listxattr:194:11 llistxattr:195:12 flistxattr:196:13 dup:32:23 dup2:33: dup3:292:24 fcntl:72:25 flock:73:32 pipe:22:
pipe2:293:59 sendfile:40:71 copy_file_range:326:285
# waiting
select:23: pselect6:270:72 poll:7: ppoll:271:73 epoll_create:213: epoll_create1:291:20 epoll_ctl:233:21
epoll_wait:232: epoll_pwait:281:22 epoll_pwait2:441:441 eventfd:284: eventfd2:290:19 timerfd_create:283:85
timerfd_settime:286:86 timerfd_gettime:287:87 signalfd:282: signalfd4:289:74 alarm:37: getitimer:36:102
setitimer:38:103 nanosleep:35:101 clock_nanosleep:230:115 clock_gettime:228:113 clock_getres:229:114
gettimeofday:96:169 time:201: times:100:153 timer_create:222:107 timer_settime:223:110 timer_gettime:224:108
timer_getoverrun:225:109 timer_delete:226:111 pause:34: restart_syscall:219:128
# memory
mmap:9:222 munmap:11:215 mremap:25:216 mprotect:10:226 madvise:28:233 msync:26:227 mincore:27:232 brk:12:214
membarrier:324:283
# signals
rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigsuspend:130:133
rt_sigtimedwait:128:137 rt_sigqueueinfo:129:138 sigaltstack:131:132 kill:62:129 tgkill:234:131 tkill:200:130
# processes and threads
fork:57: vfork:58: execve:59:221 execveat:322:281 exit:60:93 exit_group:231:94 wait4:61:260 waitid:247:95
pidfd_open:434:434 getpid:39:172 getppid:110:173 gettid:186:178 getpgid:121:155 getpgrp:111: setpgid:109:154
getsid:124:156 setsid:112:157 getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177 getgroups:115:158
getresuid:118:148 getresgid:120:150 capget:125:90 set_tid_address:218:96 set_robust_list:273:99
get_robust_list:274:100 rseq:334:293 futex:202:98 futex_waitv:449:449 sched_yield:24:124 sched_getaffinity:204:123
sched_getparam:143:121 sched_getscheduler:145:120 sched_get_priority_max:146:125 sched_get_priority_min:147:126
getcpu:309:168 getpriority:140:141 getrlimit:97:163 setrlimit:160:164 getrusage:98:165 sysinfo:99:179 uname:63:160
getrandom:318:278 arch_prctl:158:
# sockets of the family AF_UNIX
bind:49:200 connect:42:203 listen:50:201 accept:43:202 accept4:288:242 getsockname:51:204 getpeername:52:205
getsockopt:55:209 setsockopt:54:208 sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212 sendmmsg:307:269
recvmmsg:299:243 shutdown:48:210
"""
# The calls whose first or second argument decides.
_CLONE, _CLONE3, _SOCKET, _SOCKETPAIR, _IOCTL, _PRCTL, _PRLIMIT, _SETPRIORITY = range(8)
_BY_ARGUMENT = {"x86_64": (56, 435, 41, 53, 16, 157, 302, 141), "aarch64": (220, 435, 198, 199, 29, 167, 261, 140)}
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*

_NAMESPACES = 0x7E020000  # clone's CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_AF_UNIX = 1
# Of open files, and the size of a terminal, which Python asks for; none that types into one (TIOCSTI).
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_PRCTLS = (1, 3, 4, 15, 16, 38, 39)  # PDEATHSIG, GET and SET_DUMPABLE, SET and GET_NAME, SET and GET_NO_NEW_PRIVS

_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; an argument's low half comes first
_LOAD, _EQUAL, _GREATER, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def seccomp_filter() -> bytes:
    """The filter for this machine: an array of struct sock_filter, as bubblewrap's --seccomp reads it.

    Raises: UserError on another architecture than x86-64 and aarch64.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise UserError(f"sandbox: no list of system calls for {machine}; grade code on x86_64 or aarch64")
    column = 1 + list(_ARCHITECTURES).index(machine)
    return assemble(_ARCHITECTURES[machine], _allowed(column), _BY_ARGUMENT[machine])


def assemble(architecture: int, allowed: list[int], by_argument: tuple[int, ...]) -> bytes:
    """The filter of one architecture, from the numbers of the calls that are allowed as they are."""
    numbers = by_argument
    program = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_EQUAL, architecture, 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
        *_when(
            numbers[_CLONE], [_argument(0), _step(_ANY_BIT, _NAMESPACES, 0, 1), _fail(EPERM), _step(_RETURN, _ALLOW)]
        ),
        *_when(numbers[_CLONE3], [_fail(ENOSYS)]),  # its flags are out of a filter's sight; glibc falls back to clone
        *_when(numbers[_SOCKET], [_argument(0), *_one_of((_AF_UNIX,), EPERM)]),
        *_when(numbers[_SOCKETPAIR], [_argument(0), *_one_of((_AF_UNIX,), EPERM)]),
        *_when(numbers[_IOCTL], [_argument(1), *_one_of(_IOCTLS, ENOTTY)]),
        *_when(numbers[_PRCTL], [_argument(0), *_one_of(_PRCTLS, EPERM)]),
        *_when(numbers[_PRLIMIT], [_argument(0), *_one_of((0,), EPERM)]),  # its own limits only
        *_when(numbers[_SETPRIORITY], _own_priority()),
    ]
    for first, last in _ranges(allowed):
        program += [_step(_AT_LEAST, first, 0, 2), _step(_GREATER, last, 1, 0), _step(_RETURN, _ALLOW)]
    newest = max(*allowed, *by_argument)
    program += [_step(_GREATER, newest, 0, 1), _fail(ENOSYS), _fail(EPERM)]  # libraries probe for what is newer
    return b"".join(program)


def _allowed(column: int) -> list[int]:
    words = [word for line in _ALLOWED.splitlines() if not line.startswith("#") for word in line.split()]
    return [int(number) for number in (word.split(":")[column] for word in words) if number]


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """The numbers as ascending (first, last) without gaps inside."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return found


def _step(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """struct sock_filter: code, instructions to skip if true and if false, operand."""
    return struct.pack("=HBBI", code, if_true, if_false, k)


def _argument(index: int) -> bytes:
    """Loads an argument's lower 32 bits, all that these calls look at, on a little-endian machine."""
    return _step(_LOAD, _ARGUMENTS + 8 * index)


def _fail(error: int) -> bytes:
    return _step(_RETURN, _ERRNO | error)


def _when(number: int, steps: list[bytes]) -> list[bytes]:
    """`steps`, which end in a return, for the call of that number."""
    return [_step(_EQUAL, number, 0, len(steps)), *steps]


def _own_priority() -> list[bytes]:
    """Allows (PRIO_PROCESS, 0): what `nice` does to the process that calls it."""
    first = [_argument(0), _step(_EQUAL, 0, 0, 2)]
    return [*first, _argument(1), _step(_EQUAL, 0, 1, 0), _fail(EPERM), _step(_RETURN, _ALLOW)]


def _one_of(values: tuple[int, ...], error: int) -> list[bytes]:
    """Allows where the loaded argument is one of these."""
    tests = [_step(_EQUAL, value, len(values) - i, 0) for i, value in enumerate(values)]
    return [*tests, _fail(error), _step(_RETURN, _ALLOW)]
