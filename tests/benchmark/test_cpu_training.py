"""benchmarks/cpu_training.py times the same training three ways, and keeps what it found."""

import json
import runpy
from pathlib import Path

import pytest

from rwkv7.training import TrainSettings

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cpu_training.py"


def test_all_operators_train_the_same_model(tmp_path, monkeypatch):
    monkeypatch.setattr("rwkv7.benchmark.clock._RUNS", range(1, 2))
    settings = TrainSettings(layers=1, width=32, head_size=16, batch=2, window=16, steps=20)
    runpy.run_path(str(SCRIPT))["main"](tmp_path, settings)
    (file,) = tmp_path.iterdir()
    parts = json.loads(file.read_text())["parts"]
    losses = [part["loss"] for part in parts[:3]]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert len(parts) == 5 and all(part["speed"] > 0 for part in parts[3:])
    ours, loop = parts[0]["tokens_per_s"], parts[2]["tokens_per_s"]
    assert parts[4]["speed"] == pytest.approx(ours / loop)
