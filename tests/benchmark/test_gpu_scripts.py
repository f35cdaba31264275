"""The benchmarks of training, in small on the CPU: each leaves what it says, for our side alone."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rwkv7.benchmark.pages import run_tables, runs_in
from rwkv7.benchmark.record import Record

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "gpu"
SMALL = ["--device", "cpu", "--layers", "2", "--width", "64"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script by name; nothing that it sets outlives the test."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)

    def load(name: str, *arguments: str) -> ModuleType:
        monkeypatch.setattr(sys, "argv", [name, *arguments, *SMALL])
        return importlib.import_module(name)

    return load


def _parts(folder: Path) -> list[dict[str, Any]]:
    """Of the one file that the folder has; a page can be made of it."""
    (path,) = folder.glob("*.json")
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["parts"]
    assert len(run_tables(runs_in(folder))) == 1
    return found


def test_training_speed(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = "--vocabulary 256 --window 32 --rows 2 --large-layers 2 --large-width 64"
    module = script("train_model", str(tmp_path), *sizes.split(), "--large-rows", "1")
    monkeypatch.setattr(module, "MOST_STEPS", 3)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--parts", "ours,mfu"])
    module.main()
    ours, kept, again = _parts(tmp_path)
    assert ours["tokens_a_step"] == 64 and ours["steps"] == 3 and len(ours["losses"]) == 9
    # The large one is the small one here: computing layers again changes no loss.
    assert kept["losses"] == pytest.approx(again["losses"], rel=1e-5)


def test_batches_are_packed_documents(script: Any) -> None:
    batch = script("train_model")._batches(3, 16, 50, torch.device("cpu"))[0]
    offsets = batch.cu_seqlens.tolist()
    assert offsets[0] == 0 and offsets[-1] == 48 and {16, 32} <= set(offsets)
    ends = [end - 1 for end in offsets[1:]]
    ignored = (batch.targets[0] == -100).nonzero().flatten().tolist()
    assert ignored == ends
    inside = [t for t in range(47) if t not in ends]
    assert batch.targets[0, inside].tolist() == batch.inputs[0, [t + 1 for t in inside]].tolist()


def test_where_a_step_spends_its_time(script: Any, tmp_path: Path) -> None:
    sizes = "--vocabulary 256 --window 32 --rows 2 --profile"
    script("train_model", str(tmp_path), *sizes.split()).main()
    (part,) = _parts(tmp_path)
    places = {row["part"]: row for row in part["rows"]}
    operator = places["TimeMix in Block: rwkv7::wkv7"]
    assert "ChannelMix in Block: aten::square" in places
    assert part["step_ms"] == pytest.approx(sum(row["ms"] for row in part["rows"]))
    # Going back through the operator counts as the operator's: most of a step this small.
    assert operator["share"] > 0.3


def test_loss_curve(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = "--window 16 --batch 2 --steps 4 --sides rwkv7"
    module = script("loss_curve", str(tmp_path), *sizes.split())
    monkeypatch.setattr(module, "split", lambda text: (text[:500], text[500:600]))
    module.main()
    _, side = _parts(tmp_path)
    assert len(side["losses"]) == 4 and side["losses"][-1] == pytest.approx(side["last_loss"])
    assert 0 < side["held_out_bits_per_byte"] < 9
    picture = tmp_path / "curve.png"
    monkeypatch.setattr(sys, "argv", ["loss_curve", str(tmp_path), "--draw", str(picture)])
    module.main()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_long_context(script: Any, tmp_path: Path) -> None:
    sizes = "--tokens 96 --window 16 --lengths 50 --dtype float32"
    script("long_context", str(tmp_path), *sizes.split()).main()
    difference = _parts(tmp_path)[-1]
    assert difference["part"] == "50 tokens, difference"
    assert difference["whole"] < 1e-5 and difference["worst"] < 1e-4


def test_a_part_that_fails_or_comes_too_late_is_kept_as_such(tmp_path: Path) -> None:
    record = Record(tmp_path, "some", torch.device("cpu"), about="Some.\nMore.", limit=60)

    def fails() -> dict[str, Any]:
        raise torch.OutOfMemoryError("no room\nmore")

    assert not record.part("large", fails)
    assert not record.part("late", dict, needs=120)
    assert record.part("fine", lambda: {"seconds": 1})
    large, late, fine = _parts(tmp_path)
    assert large["out_of_memory"] == "no room" and "needs 120" in late["not_run"]
    assert fine["seconds"] == 1
