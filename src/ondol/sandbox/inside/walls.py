"""The walls of a sandbox, one function each, by system call. Linux; standard library only.

Nothing here imports Ondol: this folder runs on the far side, as a program of its own (see `__main__`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import stat
import struct
from collections.abc import Iterable

HOME = "/agent"  # inside a new root; the only folder that can be written to
USER = 1000  # who the code believes to be, inside a user namespace
DEVICES = ("null", "zero", "full", "random", "urandom")

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWTIME = 0x10000000, 0x20000000, 0x40000000, 0x00000080
NAMESPACES = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
_ANY_NAMESPACE = NAMESPACES | CLONE_NEWTIME

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_AT_RECURSIVE, _MNT_DETACH = 0x8000, 2
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 4, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 36, 38, 47

#: number of a system call on (x86_64, aarch64); from 424 on all machines agree
_CALLS: dict[str, tuple[int, int]] = {
    "clone": (56, 220),
    "clone3": (435, 435),
    "socket": (41, 198),
    "ioctl": (16, 29),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "capset": (126, 91),
    "mount_setattr": (442, 442),
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
    "unshare": (272, 97),
}

#: refused by the filter: other processes' memory, new namespaces and mounts, and parts of the kernel that are wide
#: and of no use to a computation. -1: that machine has no such call
_REFUSED: dict[str, tuple[int, int]] = {
    **{k: _CALLS[k] for k in ("mount", "umount2", "pivot_root", "mount_setattr", "unshare")},
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "setns": (308, 268),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "open_tree_attr": (467, 467),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "memfd_secret": (447, 447),
    "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "personality": (135, 92),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, -1),
    "ioperm": (173, -1),
    "modify_ldt": (154, -1),
    "uselib": (134, -1),
}

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH


def machine() -> tuple[int, int]:
    """(column of the tables, audit number). Raises OSError on a machine whose calls we do not know."""
    if platform.system() != "Linux" or platform.machine() not in _MACHINES:
        raise OSError(errno.ENOSYS, f"no table of system calls for {platform.system()} on {platform.machine()}")
    return _MACHINES[platform.machine()]


def call(name: str, *arguments: object) -> int:
    """A system call by name. Raises OSError with the call's name."""
    result = _libc.syscall(ctypes.c_long(_CALLS[name][machine()[0]]), *(_plain(a) for a in arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def _plain(value: object) -> object:
    return ctypes.c_long(value) if isinstance(value, int) else value


def _prctl(option: int, *arguments: int) -> None:
    padded = [ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc.prctl(ctypes.c_int(option), *padded) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl {option}: {os.strerror(code)}")


# -- privileges ----------------------------------------------------------------------------------------------------------


def no_new_privileges() -> None:
    """Programs with the setuid bit give nothing any more."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def adopt_orphans() -> None:
    """Descendants whose parents end become our children, so that none is lost from sight."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def not_dumpable() -> None:
    """Our memory and descriptors are closed to other processes of the same user."""
    _prctl(_PR_SET_DUMPABLE, 0)


def drop_capabilities() -> None:
    """Give up all capabilities, and the ways back to them."""
    with contextlib.suppress(OSError):  # none are ambient where the kernel does not know the word
        _prctl(_PR_CAP_AMBIENT, 4)
    for number in range(64):
        try:
            _prctl(_PR_CAPBSET_DROP, number)
        except OSError:
            break  # past the last one, or not ours to drop
    header = struct.pack("=II", 0x20080522, 0)
    call("capset", ctypes.c_char_p(header), ctypes.c_char_p(bytes(24)))


def become_ordinary(needed: Iterable[str]) -> None:
    """As root: turn into a user who owns nothing, before anything else, so that root is no weaker than anyone.

    `needed` are the paths that must stay readable. What lies in a folder closed to others (a Python below /root) is
    made reachable in a private mount namespace, with nothing else of that folder.
    """
    if os.getuid() != 0:
        return
    closed: dict[str, list[str]] = {}
    for path in needed:
        parts = path.split("/")
        for depth in range(2, len(parts) + 1):
            folder = "/".join(parts[:depth])
            if not stat.S_IMODE(os.stat(folder).st_mode) & 0o001 and os.path.isdir(folder):
                closed.setdefault(folder, []).append(path)
                break
    if closed:
        call("unshare", CLONE_NEWNS)
        _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    for folder, paths in closed.items():
        kept = {p: os.open(p, os.O_PATH | os.O_CLOEXEC) for p in _outermost(paths)}
        _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")
        for path, descriptor in kept.items():
            _bind(descriptor, path, read_only=False)
            os.close(descriptor)
    nobody = 1_700_000_000 + os.getpid() % 1_000_000  # beyond what accounts use; one for each launcher
    os.setgroups([])
    os.setresgid(nobody, nobody, nobody)
    os.setresuid(nobody, nobody, nobody)


# -- namespaces and the root -----------------------------------------------------------------------------------------------


def enter_namespaces() -> None:
    """New user, mount, PID (for children), network, IPC, UTS and cgroup namespaces. We hold their capabilities."""
    user, group = os.geteuid(), os.getegid()
    _prctl(_PR_SET_DUMPABLE, 1)  # else, after a change of user, our own /proc files belong to root
    call("unshare", NAMESPACES)
    with contextlib.suppress(FileNotFoundError):
        _write("/proc/self/setgroups", "deny")
    _write("/proc/self/gid_map", f"{USER} {group} 1")
    _write("/proc/self/uid_map", f"{USER} {user} 1")


def new_root(visible: Iterable[str], home_bytes: int) -> None:
    """A root that holds what is `visible`, read only, an empty HOME, five devices, and the processes of this PID namespace.

    Symbolic links among `visible` are links there too. Afterwards the old root is gone.
    """
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    links = {p: os.readlink(p) for p in visible if os.path.islink(p)}
    trees = _outermost([p for p in visible if p not in links])
    kept = {p: os.open(p, os.O_PATH | os.O_CLOEXEC) for p in [*trees, *(f"/dev/{d}" for d in DEVICES)]}
    base = "/tmp"  # covered by the new root until it is the root
    _mount("tmpfs", base, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")
    for path, descriptor in kept.items():
        _bind(descriptor, base + path, read_only=not path.startswith("/dev/"))
        os.close(descriptor)
    for path, target in links.items():
        os.symlink(target, base + path)
    for target, name in (("/proc/self/fd", "fd"), (f"{HOME}/.tmp", "shm")):
        os.symlink(target, f"{base}/dev/{name}")
    os.makedirs(base + HOME)
    _mount("tmpfs", base + HOME, "tmpfs", _MS_NOSUID | _MS_NODEV, f"mode=700,size={home_bytes},nr_inodes=20000")
    if not os.path.exists(f"{base}/tmp"):  # it does when something visible lies there: Python, say
        os.symlink(f"{HOME}/.tmp", f"{base}/tmp")
    os.mkdir(f"{base}/proc")
    # Masked parts of the outer /proc (a container's) forbid a new one; then there is none, which is safe.
    with contextlib.suppress(OSError):
        _mount("proc", f"{base}/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "subset=pid")
    os.chdir(base)
    call("pivot_root", ctypes.c_char_p(b"."), ctypes.c_char_p(b"."))
    call("umount2", ctypes.c_char_p(b"."), _MNT_DETACH)
    os.chdir("/")
    _set_attributes("/", _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, recursive=False)


def _outermost(paths: Iterable[str]) -> list[str]:
    """Without those that lie in another one of them."""
    out: list[str] = []
    for path in sorted(set(paths)):
        if not any(path == o or path.startswith(o.rstrip("/") + "/") for o in out):
            out.append(path)
    return out


def _bind(descriptor: int, target: str, read_only: bool) -> None:
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(f"/proc/self/fd/{descriptor}", target, None, _MS_BIND | _MS_REC)
    if read_only:
        _set_attributes(target, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, recursive=True)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [ctypes.c_char_p(t.encode() if t is not None else None) for t in (source, target, kind, options)]
    call("mount", texts[0], texts[1], texts[2], flags, texts[3])


def _set_attributes(path: str, attributes: int, recursive: bool) -> None:
    wanted = struct.pack("=QQQQ", attributes, 0, 0, 0)
    at = -100  # the working folder; the path is absolute
    flags = _AT_RECURSIVE if recursive else 0
    call("mount_setattr", at, ctypes.c_char_p(path.encode()), flags, ctypes.c_char_p(wanted), len(wanted))


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


# -- Landlock ------------------------------------------------------------------------------------------------------------

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_REMOVE_MAKE = sum(1 << bit for bit in (4, 5, 7, 8, 9, 10, 12))  # all but devices
_MAKE_DEVICES = (1 << 6) | (1 << 11)
_REFER, _TRUNCATE, _IOCTL_DEVICE = 1 << 13, 1 << 14, 1 << 15


def landlock_version() -> int:
    """The kernel's Landlock ABI; 0 where there is none."""
    try:
        return call("landlock_create_ruleset", None, 0, 1)
    except OSError:
        return 0


def landlock(home: str) -> int:
    """Read and execute anywhere (in the new root), write in `home` only; no TCP; no signals or sockets to outside.

    Returns the ABI's version; later ones restrict more. Raises OSError where there is no Landlock.
    """
    version = landlock_version()
    if version < 1:
        raise OSError(errno.ENOSYS, "the kernel has no Landlock")
    since = {_REFER: 2, _TRUNCATE: 3, _IOCTL_DEVICE: 5}
    newer = sum(bit for bit, first in since.items() if version >= first)
    handled = _EXECUTE | _WRITE_FILE | _READ_FILE | _READ_DIR | _REMOVE_MAKE | _MAKE_DEVICES | newer
    attributes = struct.pack("=Q", handled)
    if version >= 4:
        attributes += struct.pack("=Q", 3)  # bind and connect
    if version >= 6:
        attributes += struct.pack("=Q", 3)  # abstract sockets and signals
    rules = call("landlock_create_ruleset", ctypes.c_char_p(attributes), len(attributes), 0)
    read = _EXECUTE | _READ_FILE | _READ_DIR
    write = (read | _WRITE_FILE | _REMOVE_MAKE | _REFER | _TRUNCATE) & handled
    grants = {"/": read, home: write}
    grants |= {f"/dev/{d}": _READ_FILE | _WRITE_FILE for d in DEVICES}
    for path, granted in grants.items():
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        rule = struct.pack("=Qi", granted, descriptor)
        call("landlock_add_rule", rules, 1, ctypes.c_char_p(rule), 0)
        os.close(descriptor)
    call("landlock_restrict_self", rules, 0)
    os.close(rules)
    return version


# -- seccomp -------------------------------------------------------------------------------------------------------------

_LOAD, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _FIRST, _SECOND = 0, 4, 16, 24  # offsets in struct seccomp_data (low words of arguments)
_AF_UNIX, _TIOCSTI, _TIOCLINUX = 1, 0x5412, 0x541C


def seccomp() -> None:
    """Refuse system calls that reach other processes, the network or rarely used parts of the kernel; for good.

    Raises OSError where the kernel, or our table, knows no filters. Needs `no_new_privileges`.
    """
    column, arch = machine()
    program = _program(column, arch)
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_ = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    holder = ctypes.create_string_buffer(filter_, len(filter_))
    _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(holder))


def _program(column: int, arch: int) -> list[tuple[int, int, int, int]]:
    """Instructions (code, jump if true, jump if false, value)."""
    refuse = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    out = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    if column == 0:  # x32 is another set of numbers on the same machine
        out += [(_ABOVE, 0, 1, 0x40000000), refuse]
    for numbers in _REFUSED.values():
        if numbers[column] >= 0:
            out += [(_EQUAL, 0, 1, numbers[column]), refuse]
    # glibc falls back to clone, whose flags can be seen here
    out += [(_EQUAL, 0, 1, _CALLS["clone3"][column]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    allow = (_RETURN, 0, 0, _ALLOW)
    out += [(_EQUAL, 0, 4, _CALLS["clone"][column]), (_LOAD, 0, 0, _FIRST), (_ANY_BIT, 0, 1, _ANY_NAMESPACE), refuse]
    out += [allow]
    out += [(_EQUAL, 0, 4, _CALLS["socket"][column]), (_LOAD, 0, 0, _FIRST), (_EQUAL, 1, 0, _AF_UNIX), refuse, allow]
    out += [(_EQUAL, 0, 4, _CALLS["ioctl"][column]), (_LOAD, 0, 0, _SECOND), (_EQUAL, 1, 0, _TIOCSTI)]
    out += [(_EQUAL, 0, 1, _TIOCLINUX), refuse, allow]
    return out


# -- limits --------------------------------------------------------------------------------------------------------------


def counts_by_namespace() -> bool:
    """Since 5.14 a limit on processes inside a user namespace counts those in it, not all of the user's."""
    major, minor = (int("".join(c for c in part if c.isdigit()) or 0) for part in platform.release().split(".")[:2])
    return (major, minor) >= (5, 14)


def limit(memory_bytes: int, file_bytes: int, processes: int, cpu_s: int | None = None) -> None:
    """Limits of one process, for good: memory beyond what it maps now, a file's size, processes, open files, no core."""
    with open("/proc/self/statm") if os.path.exists("/proc/self/statm") else contextlib.nullcontext() as f:
        mapped = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") if f else 1 << 29
    hard = {
        resource.RLIMIT_AS: mapped + memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if cpu_s is not None:
        hard[resource.RLIMIT_CPU] = cpu_s
    for which, value in hard.items():
        allowed = resource.getrlimit(which)[1]
        value = value if allowed == resource.RLIM_INFINITY else min(value, allowed)
        resource.setrlimit(which, (value, value))
