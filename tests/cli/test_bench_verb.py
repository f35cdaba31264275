"""`rwkv7 bench`: figures on the screen, results in files, tables from the files."""

from __future__ import annotations

import json

import pytest
import torch

from rwkv7.benchmark import BASELINE, clock
from rwkv7.benchmark.document import BEGIN, END
from rwkv7.cli import main


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(clock, "_BUDGET", 0.0)
    monkeypatch.setenv("COLUMNS", "120")


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *(str(argument) for argument in arguments)])
    return ended.value.code or 0


def test_results_and_then_their_table(tmp_path, capsys):
    out = tmp_path / "results"
    sizes = ("--shape", "1x16x1x8", "--shape", "1x8x2x8", "--device", "cpu", "--out", out)
    assert run(*sizes) == 0
    shown = capsys.readouterr().out
    assert BASELINE in shown
    assert "reference" in shown
    (path,) = out.iterdir()
    found = json.loads(path.read_text())
    assert [case["shape"] for case in found["cases"]] == ["1x16x1x8", "1x8x2x8"]
    assert found["machine"]["torch"] == torch.__version__
    assert found["cases"][0]["results"][0]["errors"]["y"] < 1e-5
    document = tmp_path / "README.md"
    document.write_text(f"{BEGIN}\n{END}\n")
    assert run("--render", document, "--out", out) == 0
    assert f"| {BASELINE} |" in document.read_text()
    assert len(list(out.iterdir())) == 1


def test_all_works_and_a_profile_in_one_file_that_is_whole_after_each_part(
    tmp_path, capsys, monkeypatch
):
    kept = []

    def keep(path, run):
        kept.append(sum(len(case["results"]) for case in run["cases"]))

    monkeypatch.setattr("rwkv7.benchmark.record.write_json", keep)
    works = ("--work", "operator,repeated-key,decoding", "--shape", "2x1x1x8", "--profile")
    assert run(*works, "--backend", "torch", "--device", "cpu", "--out", tmp_path) == 0
    assert kept == [1, 2, 3]
    shown, progress = capsys.readouterr()
    assert "rwkv7::wkv7" in shown
    assert "decoding 2x1x1x8: wkv7_step_" in progress


def test_threads_are_set_and_kept(tmp_path):
    before = torch.get_num_threads()
    try:
        assert run("--shape", "1x4x1x8", "--threads", 1, "--device", "cpu", "--out", tmp_path) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["threads"] == 1


def test_a_run_that_measures_nothing_leaves_no_file(tmp_path, capsys):
    shape = "--shape", "1x4x1x8", "--device", "cpu"
    assert run(*shape, "--backend", "cuda", "--dtype", "fp64", "--out", tmp_path) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: nothing was measured: ")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--shape", "1x2x3"), "error: shape: expected BxTxHxN"),
        (("--dtype", "int8"), "error: --dtype: expected one of fp64"),
        (("--device", "abacus"), "error: device: 'abacus' cannot be used"),
        (("--work", "play"), "error: --work: expected one or more of operator, repeated-key"),
        (("--work", "decoding", "--shape", "1x2x3x4"), "error: --shape: expected T = 1"),
        (("--backend", "abacus"), "error: backend: expected one of cuda, triton, torch, reference"),
        (
            ("--work", "decoding", "--backend", "torch"),
            "error: --backend: decoding is wkv7_step_, which chooses its own",
        ),
        (
            ("--against", "rwkv"),
            "error: --against: expected one of fla, fla:16, fla:32, fla:64, found 'rwkv'",
        ),
        (("--render", "README.md", "--out", "/nowhere"), "error: --out: no results in /nowhere"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, line):
    assert run(*arguments) == 2
    assert capsys.readouterr().err.startswith(line)
