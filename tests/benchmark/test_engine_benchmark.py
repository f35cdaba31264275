"""benchmarks/engine.py runs, and its file says what a figure depends on."""

import json
import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "engine.py"


@pytest.mark.parametrize(
    ("part", "options"),
    [
        ("soak", ["--requests", "40"]),
        ("mixed", ["--requests", "6", "--slots", "3", "--model", "tiny"]),
        ("bounds", ["--model", "tiny"]),
        ("peer", ["--model", "tiny"]),
    ],
)
def test_every_part_runs_and_leaves_its_figures(part, options, tmp_path, capsys, monkeypatch):
    if part == "peer":
        pytest.importorskip("rwkv")
    monkeypatch.setattr("rwkv7.benchmark.clock._RUNS", range(1, 2))
    figures = runpy.run_path(str(SCRIPT))["main"]([str(tmp_path), part, *options])
    (file,) = tmp_path.iterdir()
    result = json.loads(file.read_text())
    assert result["figures"] == json.loads(json.dumps(figures))
    assert result["torch"] == torch.__version__
    assert {"date", "processor", "threads", "model"} <= set(result)
    if part == "soak":
        assert figures["slots free at the end"] == "32 of 32"
        before, after = figures["tensors in memory"].values()
        assert before == after
        assert sum(figures["ended"].values()) == 40
