"""benchmarks/engine.py runs, and its file says what a figure depends on."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from rwkv7.benchmark.pages import run_tables, runs_in

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
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    figures = runpy.run_path(str(SCRIPT))["main"]([str(tmp_path), part, *options])
    (file,) = tmp_path.iterdir()
    result = json.loads(file.read_text())
    kept = {found.pop("part"): found for found in result["parts"] if found.pop("at_s") >= 0}
    assert kept == {f"tiny: {name}": found for name, found in figures.items()}
    assert result["machine"]["torch"] == torch.__version__
    assert {"date", "device", "threads", "command"} <= set(result)
    (run,) = runs_in(tmp_path)
    assert result["about"] in run_tables([run])[0]
    if part == "soak":
        found = figures["soak"]
        assert found["slots_free"] == "32 of 32"
        assert found["memory_before"] == found["memory_after"]
        assert found["requests"] == 40 and 0 < found["cancelled"] < 40
    if part == "mixed":
        assert figures["deterministic, alone"] == {"compared": 6, "differ": 0}
    if part == "bounds":
        assert figures["sampling, batch 4, the same, penalties"]["share_of_step"] > 0
