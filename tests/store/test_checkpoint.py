"""Checkpoints: whole or absent, whatever happens while saving."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ondol.errors import OndolError
from ondol.store import latest_checkpoint, save_checkpoint
from ondol.store.checkpoint import MANIFEST, damage


def writer(text: str):
    def write(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "weights.bin").write_text(text)
        (folder / "state.json").write_text(json.dumps({"text": text}))

    return write


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def text_of(path: Path | None) -> str:
    assert path is not None
    return (path / "model" / "weights.bin").read_text()


def test_save_latest_and_rotation(tmp_path):
    folder = tmp_path / "checkpoints"
    assert latest_checkpoint(folder) is None
    for step in range(12):
        path = save_checkpoint(folder, f"step-{step}", writer(str(step)), keep=2, protect={"step-3"})
        assert path == folder / f"step-{step}" == latest_checkpoint(folder)
        assert text_of(path) == str(step)
        # Times of files say nothing about the order.
        os.utime(path, (0, 0))
    assert names(folder) == ["step-10", "step-11", "step-3"]
    assert save_checkpoint(folder, "step-12", writer("x"), keep=1) and names(folder) == ["step-12"]


def test_same_name_again_replaces_and_is_newest(tmp_path):
    for name, text in (("a", "old"), ("b", "b"), ("a", "new")):
        save_checkpoint(tmp_path, name, writer(text))
    assert names(tmp_path) == ["a", "b"]
    assert latest_checkpoint(tmp_path) == tmp_path / "a" and text_of(tmp_path / "a") == "new"


def test_killed_between_the_renames_of_a_replacement(tmp_path):
    save_checkpoint(tmp_path, "a", writer("old"))
    os.rename(tmp_path / "a", tmp_path / ".replaced-a")
    assert text_of(latest_checkpoint(tmp_path)) == "old"
    save_checkpoint(tmp_path, "b", writer("new"))
    assert names(tmp_path) == ["a", "b"] and text_of(tmp_path / "a") == "old"


@pytest.mark.parametrize("harm", ["cut", "flip", "missing", "manifest", "no manifest"])
def test_damaged_ones_are_skipped_with_the_reason(tmp_path, harm):
    for name in "ab":
        save_checkpoint(tmp_path, name, writer("text of " + name))
    file = tmp_path / "b" / "model" / "weights.bin"
    if harm == "cut":
        file.write_text("text")
    elif harm == "flip":
        file.write_text("text of x")
    elif harm == "missing":
        file.unlink()
    elif harm == "manifest":
        (tmp_path / "b" / MANIFEST).write_text('{"order": 2, "fi')
    else:
        (tmp_path / "b" / MANIFEST).unlink()
    told = []
    assert latest_checkpoint(tmp_path, lambda path, why: told.append((path.name, why))) == tmp_path / "a"
    if harm != "no manifest":  # without one it is not a checkpoint at all
        assert told and told[0][0] == "b" and ("weights.bin" in told[0][1] or "manifest" in told[0][1])
        with pytest.warns(UserWarning, match="damaged"):
            latest_checkpoint(tmp_path)
    assert damage(tmp_path / "b") and not damage(tmp_path / "a")
    save_checkpoint(tmp_path, "c", writer("c"), keep=2)
    if harm != "flip":  # one seen to be damaged does not count among those kept
        assert {"a", "c"} <= set(names(tmp_path))
    assert latest_checkpoint(tmp_path, lambda *_: None) == tmp_path / "c"


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("keep me")
    for name in "abc":
        save_checkpoint(tmp_path, name, writer(name), keep=1)
    assert names(tmp_path) == ["c", "notes"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # as safetensors says it
    ],
)
def test_full_disk_keeps_the_old_and_says_so(tmp_path, error):
    save_checkpoint(tmp_path, "a", writer("a"), keep=1)

    def write(folder: Path) -> None:
        writer("half")(folder)
        raise error

    with pytest.raises(OndolError, match="disk is full") as caught:
        save_checkpoint(tmp_path, "b", write, keep=1)
    assert "free some space" in str(caught.value)
    assert names(tmp_path) == ["a"] and latest_checkpoint(tmp_path) == tmp_path / "a"


def test_really_full_disk(tmp_path):
    """A tiny disk in memory, where mounting is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting is not allowed here")
    try:
        save_checkpoint(disk, "a", writer("a" * 300_000), keep=1)
        with pytest.raises(OndolError, match="disk is full"):
            save_checkpoint(disk, "b", writer("b" * 900_000), keep=1)
        assert names(disk) == ["a"] and text_of(latest_checkpoint(disk)) == "a" * 300_000
        save_checkpoint(disk, "b", writer("b" * 100_000), keep=1)
        assert names(disk) == ["b"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_other_errors_pass_and_leave_nothing(tmp_path):
    with pytest.raises(KeyError):
        save_checkpoint(tmp_path, "a", lambda folder: {}["x"])
    with pytest.raises(ValueError, match="wrote nothing"):
        save_checkpoint(tmp_path, "a", lambda folder: None)
    for wrong in ("", ".hidden", "a/b"):
        with pytest.raises(ValueError, match="name"):
            save_checkpoint(tmp_path, wrong, writer("x"))
    with pytest.raises(ValueError, match="keep"):
        save_checkpoint(tmp_path, "a", writer("x"), keep=0)
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        save_checkpoint(tmp_path / "file" / "sub", "a", writer("x"))


SAVER = """
import sys
from pathlib import Path
from ondol.store.checkpoint import latest_checkpoint, save_checkpoint

folder = Path(sys.argv[1])
path = latest_checkpoint(folder)
n = int((path / "n").read_text()) if path else 0
print("go", flush=True)
while True:
    n += 1
    def write(d):
        for i in range(8):
            (d / f"part{i}").write_bytes(str(n).encode() * 2000)
        (d / "n").write_text(str(n))
    save_checkpoint(folder, f"step-{n % 5}", write)  # names come again: replacements are killed too
    print(n, flush=True)
"""


def test_kill_9_while_saving_many_times(tmp_path):
    random.seed(0)
    told_before = kills = 0
    while kills < 15 or told_before <= 5:  # on a slow disk few saves fit between two kills
        kills += 1
        child = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None and child.stdout.readline() == "go\n"
        time.sleep(random.uniform(0.01, 0.12))
        child.kill()
        told = [int(line) for line in child.communicate()[0].split("\n")[:-1]]
        path = latest_checkpoint(tmp_path, lambda path, why: pytest.fail(f"{path}: {why}"))
        promised = max([told_before, *told])
        if promised:
            assert path is not None
            n = int((path / "n").read_text())
            # What `save_checkpoint` returned from is there; at most one more was finished but not yet told.
            assert promised <= n <= promised + 1
            assert all((path / f"part{i}").read_bytes() == str(n).encode() * 2000 for i in range(8))
            told_before = n
    save_checkpoint(tmp_path, "end", writer("end"), keep=2)
    assert len(names(tmp_path)) == 2 and latest_checkpoint(tmp_path) == tmp_path / "end"
