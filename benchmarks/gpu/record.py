"""What a benchmark leaves behind: one JSON file, whole after each part, and a limit it keeps to."""

from __future__ import annotations

import datetime
import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rwkv7.files import write_atomically
from rwkv7.machine import describe, device_name, package_version

PEERS = ("fla-core", "flash-linear-attention", "transformers")


class Record:
    """The parts of one run in FOLDER/NAME.json, beside date, card and versions."""

    def __init__(self, folder: Path, name: str, device: torch.device, limit: float) -> None:
        """`limit`: seconds from now after which no part is begun."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.device, self.limit = folder / f"{name}.json", device, limit
        self._began = time.monotonic()
        versions = {peer: package_version(peer) for peer in PEERS}
        self.parts: list[dict[str, Any]] = []
        self._whole = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "device": device_name(device),
            "machine": describe() | {peer: found for peer, found in versions.items() if found},
            "parts": self.parts,
        }

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
        self.keep({"part": name, **found, "at_s": round(self.limit - self.left(), 1)})
        return not {"not_run", "out_of_memory", "error"} & set(found)

    def keep(self, part: dict[str, Any]) -> None:
        """Adds a part, prints it and writes the file."""
        self.parts.append(part)
        short = {key: value for key, value in part.items() if not isinstance(value, list)}
        print(json.dumps(short), flush=True)
        text = json.dumps(self._whole, indent=1) + "\n"
        write_atomically(self.path, lambda file: _write(file, text))

    def _measured(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return measure()
        except torch.OutOfMemoryError as error:
            return {"out_of_memory": str(error).splitlines()[0]}
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"[:2000]}


def release(device: torch.device) -> None:
    """Gives what nothing holds any more back to the device, so that the next part begins empty."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
