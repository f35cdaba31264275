"""A run killed at any moment, again and again, ends with the weights of one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

# A process that has the library loaded makes one after the other, each with a part of the run to
# do. Its second argument says after how many seconds each is to be killed; the last one is not.
PROGRAM = """
import os, signal, sys, threading
from pathlib import Path
from rwkv7.training import TrainSettings, resume_training, train_model

text, run = Path(sys.argv[1]), Path(sys.argv[2])
settings = TrainSettings(steps=30, layers=2, width=16, head_size=8, window=12, batch=2, lr=3e-3,
                         held_out=200, save_every=2, eval_every=100, sample_every=7)
waits = [*map(float, sys.argv[3].split()), None]
for wait in waits:
    child = os.fork()
    if child == 0:
        if wait is not None:
            threading.Timer(wait, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        if (run / "checkpoints").is_dir() and any(run.glob("checkpoints/step-*")):
            resume_training(run, device="cpu")
        else:
            train_model(settings, [text], run, device="cpu")
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, max([p.name for p in run.glob("checkpoints/step-*")], default="nothing"))
"""


def train(text: Path, run: Path, waits: list[float]) -> list[str]:
    moments = " ".join(map(str, waits))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(text), str(run), moments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_random_moments(tmp_path: Path, text: Path) -> None:
    chance = random.Random(20261124)
    waits = [chance.uniform(0.01, 0.5) for _ in range(5)]
    *killed, last = train(text, tmp_path / "killed", waits)
    assert last == "0 step-00000030"
    assert any(line.startswith(f"-{int(signal.SIGKILL)} ") for line in killed)
    train(text, tmp_path / "whole", [])
    one, other = (
        {
            name: load_file(tmp_path / run / "checkpoints" / "step-00000030" / name)
            for name in ("model.safetensors", "optimizer.safetensors")
        }
        for run in ("killed", "whole")
    )
    for name, tensors in one.items():
        assert all(x.equal(other[name][key]) for key, x in tensors.items()), name
    logs = [(tmp_path / run / "log.jsonl").read_text() for run in ("killed", "whole")]
    steps = [[line.split('"seconds"')[0] for line in log.splitlines()] for log in logs]
    assert steps[0] == steps[1]


def test_a_run_begins_where_starts_were_killed(tmp_path: Path, text: Path) -> None:
    """As a kill leaves a folder while the lock is taken, taken over, or data are written."""
    (tmp_path / "data").mkdir()
    for name in ("lock", "lock.4711", "data/.train.bin.0123abcd.tmp"):
        (tmp_path / name).touch()
    assert train(text, tmp_path, []) == ["0 step-00000030"]
