"""Memory and time of `load_model`, on a checkpoint made here, each form in a process of its own.

    python benchmarks/loading.py OUT [--preset 0.4b] [--device cpu] [--form pth safetensors folder]

For each form the peak of the process's memory above what it had before the load, as a multiple of
the file's size, and the seconds. Pages of a mapped file count. Linux alone tells that peak (VmHWM).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from rwkv7 import RWKV7, ModelConfig, save_model
from rwkv7.benchmark.record import Record
from rwkv7.machine import device_called

FORMS = {"pth": "model.pth", "safetensors": "model.safetensors", "folder": "model"}
CHILD = """
import json, pathlib, sys, time
import torch
from rwkv7 import load_model

def memory(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))

path, device, size = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.empty(1, device=device)  # what the device itself takes is not the load's
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before, start = memory("VmRSS"), time.perf_counter()
model = load_model(path, device=device)
if model.device.type == "cuda":
    torch.cuda.synchronize()
seconds = time.perf_counter() - start
peak = memory("VmHWM") - before
print(json.dumps({"file_mib": round(size / 2**20, 1), "peak_mib": round(peak / 2**20, 1),
    "copies": round(peak / size, 3), "seconds": round(seconds, 3)}))
"""


def random_checkpoint(config: ModelConfig, path: Path) -> int:
    """Write a bf16 checkpoint of random numbers; its size in bytes."""
    model = RWKV7(config, torch.bfloat16, "meta")
    filled = {
        name: torch.empty(x.shape, dtype=x.dtype).uniform_(-0.1, 0.1)
        for name, x in model.named_parameters()
    }
    model.load_state_dict(filled, assign=True)
    save_model(model, path)
    files = [path] if path.is_file() else list(path.iterdir())
    return sum(file.stat().st_size for file in files)


def main() -> None:
    """Make, load, keep what it took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="a folder for the JSON file")
    parser.add_argument("--preset", default="0.4b")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, help="instead of the preset's")
    parser.add_argument("--vocabulary", type=int, help="instead of the preset's")
    arguments = parser.parse_args()
    config = ModelConfig.preset(arguments.preset)
    changes = {"layers": arguments.layers, "vocab_size": arguments.vocabulary}
    config = dataclasses.replace(config, **{k: x for k, x in changes.items() if x is not None})
    record = Record(arguments.out, "loading", device_called(arguments.device), about=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        for form in arguments.form:
            path = Path(folder) / FORMS[form]
            size = random_checkpoint(config, path)
            program = [sys.executable, "-c", CHILD, str(path), arguments.device, str(size)]
            result = subprocess.run(program, check=True, stdout=subprocess.PIPE)
            record.keep({"part": f"{arguments.preset}, {form}", **json.loads(result.stdout)})


if __name__ == "__main__":
    main()
