"""`rwkv7 train`: the settings' options, resuming, and how a run's end is told."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from rwkv7.cli.train import train
from rwkv7.training import TrainSettings
from rwkv7.training.checkpoint import newest_checkpoint
from rwkv7.training.loop import Run

SIZES = {"layers": 1, "width": 8, "head-size": 8, "window": 8, "batch": 2, "held-out": 50}
SMALL = ["--device", "cpu", *(f"--{name}={size}" for name, size in SIZES.items())]


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(train)
    return app


def test_every_setting_is_an_option(app: typer.Typer) -> None:
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    for field in fields(TrainSettings):
        assert f"--{field.name.replace('_', '-')} " in text
    assert "(default: 512)" in text


def test_train_stop_resume(
    app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("in the beginning was the word, " * 20)
    run = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        real = Run.go_on
        patch.setattr(Run, "go_on", lambda self, report, _: real(self, report, lambda _: True))
        result = CliRunner().invoke(
            app, [str(tmp_path / "texts"), "--out", run, "--steps", "3", *SMALL]
        )
    assert result.exit_code == 0, result.output
    assert "stopped after step 1" in result.output
    assert f"go on with: rwkv7 train --out {run} --resume" in result.output
    result = CliRunner().invoke(app, ["--out", run, "--resume", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "step 3/3" in result.output and "with the state carried" in result.output
    assert "done: 3 steps" in result.output
    found = newest_checkpoint(tmp_path / "run")
    assert found is not None and found.settings.window == 8 and found.settings.lr == 1e-3
    result = CliRunner().invoke(app, ["--out", run, "--resume", "--seed", "5"])
    assert isinstance(result.exception, ValueError) and "another seed" in str(result.exception)
    result = CliRunner().invoke(app, ["--out", run])
    assert isinstance(result.exception, ValueError)
    assert "expected at least one file" in str(result.exception)


def test_divergence_is_one_line_and_no_traceback(
    app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "rwkv7.training.loop.batch_gradients", lambda *given, **options: torch.tensor(math.inf)
    )
    (tmp_path / "a.txt").write_text("in the beginning was the word, " * 20)
    result = CliRunner().invoke(
        app, [str(tmp_path / "a.txt"), "--out", str(tmp_path / "run"), *SMALL]
    )
    assert result.exit_code == 1
    assert "error: stopped at step 1" in result.output
