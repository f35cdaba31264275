"""What a benchmark script leaves behind: one JSON file, whole after each part; and its limit.

`pages` makes tables of these files.
"""

from __future__ import annotations

import datetime
import gc
import json
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rwkv7.files import write_atomically
from rwkv7.machine import describe, device_name, package_version

PEERS = ("fla-core", "flash-linear-attention", "transformers", "rwkv")


class Record:
    """The parts of one run in FOLDER/NAME-DATE-DEVICE.json, beside date, device and versions.

    A part is a dictionary of figures with its name under "part". A list of dictionaries under
    "rows" is a table of its own.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        device: torch.device,
        *,
        about: str | None,
        limit: float = float("inf"),
    ) -> None:
        """`about`: the script's docstring. `limit`: seconds after which no part is begun."""
        folder.mkdir(parents=True, exist_ok=True)
        self.device, self.limit = device, limit
        self._began = time.monotonic()
        self.parts: list[dict[str, Any]] = []
        found = header(device)
        found["machine"] |= {peer: got for peer in PEERS if (got := package_version(peer))}
        self.path = folder / file_name(name, found)
        title = (about or name).partition("\n")[0]
        command = _command(folder)
        self._whole = {"benchmark": name, "about": title, "command": command, **found}
        self._whole["parts"] = self.parts

    def left(self) -> float:
        """Seconds of the limit that are left."""
        return self.limit - (time.monotonic() - self._began)

    def part(self, name: str, measure: Callable[[], dict[str, Any]], needs: float = 0) -> bool:
        """Keeps and prints what `measure` gives; true when it gave something.

        Where less than `needs` seconds are left it is not begun. Running out of memory is a result
        too, and a part that fails, whichever way, must not cost the parts after it.
        """
        if self.left() < needs:
            found: dict[str, Any] = {"not_run": f"{self.left():.0f} s left, needs {needs:.0f}"}
        else:
            found = self._measured(measure)
        release(self.device)
        self.keep({"part": name, **found})
        return not {"not_run", "out_of_memory", "error"} & set(found)

    def keep(self, part: dict[str, Any]) -> None:
        """Adds a part, prints it and writes the file."""
        self.parts.append(part | {"at_s": round(time.monotonic() - self._began, 1)})
        short = {key: value for key, value in part.items() if not isinstance(value, list)}
        print(json.dumps(short), flush=True)
        write_json(self.path, self._whole)

    def _measured(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return measure()
        except torch.OutOfMemoryError as error:
            return {"out_of_memory": str(error).splitlines()[0]}
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"[:2000]}


def header(device: torch.device) -> dict[str, Any]:
    """What belongs beside every measurement: date, device, threads, machine and versions."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "machine": describe(),
    }


def file_name(name: str, found: dict[str, Any]) -> str:
    """Of the run with that header."""
    device = re.sub(r"[^a-z0-9]+", "-", found["device"].lower()).strip("-")
    stamp = re.sub(r"[^0-9T]", "", found["date"].partition("+")[0])
    return f"{name}-{stamp}-{device}.json"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """In one step: a reader finds the old file or the new one."""
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def release(device: torch.device) -> None:
    """Gives what nothing holds any more back to the device, so that the next part begins empty."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _command(folder: Path) -> str:
    """How the script was called, with neither the user's folders nor the one for results."""
    script = Path(sys.argv[0])
    if "benchmarks" in script.parts:
        script = Path(*script.parts[script.parts.index("benchmarks") :])
    else:
        script = Path(script.name)
    given = ["OUT" if Path(text) == folder else text for text in sys.argv[1:]]
    start = ["python"]
    if dist.is_available() and dist.is_initialized():
        start = ["torchrun", "--standalone", "--nproc-per-node", str(dist.get_world_size())]
    return shlex.join([*start, script.as_posix(), *given])
