"""The folder in which everything lies that visitors of the page send: swept while it serves, and removed at its end."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KEPT_S = 2 * 3600.0
"""How long a file of a visitor is kept; a chat that is older asks for its image once more."""
MAX_BYTES = 4 << 30
"""Of all visitors' files together; the oldest go first."""
_LOOK_S = 0.1


@contextmanager
def own_folder() -> Iterator[Path]:
    """A folder of this page alone, for uploads and all temporary files; it is removed at the end.

    Gradio's own place is one for all of a machine's pages, which clear it of each other's images.
    """
    before = os.environ.get("GRADIO_TEMP_DIR"), tempfile.tempdir
    folder = Path(tempfile.mkdtemp(prefix="sightline-demo-"))
    os.environ["GRADIO_TEMP_DIR"] = tempfile.tempdir = str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = before[1]
        os.environ.pop("GRADIO_TEMP_DIR")
        if before[0] is not None:
            os.environ["GRADIO_TEMP_DIR"] = before[0]
        remove(folder)


def remove(folder: Path) -> None:
    """Remove the folder, also while a request writes into it."""
    for _ in range(3):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(_LOOK_S)


def forget_old(folder: Path, kept_s: float = KEPT_S, max_bytes: int = MAX_BYTES) -> None:
    """Remove visitors' files that are older, and the oldest of those that are too many."""
    files = []
    for path in folder.rglob("*"):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        if not path.is_dir():
            files.append((status.st_mtime, status.st_size, path))
    num_bytes, now_s = 0, time.time()
    for modified_s, size, path in sorted(files, key=lambda file: -file[0]):
        num_bytes += size
        if now_s - modified_s > kept_s or num_bytes > max_bytes:
            path.unlink(missing_ok=True)
