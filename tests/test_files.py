"""Atomic writes: whatever fails, the old file stays whole and nothing is left beside it."""

import errno
import os

import pytest
from safetensors import SafetensorError

from rwkv7.files import write_atomically


def test_replaces_the_old_file(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    write_atomically(target, lambda file: file.write_bytes(b"new") and None)
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_failure_keeps_the_old_file(tmp_path, error):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def write(file):
        file.write_bytes(b"hal")
        raise error

    with pytest.raises(type(error)):
        write_atomically(target, write)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_failed_sync_keeps_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(target, lambda file: file.write_bytes(b"new") and None)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_names_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.bin: its folder .*none does not exist"):
        write_atomically(tmp_path / "none" / "a.bin", lambda file: None)


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("No space left on device\nand more"),
        RuntimeError("[enforce fail] No space left on device\n at frame #0"),
        OSError("No space left on device"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_a_full_disk_is_an_oserror_of_one_line_that_names_the_file(tmp_path, error):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def write(file):
        raise error

    with pytest.raises(OSError, match=r"No space left on device") as met:
        write_atomically(target, write)
    assert str(target) in str(met.value) and "\n" not in str(met.value)
    assert met.value.__cause__ is error
    assert target.read_bytes() == b"old"


def test_an_error_on_the_temporary_file_names_the_one_wanted(tmp_path):
    target = tmp_path / "a.bin"
    with pytest.raises(FileNotFoundError) as met:
        write_atomically(target, lambda file: None)  # writes nothing
    assert met.value.filename == str(target)


def test_a_folder_is_no_place_for_a_file(tmp_path):
    with pytest.raises(IsADirectoryError) as met:
        write_atomically(tmp_path, lambda file: pytest.fail("nothing shall be written"))
    assert met.value.filename == str(tmp_path)
