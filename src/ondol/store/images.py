"""A run's pictures: PNG files named by the hash of their content, so that one is stored once, however often it was seen."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ondol.errors import OndolError
from ondol.records import Image

_NAME = re.compile("[0-9a-f]{64}")


class Images:
    """The folder `images/` of a run; made when there is a picture to put into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def path(self, image: Image) -> Path:
        """Where the picture is, or would be."""
        if not _NAME.fullmatch(image.sha256):  # a record may come from anywhere, and must not name other files
            raise OndolError(f"{image.sha256!r:.80} is not the hash of an image", "it is 64 hex digits")
        return self.folder / f"{image.sha256}.png"

    def save(self, images: Iterable[Image]) -> None:
        """Write those that are not there yet; each appears when it is whole. References without bytes are left alone."""
        for image in images:
            path = self.path(image)
            if image.png is None or path.exists():
                continue
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            try:
                self.folder.mkdir(exist_ok=True)
                with part.open("wb") as file:
                    file.write(image.png)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)
            except OSError as e:
                part.unlink(missing_ok=True)
                raise OndolError(f"{path} cannot be written: {e}", "free some space, then resume") from e

    def read(self, image: Image) -> Image:
        """The picture with its bytes. Raises OndolError where the file is missing or is another picture."""
        path = self.path(image)
        try:
            png = path.read_bytes()
        except OSError as e:
            raise OndolError(
                f"{path} cannot be read: {e}", "the folder 'images' belongs to the run: keep them together"
            ) from e
        if hashlib.sha256(png).hexdigest() != image.sha256:
            raise OndolError(f"{path} is damaged: its content does not have the hash of its name", "restore the file")
        return Image.of(png)
