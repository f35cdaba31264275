"""The harness measures what it says, judges the whole call by a part, and makes the tables."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import time
import types

import pytest
import torch

from rwkv7.benchmark import (
    BASELINE,
    Shape,
    backend,
    clock,
    fla,
    measure,
    measurements,
    results_in,
    sample,
    step,
    token_loop,
    update_tables,
)
from rwkv7.benchmark.clock import kernels, peak_mib, seconds
from rwkv7.benchmark.document import BEGIN, END
from rwkv7.benchmark.sample import Judge, Sample
from rwkv7.benchmark.table import row
from rwkv7.wkv7 import wkv7
from rwkv7.wkv7.contract import invariance_wanted
from rwkv7.wkv7.registry import backend_names
from rwkv7.wkv7.tolerance import RESULTS, relative_error

CPU = torch.device("cpu")
OURS = ("torch", "reference")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(clock, "_BUDGET", 0.0)
    monkeypatch.setattr(measure, "_MOST_POOLS", 2)


def test_shapes_are_read_and_written():
    assert Shape.parse("2x1024x4x64") == Shape(2, 1024, 4, 64)
    assert str(Shape(2, 1024, 4, 64)) == "2x1024x4x64"
    assert Shape.parse("1x100x4x64/9") == Shape(1, 100, 4, 64, 9)
    assert str(Shape(1, 100, 4, 64, 9)) == "1x100x4x64/9"
    for text in (
        "2x9x4x64/3",
        "1x9x4x64/10",
        "1x9x4x64/0",
        "2x1024x4",
        "0x1x1x1",
        "axbxcxd",
        "",
        "2x1024x4x64x1",
    ):
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


def test_kernels_add_up_to_the_call():
    x = torch.randn(200, 200)
    found = kernels(lambda: x @ x @ x, CPU)
    assert {"aten::mm": 2.0}.items() <= {k["kernel"]: k["calls"] for k in found}.items()
    assert found[0]["ms"] == max(k["ms"] for k in found) > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_baseline_is_the_recurrence(dtype):
    given = Sample(Shape(2, 9, 3, 8), dtype, CPU)
    found = token_loop().prepare(given).training()
    expected = backend("reference").prepare(given).training()
    for name in RESULTS:
        assert relative_error(found[name], expected[name]) < (1e-12 if dtype.itemsize > 2 else 3e-3)


def test_the_inputs_are_those_of_a_model():
    given = Sample(Shape(1, 300, 2, 16, 5), torch.float32, CPU)
    _, w, _, _, a, b = given.inputs
    assert -6 <= w.min() < -5
    assert -1 < w.max() <= 0
    assert torch.allclose(a.norm(dim=-1), torch.ones(()), atol=1e-5)
    rate = (b / -a).mean()
    assert 0.4 < rate < 0.6
    assert given.state.abs().min() > 0
    offsets = given.cu_seqlens
    assert (offsets[0], offsets[-1], len(offsets)) == (0, 300, 6)
    assert (offsets.diff() > 0).all()
    assert len(offsets.diff().unique()) > 1


def test_a_repeated_key_is_nearly_one_vector():
    k = Sample(Shape(1, 50, 1, 64), torch.float32, CPU, repeated_key=True).inputs[2]
    assert (k[:, :1] * k).sum(-1).min() > 0.99
    assert (k[:, 0] != k[:, 1]).all()


@pytest.mark.parametrize("text", ["3x20x4x8", "1x60x4x8/3"])
def test_a_part_judges_the_whole(text, monkeypatch):
    monkeypatch.setattr(sample, "JUDGED_TOKENS", 45)
    given = Sample(Shape.parse(text), torch.float32, CPU)
    errors, ok = Judge(given).errors(backend("torch").prepare(given).training(), "logit")
    assert ok
    assert set(errors) == set(RESULTS)
    assert 0 < max(errors.values()) < 1e-6
    given.state = given.state * 1.001
    found = backend("torch").prepare(given).training()
    given.state = given.state / 1.001
    assert not Judge(given).errors(found, "logit")[1]


def test_of_a_long_sequence_the_beginning_is_judged(monkeypatch):
    monkeypatch.setattr(sample, "JUDGED_TOKENS", 16)
    (measurement,) = measurements(
        "operator", Shape(1, 40, 1, 8), torch.float32, CPU, [token_loop()]
    )
    result = measurement.run()
    assert result.ok
    assert set(result.errors) == set(RESULTS)


def test_every_backend_is_measured_or_says_why_not():
    subjects = [token_loop(), *map(backend, backend_names())]
    plan = measurements("operator", Shape(1, 8, 1, 8), torch.float32, CPU, subjects, profile=True)
    results = [m.run() for m in plan]
    assert [result.subject for result in results] == [BASELINE, *backend_names()]
    for result in results:
        if result.forward_s is None:
            assert result.note
            continue
        assert result.ok
        assert result.forward_s > 0
        assert result.training_s > 0
        assert result.first_call_s > 0
        assert result.training_mib > result.forward_mib > 0
        assert result.kernels


def test_a_backend_is_measured_inside_batch_invariant_too(monkeypatch):
    seen = []

    def watched(*inputs, **options):
        seen.append(invariance_wanted())
        return wkv7(*inputs, **options)

    monkeypatch.setattr("rwkv7.benchmark.subjects.wkv7", watched)
    subjects = [backend("torch"), backend("torch:invariant")]
    results = [
        m.run() for m in measurements("operator", Shape(1, 8, 1, 8), torch.float32, CPU, subjects)
    ]
    assert [result.subject for result in results] == ["torch", "torch, batch-invariant"]
    assert all(result.ok for result in results)
    assert seen == sorted(seen)  # the first without, then the second
    assert set(seen) == {False, True}
    assert not invariance_wanted()
    with pytest.raises(ValueError, match="or NAME:invariant, found 'torch:'"):
        backend("torch:")


def test_decoding_is_one_step_in_place():
    plan = measurements("decoding", Shape(3, 1, 2, 8), torch.bfloat16, CPU, [token_loop(), step()])
    (result,) = [m.run() for m in plan]
    assert result.note == ""
    assert result.ok
    assert result.subject == "wkv7_step_"
    assert result.forward_s > 0
    assert result.copy_share > 0
    with pytest.raises(ValueError, match="expected T = 1"):
        measurements("decoding", Shape(3, 2, 2, 8), torch.bfloat16, CPU, [step()])


def test_what_fails_is_noted_and_the_others_go_on(monkeypatch):
    errors = iter((torch.OutOfMemoryError("no more"), RuntimeError("line\nline")))

    def broken(*_, **__):
        raise next(errors)

    monkeypatch.setattr("rwkv7.benchmark.clock.first_call", broken)
    subjects = [backend(name) for name in OURS]
    first, second = measurements("operator", Shape(1, 8, 1, 8), torch.float32, CPU, subjects)
    assert first.run().note == "out of memory"
    assert second.run().note == "failed: RuntimeError: line line"


def fake_fla(monkeypatch, mistake=lambda state: state):
    """The two functions of fla-core, with its layouts, forms and defaults, by `wkv7`."""

    def chunk_rwkv7(r, w, k, v, a, b, scale, initial_state, output_final_state, **options):
        assert options.pop("chunk_size") in (16, 64)
        assert -0.61 < options.pop("lower_bound") < -0.6
        cu, on_cpu = options.pop("cu_seqlens"), options.pop("cu_seqlens_cpu")
        assert (cu is None) == (on_cpu is None)
        assert not options
        return fused_recurrent_rwkv7(
            r, w, k, v, a, b, scale, initial_state, output_final_state, cu_seqlens=cu
        )

    def fused_recurrent_rwkv7(
        r, w, k, v, a, b, scale=None, initial_state=None, output_final_state=True, cu_seqlens=None
    ):
        assert scale == 1.0
        assert output_final_state
        state = mistake(initial_state).mT
        y, final = wkv7(
            r, w, k, v, a, b, state, decay="log_bounded", cu_seqlens=cu_seqlens, backend="torch"
        )
        return y, final.mT.contiguous()

    operators = types.ModuleType("fla.ops.rwkv7")
    operators.chunk_rwkv7, operators.fused_recurrent_rwkv7 = chunk_rwkv7, fused_recurrent_rwkv7
    for name in ("fla", "fla.ops"):
        module = types.ModuleType(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "fla.ops.rwkv7", operators)
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("work", ["operator", "repeated key", "decoding"])
@pytest.mark.parametrize("text", ["2x33x2x16", "1x33x2x16/3", "4x1x2x16"])
def test_a_peer_gets_its_own_layouts_and_its_results_come_back_in_ours(work, text, monkeypatch):
    shape = Shape.parse(text)
    if (work == "decoding") != (shape.T == 1):
        pytest.skip("decoding is one token")
    fake_fla(monkeypatch)
    (measurement,) = measurements(work, shape, torch.bfloat16, CPU, [fla(16)])
    result = measurement.run()
    assert result.note == ""
    assert result.peer
    assert set(result.errors) == ({"y", "state"} if work == "decoding" else set(RESULTS))
    assert max(result.errors.values()) < 4e-3
    fake_fla(monkeypatch, mistake=lambda state: state.mT)
    (measurement,) = measurements(work, shape, torch.bfloat16, CPU, [fla(16)])
    assert min(measurement.run().errors[name] for name in ("y", "state")) > 1e-2


def test_a_peer_that_cannot_run_here_says_so(monkeypatch):
    fake_fla(monkeypatch)
    monkeypatch.delenv("TRITON_INTERPRET")
    (measurement,) = measurements("operator", Shape(1, 8, 1, 8), torch.bfloat16, CPU, [fla(64)])
    assert measurement.run().note == "its kernels need a GPU"
    with pytest.raises(ValueError, match="chunk: expected one of 16, 32, 64, found 7"):
        fla(7)


def run_file(folder, date, forward, threads=2, peer=None):
    """A file as `rwkv7 bench` writes it, with a token loop of 100 ms."""
    errors = {"y": 2e-7, "state": 1e-7, "dr": 1e-7, "dw": 4e-7}
    common = {"forward_mib": 1.5, "training_mib": 30.0, "first_call_s": 1.25, "errors": errors}
    results = [
        {"subject": BASELINE, "forward_s": 0.04, "training_s": 0.1, **common},
        {"subject": "torch", "forward_s": forward, "training_s": 0.004, **common},
        {"subject": "cuda", "forward_s": None, "training_s": None, "errors": {}, "note": "no GPU"},
    ]
    if peer is not None:
        results.append(
            {"subject": "theirs", "peer": True, "forward_s": peer, "training_s": peer, **common}
        )
    case = {"work": "operator", "shape": "2x1024x4x64", "dtype": "float32", "device_type": "cpu"}
    other = {**case, "work": "decoding", "shape": "64x1x4x64"}
    run = {"date": date, "device": "A CPU", "threads": threads, "cases": [case, other]}
    case["results"] = [{"peer": False, "note": "", **result} for result in results]
    step = {"subject": "step", "peer": False, "training_s": None, "copy_share": 0.85, "note": ""}
    other["results"] = [{**step, "forward_s": 5e-6, "first_call_s": 0.1, "errors": {"y": 1e-7}}]
    for each in run["cases"]:
        each["torch"] = "2.9"
    (folder / f"operator-{date}-{threads}.json").write_text(json.dumps(run))


def test_tables_hold_the_newest_results_and_nothing_else_changes(tmp_path):
    run_file(tmp_path, "2026-01-01", 0.009)
    run_file(tmp_path, "2026-02-01", 0.002)
    run_file(tmp_path, "2026-01-15", 0.007)
    document = tmp_path / "README.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter — ü\n", encoding="utf-8")
    assert update_tables(document, tmp_path) == 2
    text = document.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter — ü\n")
    assert "old" not in text
    measured = "2.00 ms | 20.00x | 4.00 ms | 25.00x | 30.0 MiB | 1.25 s | 2.0e-07 | 1.0e-07 |"
    assert f"| 2x1024x4x64 | torch | {measured} 4.0e-07 (dw) |" in text
    assert "| 64x1x4x64 | step | 5.00 µs |  | 85% | 100 ms | 1.0e-07 |  |" in text
    assert "9.00 ms" not in text
    assert "cuda" not in text
    assert "2 threads" in text
    once = text
    update_tables(document, tmp_path)
    assert document.read_text(encoding="utf-8") == once


def test_speed_is_against_the_peer_where_there_is_one(tmp_path):
    run_file(tmp_path, "2026-01-01", 0.002, peer=0.006)
    document = tmp_path / "README.md"
    document.write_text(f"{BEGIN}{END}")
    update_tables(document, tmp_path)
    assert "| torch | 2.00 ms | 3.00x | 4.00 ms | 1.50x |" in document.read_text()
    assert "| theirs | 6.00 ms | 1.00x |" in document.read_text()


@pytest.mark.parametrize(
    ("seconds", "mib", "texts"),
    [
        (3.5858e-6, 10520.0, ("3.59 µs", "10,520 MiB")),
        (3.9318e-4, 388.5, ("393 µs", "388 MiB")),
        (1.0986e-3, 47.87890625, ("1.10 ms", "47.9 MiB")),
        (0.16089, 6.126953125, ("161 ms", "6.13 MiB")),
        (7.0143, 0.0, ("7.01 s", "0.00 MiB")),
        (98.73, 16928.0, ("98.7 s", "16,928 MiB")),
    ],
)
def test_a_figure_has_three_digits_and_a_unit_of_its_size(seconds, mib, texts):
    errors: dict[str, float] = {}
    result = {"subject": "ours", "peer": False, "forward_s": seconds, "training_s": None}
    result |= {"first_call_s": None, "training_mib": mib, "errors": errors}
    shown = row(result, {"work": "operator", "results": [result]})
    assert (shown[1], shown[5]) == texts


def test_numbers_of_threads_are_kept_apart(tmp_path):
    run_file(tmp_path, "2026-01-01", 0.009, threads=1)
    run_file(tmp_path, "2026-01-01", 0.009, threads=2)
    assert len(results_in(tmp_path)) == 4


def test_a_document_without_markers_is_left_alone(tmp_path):
    run_file(tmp_path, "2026-01-01", 0.009)
    document = tmp_path / "README.md"
    document.write_text("nothing here")
    with pytest.raises(ValueError, match=r"README\.md: expected the lines"):
        update_tables(document, tmp_path)
    assert document.read_text() == "nothing here"


def test_a_foreign_file_among_the_results_is_named(tmp_path):
    case = {"work": "operator", "dtype": "float32", "shape": "1x1x1x1", "results": [], "torch": "2"}
    run = {"date": "2026-01-01", "device": "x", "threads": 1, "cases": [case]}
    for text in ('{"date": 1}', json.dumps(run)):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=r"other\.json: not a file of"):
            results_in(tmp_path)
