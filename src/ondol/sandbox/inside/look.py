"""Looking at processes and folders, through /proc where there is one."""

from __future__ import annotations

import contextlib
import os
import shutil


def listed() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []


def descendants(root: int) -> list[int]:
    """Children of `root`, their children, and so on."""
    children: dict[int, list[int]] = {}
    for pid in listed():
        fields = status(pid)
        if fields is not None:
            children.setdefault(int(fields[1]), []).append(pid)
    out, queue = [], [root]
    while queue:
        found = children.get(queue.pop(), [])
        out += found
        queue += found
    return out


def status(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat after the name: state, parent, ..."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as f:
            return f.read().rpartition(")")[2].split()
    except OSError:
        return None


def is_zombie(pid: int) -> bool:
    fields = status(pid)
    return fields[0] in "ZX" if fields is not None else bool(listed())


def own_bytes(pid: int) -> int:
    """Memory that is a process's own, in bytes; pages shared with its parent since a fork count too."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as f:
            fields = f.read().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def guessed() -> list[int]:
    """Processes of this PID namespace where there is no /proc: up to the number that a new one gets."""
    newest = os.fork()
    if newest == 0:
        os._exit(0)
    os.waitpid(newest, 0)
    out = []
    for pid in range(2, newest):
        with contextlib.suppress(OSError):
            os.kill(pid, 0)
            out.append(pid)
    return out


def tasks_of_user() -> int:
    """Threads that run under our user id on the whole machine: the limit on processes counts them all."""
    mine, count = os.getuid(), 0
    for pid in listed():
        try:
            if os.stat(f"/proc/{pid}").st_uid == mine:
                count += len(os.listdir(f"/proc/{pid}/task"))
        except OSError:
            continue
    return count


def empty_folder(folder: str) -> None:
    """Delete all that is in a folder, and make its .tmp anew; links are not followed."""
    with os.scandir(folder) as entries:
        found = list(entries)
    if len(found) == 1 and found[0].name == ".tmp" and not os.listdir(found[0].path):
        return
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.unlink(entry.path)
    os.makedirs(os.path.join(folder, ".tmp"), exist_ok=True)


def remove(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def folder_bytes(folder: str) -> int:
    """Bytes of the files below a folder; of the first 10,000 at most."""
    total = count = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(base, name)).st_blocks * 512
            count += 1
            if count > 10_000:
                return total
    return total
