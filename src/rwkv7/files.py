"""Files: written so that a name always holds a whole one, and tensors read without executing any.

What goes into a file, and what its tensors mean, is the caller's affair.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import secrets
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# What torch.load raises, depending on where a damaged or foreign file stops making sense.
_LOADING = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, ValueError, struct.error),
    *(AttributeError, LookupError, TypeError, AssertionError, OverflowError),
)


class TensorFile(Mapping[str, Tensor]):
    """An open file of tensors as a mapping that reads each when it is asked for.

    Attributes:
        metadata: the texts that a .safetensors file keeps beside its tensors.
    """

    def __init__(
        self,
        names: dict[str, str],
        read: Callable[[str], Tensor],
        metadata: Mapping[str, str],
    ) -> None:
        """`names` maps the names given out to those that `read` takes."""
        self._names = names
        self._read = read
        self.metadata = metadata

    def __getitem__(self, name: str) -> Tensor:
        return self._read(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike[str], prefix: str = "") -> Iterator[TensorFile]:
    """The tensors of a .safetensors or PyTorch file (.pth) on the CPU; no code in it is run.

    Args:
        path: the suffix .safetensors decides; everything else is read as PyTorch's.
        prefix: taken off names that begin with it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged, or holds something else than named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no file {path}")
    if path.suffix == ".safetensors":
        try:
            opened = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise _unreadable(path, error) from None
        with opened as file:
            names = {name.removeprefix(prefix): name for name in file.keys()}  # noqa: SIM118
            yield TensorFile(names, file.get_tensor, file.metadata() or {})
        return
    try:
        # Files of PyTorch before 1.6 are not zip archives, and cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _LOADING as error:
        raise _unreadable(path, error) from None
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(x, Tensor) for name, x in content.items()
    ):
        raise ValueError(f"{path}: expected a dictionary of named tensors, found something else")
    names = {name.removeprefix(prefix): name for name in content}
    yield TensorFile(names, content.__getitem__, {})


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Have `write` make a temporary file beside `path`, then move it there in one step.

    Whatever fails (a full disk, Ctrl-C, an error in `write`), the file that was there before stays
    whole and the temporary file is removed; a kill or a power cut leaves the old or the new file.

    Args:
        path: where the file shall be; a symbolic link keeps pointing to it.
        write: makes the file at the path it is given, in the folder of `path`.

    Raises:
        FileNotFoundError, IsADirectoryError: what `check_destination` says.
        OSError: what the writing met, for instance a full disk; it names `path`.
    """
    check_destination(path)
    final = Path(path).resolve()
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(final)
    except OSError as error:
        if error.filename is not None and str(error.filename) != str(temporary):
            raise
        if error.errno is None:
            raise _unwritable(path, error) from error
        raise OSError(error.errno, error.strerror, str(path)) from error
    except (SafetensorError, RuntimeError) as error:
        # What safetensors and torch make of a full disk.
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(final.parent)


def check_destination(path: str | os.PathLike[str]) -> None:
    """Raise unless `path` can name a file to write; for asking before the work that fills it.

    Raises:
        FileNotFoundError: its folder does not exist.
        IsADirectoryError: it is a folder itself.
    """
    final = Path(path).resolve()
    if final.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; expected a name for a file", str(path))
    if not final.parent.is_dir():
        raise FileNotFoundError(f"{path}: its folder {final.parent} does not exist; make it first")


def sync_folder(folder: Path) -> None:
    """Have the names in `folder`, a rename for instance, survive a power cut."""
    # Windows cannot open folders and needs it not.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def json_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object that `text` is; ValueError for whatever else it may be."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("expected a JSON object, found one nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, found {type(found).__name__}")
    return found


def _unwritable(path: str | os.PathLike[str], error: Exception) -> OSError:
    return OSError(f"{path}: could not be written ({_reason(error)}); what was there is whole")


def _reason(error: Exception) -> str:
    text = str(error)
    # torch.load first recommends to run what the file says; what it met comes after that.
    text = text.partition("WeightsUnpickler error:")[2] or text
    return (text.strip() or type(error).__name__).splitlines()[0]


def _unreadable(path: Path, error: Exception) -> ValueError:
    kind = "safetensors" if path.suffix == ".safetensors" else "PyTorch"
    return ValueError(
        f"{path}: cannot be read as a {kind} file of tensors: it is truncated, damaged or "
        f"something else ({_reason(error)})"
    )
