"""`rwkv7 train`: the settings' options, resuming, and how a run's end is told."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from rwkv7 import RWKV7, ModelConfig, save_model
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


def test_settings_that_follow_from_others_or_contradict_them(
    app: typer.Typer, tmp_path: Path
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("in the beginning was the word, " * 20)
    given = [str(text), "--out", str(tmp_path / "run"), "--steps", "1", "--warmup", "0", *SMALL]
    result = CliRunner().invoke(app, [*given, "--lr", "5e-5"])
    assert result.exit_code == 0, result.output
    found = newest_checkpoint(tmp_path / "run")
    assert found is not None and found.settings.lr_final == 5e-5
    result = CliRunner().invoke(app, [*given, "--held-out-file", str(text)])
    assert isinstance(result.exception, ValueError)
    assert "nothing beside --held-out-file, found 50" in str(result.exception)


def test_a_dry_run_writes_nothing_and_says_what_a_run_would_take(
    app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, run = tmp_path / "a.txt", tmp_path / "run"
    text.write_text("in the beginning was the word, " * 20)
    call = [str(text), "--out", str(run), "--dry-run", "--steps", "5", *SMALL]
    before = sorted(tmp_path.iterdir())
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    model = RWKV7(ModelConfig.from_sizes(vocab_size=256, width=8, layers=1, head_size=8))
    parameters = sum(x.numel() for x in model.parameters())
    assert f"parameters   {parameters:,}, of which {parameters:,} are trained" in result.output
    for part in ("weights", "gradients"):
        assert f"{part} {4 * parameters / 1024:.0f} KiB" in result.output
    assert f"moments {8 * parameters / 1024:.0f} KiB, activations " in result.output
    assert "tokens       80 in 5 steps of 16" in result.output
    assert (
        "about 570 tokens to train on, read 0.14 times" in result.output
        and "tokens/s" in result.output
    )
    # Of a model that is tuned, only what is trained has gradients and moments.
    save_model(model, tmp_path / "base.pth")
    tuned = [*call[:4], "--device", "cpu", "--from", str(tmp_path / "base.pth"), "--tune", "state"]
    result = CliRunner().invoke(app, tuned)
    assert f"parameters   {parameters + 64:,}, of which 64 are trained" in result.output
    assert "gradients 256 B, moments 512 B" in result.output
    # What cannot fit is told without making it, however many layers it has.
    huge = [*call, "--width", "4096", "--layers", "100000"]
    assert "this does not fit into the memory" in CliRunner().invoke(app, huge).output
    monkeypatch.setattr("rwkv7.training.watch.plan.free_memory", lambda _: 1000)
    result = CliRunner().invoke(app, call)
    assert "activations not known" in result.output
    assert "not known: this does not fit into the memory that is free (1000 B)" in result.output
    # What the run would refuse, the dry run does.
    for option, words in (("--window", "at least 1001 tokens"), ("--held-out", "fewer bytes than")):
        result = CliRunner().invoke(app, [*call, option, "1000"])
        assert isinstance(result.exception, ValueError) and words in str(result.exception)
    (tmp_path / "base.pth").unlink()
    assert sorted(tmp_path.iterdir()) == before
    result = CliRunner().invoke(app, [*call, "--resume"])
    assert isinstance(result.exception, ValueError) and "leave --resume out" in str(
        result.exception
    )


def test_from_and_save(app: typer.Typer, tmp_path: Path) -> None:
    text, base, run = tmp_path / "a.txt", tmp_path / "base.pth", tmp_path / "run"
    text.write_text("in the beginning was the word, " * 20)
    save_model(RWKV7(ModelConfig.from_sizes(vocab_size=256, width=8, layers=2, head_size=8)), base)
    call = [str(text), "--from", str(base), "--out", str(run), "--steps", "2", "--window", "8"]
    tuned = [*call, "--device", "cpu", "--tune", "state", "--save", str(tmp_path / "mine.pth")]
    result = CliRunner().invoke(app, tuned)
    assert result.exit_code == 0, result.output
    for path in (run / "state.pth", run / "state.safetensors", tmp_path / "mine.pth"):
        assert path.is_file() and f"written: {path}" in result.output.replace("\n", "")
    result = CliRunner().invoke(app, [*call, "--width", "16"])
    assert isinstance(result.exception, ValueError) and "width: the model" in str(result.exception)


def test_divergence_is_one_line_and_no_traceback(
    app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "rwkv7.training.step.batch_gradients", lambda *given, **options: torch.tensor(math.inf)
    )
    (tmp_path / "a.txt").write_text("in the beginning was the word, " * 20)
    result = CliRunner().invoke(
        app, [str(tmp_path / "a.txt"), "--out", str(tmp_path / "run"), *SMALL]
    )
    assert result.exit_code == 1
    assert "error: stopped at step 1" in result.output


@pytest.mark.parametrize("chat", [False, True])
def test_records_that_cannot_be_read_stop_the_run_or_are_counted_and_named(
    app: typer.Typer, tmp_path: Path, chat: bool
) -> None:
    said = '{"messages": [{"role": "assistant", "content": "it was so"}]}'
    good = said if chat else '{"body": "in the beginning was the word"}'
    text, run = tmp_path / "a.jsonl", tmp_path / "run"
    lines = [good] * 40
    lines[3], lines[39] = '{"body": 7}', "broken"
    text.write_text("\n".join(lines))
    call = [str(text), "--out", str(run), "--steps", "1", "--key", "body", *SMALL, "--window=30"]
    call += ["--chat"] * chat
    for dry in ([], ["--dry-run"]):
        result = CliRunner().invoke(app, [*call, *dry])
        assert "a.jsonl: line 4: " in str(result.exception)
        assert "(--on-bad skip)" in str(result.exception)
        assert not run.exists()
    call += ["--on-bad", "skip"]
    assert "left out: 2 records" in CliRunner().invoke(app, [*call, "--dry-run"]).output
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    printed = result.output.replace("\n", "")
    assert printed.count("a.jsonl: line 4: ") == printed.count("a.jsonl: line 40: ") == 1
    assert "left out: 2 records that could not be read" in printed
    result = CliRunner().invoke(app, [str(text), "--out", str(run), "--resume", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "left out: 2 records that could not be read" in result.output
