"""Atomic writes: whatever fails, the old file stays whole and nothing is left beside it."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from rwkv7.files import write_atomically, write_folder_atomically


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


@pytest.mark.skipif(os.name == "nt", reason="who may read a file is said otherwise there")
def test_a_file_may_be_read_by_whom_others_may(tmp_path):
    def private(file):  # as safetensors does
        file.write_bytes(b"new")
        file.chmod(0o600)

    (tmp_path / "plain").touch()
    usual = (tmp_path / "plain").stat().st_mode
    write_atomically(tmp_path / "a.bin", private)
    assert (tmp_path / "a.bin").stat().st_mode == usual
    (tmp_path / "a.bin").chmod(0o640)
    write_atomically(tmp_path / "a.bin", private)
    assert (tmp_path / "a.bin").stat().st_mode & 0o777 == 0o640
    write_folder_atomically(tmp_path / "new", lambda folder: private(folder / "b.bin"))
    assert (tmp_path / "new" / "b.bin").stat().st_mode == usual
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.bin", "new", "plain"]


def test_a_full_disk_is_called_one_whatever_torch_calls_it(tmp_path, monkeypatch):
    found = shutil.disk_usage(tmp_path)._replace(free=512)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: found)

    def write(file):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 7 vs 4")

    with pytest.raises(OSError, match=r"No space left on device: .*a\.bin") as met:
        write_atomically(tmp_path / "a.bin", write)
    assert met.value.errno == errno.ENOSPC


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


def test_a_full_disk_is_known_by_its_number_in_what_safetensors_says(tmp_path):
    says = "Error while serializing: I/O error: No space left on device (os error 28)"

    def write(file):
        raise SafetensorError(says)

    with pytest.raises(OSError, match=r"No space left on device: .*a\.bin") as met:
        write_atomically(tmp_path / "a.bin", write)
    assert met.value.errno == errno.ENOSPC


def test_an_error_on_the_temporary_file_names_the_one_wanted(tmp_path):
    target = tmp_path / "a.bin"
    with pytest.raises(FileNotFoundError) as met:
        write_atomically(target, lambda file: None)  # writes nothing
    assert met.value.filename == str(target)


def test_a_folder_is_no_place_for_a_file(tmp_path):
    with pytest.raises(IsADirectoryError) as met:
        write_atomically(tmp_path, lambda file: pytest.fail("nothing shall be written"))
    assert met.value.filename == str(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are none here")
def test_what_is_no_plain_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", Path(os.devnull)):
        with pytest.raises(OSError, match="is a device or a pipe") as met:
            write_atomically(path, lambda file: pytest.fail("nothing shall be written"))
        assert met.value.filename == str(path)
    assert (tmp_path / "pipe").is_fifo()
