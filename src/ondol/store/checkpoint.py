"""Checkpoints that are whole or absent: written aside, made durable, named by one rename, then old ones removed.

<folder>/<step_name>/...              what `write` wrote
<folder>/<step_name>/manifest.json    order, and size and SHA-256 of every file: written last
<folder>/.tmp-*                       being written, or being deleted; left by a kill, cleaned by the next save
<folder>/.replaced-<step_name>        an older one of the same name, while the new takes its place
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ondol.errors import OndolError

MANIFEST = "manifest.json"
_TMP, _REPLACED = ".tmp-", ".replaced-"


def save_checkpoint(
    folder: Path, step_name: str, write: Callable[[Path], None], keep: int = 2, protect: Collection[str] = ()
) -> Path:
    """Write `<folder>/<step_name>` so that a kill or a full disk at any instant leaves the checkpoints before it.

    Args:
        write: fills the (empty) directory it is given.
        keep: how many of the newest whole checkpoints stay, this one included; at least 1.
        protect: names that are never removed, over and above `keep`.

    Raises:
        OndolError: the disk is full or cannot be written. What `write` raises otherwise is passed on.
    """
    if keep < 1:
        raise ValueError("keep must be at least 1")
    if not step_name or step_name.startswith(".") or "/" in step_name or os.sep in step_name:
        raise ValueError(f"not a checkpoint name: {step_name!r}")
    folder, final = Path(folder), Path(folder) / step_name
    tmp: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clean(folder)
        tmp = Path(tempfile.mkdtemp(prefix=f"{_TMP}{step_name}-", dir=folder))
        write(tmp)
        order = 1 + max((manifest["order"] for _, manifest in _manifests(folder)), default=0)
        _seal(tmp, order)
        if final.exists():
            # A directory cannot be renamed over a full one. A kill between these two renames leaves the older one
            # under its `.replaced-` name, which `latest_checkpoint` knows.
            os.rename(final, folder / f"{_REPLACED}{step_name}")
        os.rename(tmp, final)
        _sync(folder)
    except BaseException as e:
        # Asked before the temporary files go: with them gone the disk is no longer full.
        failure = _disk_failure(e, folder)
        if tmp is not None:
            shutil.rmtree(tmp, ignore_errors=True)
        if failure is None:
            raise
        what, remedy = failure
        raise OndolError(f"checkpoint '{step_name}' was not saved: {what} ({e})", remedy) from e
    _rotate(folder, step_name, keep, protect)
    return final


def latest_checkpoint(folder: Path, on_skip: Callable[[Path, str], None] | None = None) -> Path | None:
    """The newest whole checkpoint, by the order of saving; None when there is none. Changes nothing on disk.

    `on_skip(path, why)` hears of each newer one that is damaged (default: a Python warning).
    """

    def skip(path: Path, why: str) -> None:
        if on_skip is not None:
            on_skip(path, why)
        else:
            warnings.warn(f"checkpoint {path} is damaged and skipped: {why}", stacklevel=3)

    for path in _folders(Path(folder)):
        if (path / MANIFEST).exists() and _read_manifest(path) is None:
            skip(path, f"no readable {MANIFEST}")
    for path, manifest in sorted(_manifests(Path(folder)), key=lambda found: -found[1]["order"]):
        why = damage(path, manifest)
        if why is None:
            return path
        skip(path, why)
    return None


def damage(path: Path, manifest: dict[str, Any] | None = None, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None. `contents=False` compares sizes only, not what is in the files."""
    manifest = _read_manifest(path) if manifest is None else manifest
    if manifest is None:
        return f"no readable {MANIFEST}"
    for name, expected in manifest["files"].items():
        try:
            size = (path / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes instead of {expected['size']}"
            if contents and _sha256(path / name) != expected["sha256"]:
                return f"the contents of {name} changed since it was saved"
        except OSError as e:
            return f"{name} cannot be read: {e.strerror}"
    return None


def _seal(tmp: Path, order: int) -> None:
    """Make everything under `tmp` durable and write its manifest."""
    files = {}
    for path in sorted(tmp.rglob("*")):
        if path.is_dir():
            _sync(path)
        else:
            _sync(path)
            name = path.relative_to(tmp).as_posix()
            files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    if not files:
        raise ValueError("the checkpoint's writer wrote nothing")
    manifest = tmp / MANIFEST
    manifest.write_text(json.dumps({"order": order, "files": files}, indent=1), encoding="utf-8")
    _sync(manifest)
    _sync(tmp)


def _rotate(folder: Path, step_name: str, keep: int, protect: Collection[str]) -> None:
    """Remove what `keep` and `protect` do not hold. A failure here is no failure of the save: the next one retries.

    Older ones count as whole by the sizes of their files: reading them through at every save would cost too much.
    """
    kept = {step_name, *protect}
    whole = 0
    for path, manifest in sorted(_manifests(folder), key=lambda found: -found[1]["order"]):
        if whole < keep and damage(path, manifest, contents=False) is None and not path.name.startswith(_REPLACED):
            whole += 1
        elif path.name not in kept:
            _remove(path)


def _remove(path: Path) -> None:
    """Delete a checkpoint: out of sight in one rename first, so that a kill leaves no half of it under its name."""
    try:
        doomed = Path(tempfile.mkdtemp(prefix=_TMP, dir=path.parent))
        os.rename(path, doomed / path.name)
    except OSError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def _clean(folder: Path) -> None:
    """Clear what an earlier kill left. Only the run's one writer calls this."""
    for path in list(folder.iterdir()):
        if path.name.startswith(_TMP):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(_REPLACED):
            name = folder / path.name.removeprefix(_REPLACED)
            if name.exists():
                _remove(path)
            else:
                os.rename(path, name)


def _manifests(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every directory of `folder` that has a readable manifest. Others are not ours: never counted, never deleted."""
    found = ((path, _read_manifest(path)) for path in _folders(folder))
    return [(path, manifest) for path, manifest in found if manifest is not None]


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(_TMP) and path.is_dir()]


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].values()
        known = isinstance(manifest["order"], int) and all(
            isinstance(f["size"], int) and isinstance(f["sha256"], str) for f in files
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if known else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk_failure(error: BaseException, folder: Path) -> tuple[str, str] | None:
    """(what, remedy) when a failed save is the disk's fault.

    Writers below Python (safetensors, torch) report a full disk as their own error types, so the text is read too.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT) or (isinstance(error, Exception) and "No space left" in str(error)):
        try:
            free = f", {shutil.disk_usage(folder).free / 2**20:.0f} MiB were left"
        except OSError:
            free = ""
        remedy = "free some space or lower how many checkpoints are kept, then resume; the earlier ones are untouched"
        return f"the disk is full{free}", remedy
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{folder} cannot be written", "check the folder's permissions, and whether the disk is read-only"
    return None
