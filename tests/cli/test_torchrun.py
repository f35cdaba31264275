"""`torchrun … rwkv7 train`: told once, ended by any process, gone on with by one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkv7.cli import main

PATIENCE = 240.0  # seconds, of which an idle machine needs ten
SMALL = "--device cpu --layers 1 --width 8 --head-size 8 --window 8 --batch 2 --held-out 50"


def start(arguments: str, folder: Path) -> subprocess.Popen[str]:
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*call, "-m", "rwkv7", "train", *arguments.split()],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("in the beginning was the word, " * 20)
    return tmp_path


def test_a_run_and_its_mistakes_are_told_once(folder: Path) -> None:
    done = start(f"a.txt --out run --steps 3 {SMALL} --parallel fsdp", folder)
    out, errors = done.communicate(timeout=PATIENCE)
    assert done.returncode == 0, errors
    assert out.count("step 3/3") == out.count("done: 3 steps") == 1
    wrong = start("--out run --resume --seed 5", folder)
    out, errors = wrong.communicate(timeout=PATIENCE)
    assert wrong.returncode != 0
    assert (out + errors).count("error: this run cannot go on with another seed") == 1
    # torchrun itself says with one what became of its processes.
    assert errors.count("Traceback") <= 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_wrong_option_is_told_once(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("rwkv7.cli.GRACE", 0.0)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--bogus", "3"])
    assert ended.value.code == 2
    assert ("No such option" in capsys.readouterr().err) == (rank == 0)


def another_than(first: int, launcher: int) -> int:
    """The process beside the first one that torchrun started."""
    tasks = Path("/proc", str(launcher), "task").glob("*/children")
    children = {int(number) for file in tasks for number in file.read_text().split()}
    (other,) = children - {first}
    return other


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find a process")
def test_a_killed_process_ends_all_and_one_alone_goes_on(folder: Path) -> None:
    run = folder / "run"
    going = start(f"a.txt --out run --steps 100000 --save-every 5 {SMALL}", folder)
    deadline = time.monotonic() + PATIENCE
    while not any(run.glob("checkpoints/step-*[1-9]*")) and going.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(another_than(json.loads((run / "lock").read_text())["pid"], going.pid), signal.SIGKILL)
    _, errors = going.communicate(timeout=PATIENCE)
    assert going.returncode != 0
    assert errors.count("Traceback") <= 1, errors
    assert errors.count("error: another process of this run ended without a word") == 1
    alone = [sys.executable, "-m", "rwkv7", "train", "--out", "run", "--resume", "--device", "cpu"]
    begun = subprocess.Popen(alone, cwd=folder, stdout=subprocess.PIPE, text=True)
    before = max(path.name for path in run.glob("checkpoints/step-*"))
    while max(p.name for p in run.glob("checkpoints/step-*")) <= before and begun.poll() is None:
        assert time.monotonic() < deadline + PATIENCE
        time.sleep(0.1)
    begun.send_signal(signal.SIGTERM)
    out, _ = begun.communicate(timeout=PATIENCE)
    assert begun.returncode == 0 and "stopped after step" in out
    assert "processes 2 then, 1 now" in out


def test_without_torchrun_there_is_nothing_to_share(folder: Path) -> None:
    call = [sys.executable, "-m", "rwkv7", "train", "a.txt", "--out", "run", "--parallel", "ddp"]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "torchrun --nproc-per-node" in done.stderr
