"""Files: written so that a name always holds a whole one, and tensors read without executing any.

What goes into a file, and what its tensors mean, is the caller's affair.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import re
import secrets
import shutil
import struct
import time
import warnings
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
    *(zipfile.BadZipFile, NotImplementedError, SafetensorError),
)

# What DeepSpeed, DistributedDataParallel, torch.compile and enclosing modules put before names.
WRAPPERS = r"(?:(?:_forward_module|module|_orig_mod|model)\.)*"
_FULL = 1 << 16  # a disk with fewer bytes left has no room for the next piece of a file
_FORGOTTEN = 3600.0  # seconds after which a temporary file has no writer any more
_SAFETENSORS_OWN = f".tmp{'[0-9A-Za-z]' * 6}"  # what it calls its temporary files


class TensorFile(Mapping[str, Tensor]):
    """An open file of tensors as a mapping that reads each when it is asked for.

    Attributes:
        path: of the file.
        metadata: the texts that a .safetensors file keeps beside its tensors.
    """

    _names: dict[str, None]
    _read: Callable[[str], Tensor]
    metadata: Mapping[str, str]

    def __init__(self, path: Path) -> None:
        """Opens it; `open_tensors` does this, and says what is wrong with a file."""
        self.path = path
        self._identity = _identity(path)
        self._open()

    def release(self) -> None:
        """Give back the memory of what was read so far; tensors still held elsewhere stay valid.

        Tensors are mapped, so that a file read from end to end would be in memory once as such,
        beside the copies made of it. ValueError when the file has changed meanwhile.
        """
        if not self._mapped:
            return
        if _identity(self.path) != self._identity:
            raise ValueError(f"{self.path}: changed while it was read; read it again")
        self._open()

    def _open(self) -> None:
        # The old mapping goes before the new one comes.
        self.close()
        self._mapped = True
        if _kind(self.path) == "safetensors":
            opened = safe_open(self.path, framework="pt")
            self._names, self._read = dict.fromkeys(opened.keys()), opened.get_tensor
            self.metadata = opened.metadata() or {}
        else:
            content, self._mapped = _pytorch_tensors(self.path)
            self._names, self._read = dict.fromkeys(content), content.__getitem__

    def close(self) -> None:
        """Let go of the file; tensors still held elsewhere stay valid."""
        empty: dict[str, Tensor] = {}
        self._names, self._read, self.metadata = {}, empty.__getitem__, {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[TensorFile]:
    """The tensors of a .safetensors or PyTorch file (.pth) on the CPU; no code in it is run.

    Args:
        path: how the file begins decides which of the two it is, not its name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged, or holds something else than named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no file {path}")
    path.open("rb").close()  # what may not be read is an OSError
    try:
        file = TensorFile(path)
    except _LOADING as error:
        raise _unreadable(path, error) from None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # torch looks in a truncated file for what would lie before its beginning.
        raise _unreadable(path, error) from None
    try:
        yield file
    finally:
        file.close()


def _kind(path: Path) -> str:
    """How the file is to be read: as it begins, and only if that says nothing as it is called."""
    with path.open("rb") as file:
        beginning = file.read(9)
    if beginning[4:] == b"\0\0\0\0{":  # of eight bytes, the length of what the brace opens
        return "safetensors"
    if beginning.startswith((b"PK", b"\x80")):  # a zip archive, a pickle
        return "PyTorch"
    return "safetensors" if path.suffix == ".safetensors" else "PyTorch"


