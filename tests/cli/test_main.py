"""The command itself: what it lists, when it imports, and how mistakes end."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType
from typing import Annotated

import pytest
import torch
import typer

from rwkv7 import cli
from rwkv7.cli import main


@pytest.fixture
def verb(monkeypatch):
    """A verb called "verify" that does what the test says."""

    def install(body):
        def verify(number: Annotated[int, typer.Option()] = 3) -> None:
            """What the test says."""
            body(number)

        module = ModuleType("rwkv7.cli.verify")
        module.verify = verify
        monkeypatch.setitem(sys.modules, "rwkv7.cli.verify", module)
        monkeypatch.setattr(cli, "_exists", lambda name: name == "verify")

    return install


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code or 0


def raising(error):
    def body(number):
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("tokens: expected 3,\n  found 4"), "error: tokens: expected 3, found 4"),
        (TypeError("state: expected a tensor"), "error: state: expected a tensor"),
        (FileNotFoundError(2, "No such file or directory", "a b.pth"), "error: a b.pth: No such"),
        (torch.OutOfMemoryError("CUDA out of memory"), "error: CUDA out of memory"),
        (ValueError(), "error: ValueError"),
        (MemoryError("Unable to allocate 9 EiB"), "error: Unable to allocate 9 EiB"),
        (
            RuntimeError("[enforce] DefaultCPUAllocator: you tried to allocate 16000 bytes. Error"),
            "error: memory: there is no room for 16,000 bytes on the CPU",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(verb, capsys, error, line):
    verb(raising(error))
    assert run("verify") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_a_bug_is_not_dressed_as_a_mistake(verb):
    verb(raising(AttributeError("no attribute 'shpae'")))
    with pytest.raises(AttributeError):
        main(["verify"])


def test_traceback_is_for_developers(verb):
    verb(raising(ValueError("somewhere")))
    with pytest.raises(ValueError, match="somewhere"):
        main(["--traceback", "verify"])


def test_ctrl_c_is_130(verb, capsys):
    verb(raising(KeyboardInterrupt()))
    assert run("verify") == 130
    assert capsys.readouterr().err.strip() == "stopped"


def test_arguments_reach_the_verb_and_its_exit_code_comes_back(verb):
    seen = []
    verb(seen.append)
    assert run("verify", "--number", "7") == 0
    assert seen == [7]

    def no(number):
        raise typer.Exit(1)

    verb(no)
    assert run("verify") == 1


def test_unknown_verbs_and_options_are_exit_code_2(verb, capsys):
    verb(print)
    assert run("fly") == 2
    assert "fly" in capsys.readouterr().err
    assert run("verify", "--numbr", "7") == 2
    assert "--numbr" in capsys.readouterr().err


def test_help_lists_verbs_without_importing_them(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_exists", lambda name: name in ("verify", "bench"))

    def refuse(name):
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr(cli.importlib, "import_module", refuse)
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert "verify" in out
    assert "bench" in out
    assert "train" not in out


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("rwkv7 0.")


def test_python_m_rwkv7():
    ended = subprocess.run(
        [sys.executable, "-m", "rwkv7", "--version"], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("rwkv7 ")
