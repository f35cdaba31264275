"""`rwkv7 verify`: the table, the plot, the JSON file and the exit code."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import rwkv7.verification
from rwkv7.cli import main
from rwkv7.verification import Check, Row, Sizes
from rwkv7.verification.plot import draw
from rwkv7.wkv7 import registry
from rwkv7.wkv7.tolerance import Measure


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(rwkv7.verification, "Sizes", lambda: Sizes(B=1, T=24, H=1, K=32, V=32))
    monkeypatch.setenv("COLUMNS", "80")


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["verify", *(str(argument) for argument in arguments)])
    return ended.value.code or 0


def test_the_table_the_plot_and_the_numbers(capsys, tmp_path):
    assert run("--plot", tmp_path / "v.png", "--json", tmp_path / "v.json") == 0
    out, _ = capsys.readouterr()
    assert "reference on cpu" in out
    assert "random" in out
    assert "seen" in out
    assert "within their bounds" in out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["ok"] is True
    row = next(r for r in report["rows"] if r["dtype"] == "float32" and r["state"] == "zero")
    assert row["errors"]["dstate"]["error"] <= row["errors"]["dstate"]["bound"] == 1e-5
    assert report["machine"]["torch"] == torch.__version__


def test_a_failing_backend_is_exit_code_1(monkeypatch, capsys, tmp_path):
    backend = registry.get_backend("reference")
    plain = backend.forward

    def off(call, save):
        y, state, saved = plain(call, save)
        return y * (1 + 1e-4 * (call.v.dtype == torch.float32)), state, saved

    monkeypatch.setattr(backend, "forward", off)
    assert run("--json", tmp_path / "v.json") == 1
    assert "FAIL" in capsys.readouterr().out
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["ok"] is False
    assert {r["dtype"] for r in report["rows"] if not r["ok"]} == {"float32"}


def test_a_peer_that_is_off_is_shown_and_is_not_our_failure(monkeypatch, capsys, tmp_path):
    def peers(names, sizes, devices):
        off = Row("a peer's long_name_of_a_kernel", "cpu", torch.float32, "none", {}, peer=True)
        measures = {"y": Measure(0.1, 1e-5), "state": Measure(0.0, 1e-5)}
        off = replace(off, measures=measures)
        return [Check(off.subject, "cpu", lambda: [off])], []

    monkeypatch.setattr(rwkv7.verification, "peer_checks", peers)
    assert run("--against", "fla", "--json", tmp_path / "v.json") == 0
    out = capsys.readouterr().out
    assert "a peer's long_name_of_a_kernel on cpu" in out
    assert ["none", "1e-1", "0", "off"] in [line.split() for line in out.splitlines()]
    assert out.splitlines()[-1].endswith("; of the peers' 1: 0")
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["ok"] is True
    assert [row["ok"] for row in report["rows"] if row["peer"]] == [False]


def test_a_backend_that_crashes_is_shown_and_the_rest_is_too(monkeypatch, capsys, tmp_path):
    def crash(call, save):
        raise RuntimeError("the kernel did not compile")

    monkeypatch.setattr("rwkv7.verification.checks.wkv7_step_", lambda *_: crash(None, None))
    assert run("--json", tmp_path / "v.json", "--plot", tmp_path / "v.png") == 1
    out = capsys.readouterr().out
    assert "wkv7_step_: RuntimeError: the kernel did not compile" in out
    assert "reference on cpu" in out
    assert "seen" in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--against", "llama"), "error: against: expected fla or rwkv, found 'llama'"),
        (("--plot", "/nowhere/at/all.png"), "error: /nowhere/at/all.png: its folder"),
        (("--against", ""), "error: against: expected fla, rwkv or fla,rwkv, found ''"),
        (("--against", " ,"), "error: against: expected fla, rwkv or fla,rwkv, found ' ,'"),
        (("--json", "/"), "error: /: is a folder"),
        (("--json", "/nowhere/v.json"), "error: /nowhere/v.json: its folder"),
        (("--plot", "v.xyz"), "error: v.xyz: expected a name in .png"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, line):
    assert run(*arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(line)


def test_numbers_that_are_none_can_be_drawn(tmp_path):
    measures = {"y": Measure(float("nan"), 1e-5), "state": Measure(float("inf"), 1e-5)}
    row = Row("broken", "cpu", torch.float32, "zero", measures)
    draw([row], tmp_path / "v.svg")
    assert (tmp_path / "v.svg").stat().st_size > 1000
