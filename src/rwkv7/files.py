"""Writing a file so that its name always holds a whole one: the old until the new is complete.

What goes into the file is the caller's affair.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Have `write` make a temporary file beside `path`, then move it there in one step.

    Whatever fails (a full disk, Ctrl-C, an error in `write`), the file that was there before stays
    whole and the temporary file is removed; a kill or a power cut leaves the old or the new file.

    Args:
        path: where the file shall be; a symbolic link keeps pointing to it.
        write: makes the file at the path it is given, in the folder of `path`.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: what the writing met, for instance a full disk.
    """
    path = Path(path).resolve()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: the folder {path.parent} does not exist; make it first")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # Makes the rename itself survive a power cut; Windows cannot open folders and needs it not.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
