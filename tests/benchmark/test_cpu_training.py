"""benchmarks/cpu_training.py times the same training three ways, and keeps what it found."""

import json
import runpy
from pathlib import Path

import pytest

from rwkv7.training import TrainSettings

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cpu_training.py"


def test_all_operators_train_the_same_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rwkv7.benchmark.clock._RUNS", range(1, 2))
    settings = TrainSettings(layers=1, width=32, head_size=16, batch=2, window=16, steps=20)
    out = tmp_path / "cpu.json"
    found = runpy.run_path(str(SCRIPT))["main"](out, settings)
    assert found == json.loads(out.read_text())
    losses = [figure["loss"] for figure in found["figures"].values()]
    assert len(losses) == 3 and losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert len(found["times"]) == 2 and all(x > 0 for x in found["times"].values())
    printed = capsys.readouterr().out
    assert all(f"{ratio:.2f}x {name}" in printed for name, ratio in found["times"].items())
