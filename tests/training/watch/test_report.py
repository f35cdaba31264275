"""The log keeps what happened, the plot shows it, and the console says it once."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from rwkv7.training.evaluate import Evaluation
from rwkv7.training.watch.log import RunLog, StepRecord, plot_loss, read_log
from rwkv7.training.watch.report import BarReport, LineReport, Report, console_report

HELD_OUT = Evaluation(carried=2.25, dropped=2.5, bytes=1000)


def record(step: int) -> StepRecord:
    return StepRecord(
        step=step, loss=1.5, bits_per_byte=2.0, lr=1e-3, grad_norm=0.5, tokens=128, seconds=0.25
    )


def test_log_of_a_resumed_run_is_that_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    for path, last in ((whole, 4), (cut, 3)):
        log = RunLog(path)
        for step in range(1, last + 1):
            log.step(record(step))
            if step == 2:
                log.evaluation(step, HELD_OUT)
        log.close()
    with cut.open("a") as file:
        file.write('{"step": 4, "lo')  # where a kill came
    log = RunLog(cut, step=2)  # the last checkpoint
    for step in (3, 4):
        log.step(record(step))
    log.close()
    assert cut.read_text() == whole.read_text()
    assert read_log(whole)[2] == {
        "step": 2,
        "held_out_bits_per_byte": 2.25,
        "held_out_bits_per_byte_state_dropped": 2.5,
        "held_out_bytes": 1000,
    }
    assert json.loads(whole.read_text().splitlines()[0])["bits_per_byte"] == 2.0


def test_plot(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    plot_loss(tmp_path / "log.jsonl", tmp_path / "none.png")  # a run stopped at once
    log.step(record(1))
    log.evaluation(1, HELD_OUT)
    log.close()
    plot_loss(tmp_path / "log.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "loss.png", "none.png"]


@pytest.mark.parametrize("kind", [BarReport, LineReport])
def test_what_is_shown(kind: type[Report]) -> None:
    out = io.StringIO()
    console = Console(file=out, width=160, force_terminal=kind is BarReport, color_system=None)
    report = kind(console)
    report.begin(1, 3)
    for step in (2, 3):
        report.step(record(step))
    report.evaluation(3, HELD_OUT)
    report.note("a [note]")
    report.end()
    text = out.getvalue()
    for wanted in (
        "3/3",
        "loss 1.5000  2.0000 bits/byte  512 tokens/s",
        "left",
        "2.2500 bits per byte with the state carried, 2.5000 with it dropped",
        "a [note]",
    ):
        assert wanted in text
    if kind is LineReport:
        assert text.count("bits/byte") == 1  # the last step's, the others came too soon after
        assert "0:00:00 left" in text


def test_a_bar_is_for_terminals() -> None:
    assert isinstance(console_report(Console(file=io.StringIO())), LineReport)
    terminal = Console(file=io.StringIO(), force_terminal=True)
    assert isinstance(console_report(terminal), BarReport)


def test_lines_that_are_not_of_a_log_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [b"[1]", b"7", b"null", b'{"loss": 1}', b'{"step": "2"}', b"[" * 100_000, b"\xff"]
    path.write_bytes(b"\n".join([*lines, b'{"step": 1}', b'{"step": 3}']) + b"\n")
    assert read_log(path) == [{"step": 1}, {"step": 3}]
    RunLog(path, step=2).close()
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_with_the_name_of_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.symlink_to("/dev/full")
    log = RunLog.__new__(RunLog)
    log._path, log._file = path, path.open("a", encoding="utf-8")
    with pytest.raises(OSError, match="No space left") as caught:
        log.step(record(1))
    assert caught.value.filename == str(path)
    log.close()
