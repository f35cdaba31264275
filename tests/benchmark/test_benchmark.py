"""The harness measures what it says, judges the whole call by a part, and makes the tables."""

from __future__ import annotations

import json
import time

import pytest
import torch

from rwkv7.benchmark import BASELINE, Shape, measurements, results_in, update_tables
from rwkv7.benchmark.measure import Sample, _token_loop, peak_mib, seconds
from rwkv7.benchmark.table import BEGIN, END
from rwkv7.verification.problem import Problem, Sizes
from rwkv7.wkv7 import wkv7
from rwkv7.wkv7.registry import backend_names
from rwkv7.wkv7.tolerance import RESULTS, relative_error

CPU = torch.device("cpu")


def test_shapes_are_read_and_written():
    assert Shape.parse("2x1024x4x64") == Shape(2, 1024, 4, 64)
    assert str(Shape(2, 1024, 4, 64)) == "2x1024x4x64"
    for text in ("2x1024x4", "0x1x1x1", "axbxcxd", "", "2x1024x4x64x1"):
        with pytest.raises(ValueError, match="shape: expected BxTxHxN"):
            Shape.parse(text)


def test_seconds_is_the_time_of_one_run():
    assert seconds(lambda: time.sleep(0.02), CPU) == pytest.approx(0.02, rel=0.5)


def test_peak_memory_is_what_is_held_at_once():
    def two_at_once():
        x = torch.ones(2**18)  # 1 MiB
        return (x + 1).sum()

    def one_after_the_other():
        for _ in range(5):
            x = torch.ones(2**18)
            del x

    assert peak_mib(two_at_once, CPU) == pytest.approx(2, abs=0.01)
    assert peak_mib(one_after_the_other, CPU) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_baseline_is_the_recurrence(dtype):
    problem = Problem(Sizes(2, 9, 3, 8, 8), dtype)
    found = problem.run(_token_loop, "random", CPU)
    expected = problem.run(wkv7, "random", CPU)
    for name in RESULTS:
        assert relative_error(found[name], expected[name]) < (1e-12 if dtype.itemsize > 2 else 3e-3)


def test_a_part_judges_the_whole():
    problem = Problem(Sizes(3, 20, 4, 8, 8), torch.float32)
    errors, ok = Sample(problem).errors(problem.run(wkv7, "random", CPU))
    assert ok
    assert set(errors) == set(RESULTS)
    assert 0 < max(errors.values()) < 1e-6

    def other_first_state(*arguments):
        return wkv7(*arguments[:-1], arguments[-1] * 1.001)

    errors, ok = Sample(problem).errors(problem.run(other_first_state, "random", CPU))
    assert not ok


@pytest.fixture(scope="module")
def results():
    return [m.run() for m in measurements(Shape(1, 8, 1, 8), torch.float32, CPU)]


def test_every_backend_is_measured_or_says_why_not(results):
    assert [result.subject for result in results] == [BASELINE, *backend_names()]
    for result in results:
        if result.forward_s is None:
            assert result.note
            continue
        assert result.ok
        assert result.forward_s > 0
        assert result.training_s > 0
        assert result.training_mib > result.forward_mib > 0


def test_out_of_memory_is_noted(monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(Problem, "run", exhausted)
    baseline, *_ = measurements(Shape(1, 8, 1, 8), torch.float32, CPU)
    assert baseline.run().note == "out of memory"


def run_file(folder, date, forward, threads=2):
    """A file as `rwkv7 bench` writes it, with a token loop of 100 ms."""
    errors = {"y": 2e-7, "dr": 1e-7, "dw": 4e-7}
    common = {"route": "", "forward_mib": 1.5, "training_mib": 30.0, "errors": errors}
    results = [
        {"subject": BASELINE, "forward_s": 0.04, "training_s": 0.1, **common},
        {"subject": "torch", "forward_s": forward, "training_s": 0.004, **common},
        {"subject": "cuda", "forward_s": None, "training_s": None, "errors": {}, "note": "no GPU"},
    ]
    case = {"shape": "2x1024x4x64", "dtype": "float32", "device_type": "cpu", "torch": "2.9"}
    run = {"date": date, "device": "A CPU", "threads": threads, "cases": [case]}
    case["results"] = [{"ok": True, "note": "", **result} for result in results]
    (folder / f"operator-{date}-{threads}.json").write_text(json.dumps(run))


def test_tables_hold_the_newest_results_and_nothing_else_changes(tmp_path):
    run_file(tmp_path, "2026-01-01", 0.009)
    run_file(tmp_path, "2026-02-01", 0.002)
    run_file(tmp_path, "2026-01-15", 0.007)
    document = tmp_path / "README.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter — ü\n", encoding="utf-8")
    update_tables(document, results_in(tmp_path))
    text = document.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter — ü\n")
    assert "old" not in text
    assert "| torch | 2 ms | 4 ms | 1.5 MiB | 30 MiB | 25.0x | 2.0e-07 | 4.0e-07 (dw) |" in text
    assert "9 ms" not in text
    assert "cuda" not in text
    assert "2 threads" in text
    once = text
    update_tables(document, results_in(tmp_path))
    assert document.read_text(encoding="utf-8") == once


def test_numbers_of_threads_are_kept_apart(tmp_path):
    run_file(tmp_path, "2026-01-01", 0.009, threads=1)
    run_file(tmp_path, "2026-01-01", 0.009, threads=2)
    assert len(results_in(tmp_path)) == 2


def test_a_document_without_markers_is_left_alone(tmp_path):
    run_file(tmp_path, "2026-01-01", 0.009)
    document = tmp_path / "README.md"
    document.write_text("nothing here")
    with pytest.raises(ValueError, match=r"README\.md: expected the lines"):
        update_tables(document, results_in(tmp_path))
    assert document.read_text() == "nothing here"


def test_a_foreign_file_among_the_results_is_named(tmp_path):
    (tmp_path / "other.json").write_text('{"date": 1}')
    with pytest.raises(ValueError, match=r"other\.json: not a file of"):
        results_in(tmp_path)