def _identity(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _pytorch_tensors(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors, and whether they are mapped. No more memory is taken than the file is long."""
    if path.suffix == ".safetensors":  # torch.load would go by the name
        raise ValueError("it is a PyTorch file under another name; rename it to .pth")
    # Files of PyTorch before 1.6 are not zip archives, and cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    if mapped:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, which PyTorch's own files never are")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of foreign pickles it says how they might be run
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(x, Tensor) for name, x in content.items()
    ):
        found = type(content).__name__
        if isinstance(content, dict):
            found = f"one with the keys {', '.join(map(str, list(content)[:4]))}"
        raise ValueError(f"expected a dictionary of named tensors, found {found}")
    dense = {name: x for name, x in content.items() if x.layout == torch.strided}
    for name, x in dense.items():
        if x.is_meta:
            raise ValueError(f"{name} has a shape and no numbers: it was saved on the meta device")
        if x.nbytes > x.untyped_storage().nbytes():
            raise ValueError(f"{name} claims {x.nbytes:,} bytes of memory, more than it has")
    # A tied head shares the embedding's memory; nothing honest shares more than that.
    if sum(x.nbytes for x in dense.values()) > 2 * path.stat().st_size:
        raise ValueError("its tensors claim more memory than twice the file's length")
    return content, mapped


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Have `write` make a temporary file beside `path`, then move it there in one step.

    Whatever fails (a full disk, Ctrl-C, an error in `write`), the file that was there before stays
    whole and the temporary file is removed; a kill or a power cut leaves the old or the new file.

    Args:
        path: where the file shall be; a symbolic link keeps pointing to it. A new file may be read
            by whom the user's other new files may be read by, an old one by whom it was.
        write: makes the file at the path it is given, in the folder of `path`.

    Raises:
        FileNotFoundError, IsADirectoryError, OSError: what `check_destination` says.
        OSError: what the writing met, for instance a full disk; it names `path`.
    """
    check_destination(path)
    final = Path(path).resolve()
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    try:
        mode = final.stat().st_mode if final.exists() else _mode_of_new(temporary)
        write(temporary)
        temporary.chmod(mode)  # safetensors writes files for their owner alone
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


def write_folder_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Have `write` fill a temporary folder beside `path`, then give it that name in one step.

    Whatever fails, nothing is left behind.

    Args:
        path: where the folder shall be; nothing is there yet, or an empty folder.
        write: puts files into the folder it is given.

    Raises:
        FileExistsError: something is there.
        FileNotFoundError: the folder that it shall be in does not exist.
        OSError: what the writing met, for instance a full disk; it names `path`.
    """
    check_folder(path)
    final = Path(path).resolve()
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        mode = _mode_of_new(temporary / "mode")
        write(temporary)
        for written in temporary.iterdir():
            written.chmod(mode)
            with written.open("rb+") as file:
                os.fsync(file.fileno())
        sync_folder(temporary)
        if final.is_dir():
            final.rmdir()  # Windows renames onto no folder, not even an empty one
        temporary.rename(final)
    except OSError as error:
        raise OSError(error.errno, error.strerror or _reason(error), str(path)) from error
    except (SafetensorError, RuntimeError) as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(final.parent)


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raise unless `path` can name a new folder; for asking before the work that fills it.

    Raises:
        FileExistsError: a file, or a folder with something in it, is there.
        FileNotFoundError: the folder that it shall be in does not exist.
    """
    final = Path(path).resolve()
    if final.is_file() or (final.is_dir() and any(final.iterdir())):
        raise FileExistsError(errno.EEXIST, "is there; expected a new or empty folder", str(path))
    if not final.parent.is_dir():
        raise FileNotFoundError(f"{path}: its folder {final.parent} does not exist; make it first")


def check_destination(path: str | os.PathLike[str]) -> None:
    """Raise unless `path` can name a file to write; for asking before the work that fills it.

    Raises:
        FileNotFoundError: its folder does not exist.
        IsADirectoryError: it is a folder itself.
        OSError: it is a device, a pipe or alike: a file put in its place would be its end.
    """
    final = Path(path).resolve()
    if final.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; expected a name for a file", str(path))
    if final.exists() and not final.is_file():
        raise OSError(errno.EINVAL, "is a device or a pipe; expected a name for a file", str(path))
    if not final.parent.is_dir():
        raise FileNotFoundError(f"{path}: its folder {final.parent} does not exist; make it first")


def remove_forgotten(folder: Path, pattern: str) -> None:
    """Remove the temporary files in `folder` that killed processes left an hour ago or more.

    Those that `pattern` names, and those that safetensors makes beside the file it is to write.
    """
    for path in (*folder.glob(pattern), *folder.glob(_SAFETENSORS_OWN)):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _FORGOTTEN:
                path.unlink()


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


def _mode_of_new(path: Path) -> int:
    """Who may read and write what the user makes at `path`, where nothing is; nothing stays."""
    path.touch(exist_ok=False)
    try:
        return path.stat().st_mode
    finally:
        path.unlink()


def _unwritable(path: str | os.PathLike[str], error: Exception) -> OSError:
    # safetensors says why in words that hold the system's number.
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(found[1]), os.strerror(int(found[1])), str(path))
    # torch says where in the file it stopped, not why.
    if shutil.disk_usage(Path(path).resolve().parent).free < _FULL:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    return OSError(f"{path}: could not be written ({_reason(error)}); what was there is whole")


def _reason(error: Exception) -> str:
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {found[1]}, which is code and no tensor; nothing was run"
    # torch.load first recommends to run what the file says; what it met comes after that.
    if text.startswith("Weights only load failed"):
        text = text.partition("WeightsUnpickler error:")[2]
    line = (text.strip() or type(error).__name__).splitlines()[0]
    if re.fullmatch(r"(Unsupported operand )?\d+", line):  # what the unpickler cannot go on from
        return "it is no file that torch.save wrote; nothing was run"
    return line


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: cannot be read as a {_kind(path)} file of tensors: it is truncated, damaged or "
        f"something else ({_reason(error)})"
    )
