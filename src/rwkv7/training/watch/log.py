"""The record of a run: RUN/log.jsonl, a line of JSON per step and per evaluation, and its plot.

What a person sees while the run goes on is left to report.py.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rwkv7.files import json_object, write_atomically
from rwkv7.training.evaluate import Evaluation

__all__ = ["NoLog", "RunLog", "StepRecord", "plot_loss", "read_log"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One optimizer step. `step` counts from 1; the loss is cross entropy in nats per token."""

    step: int
    loss: float
    bits_per_byte: float
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # read in this step
    seconds: float
    mfu: float | None = None  # share of the device's peak, where that is known


class RunLog:
    """Appends to RUN/log.jsonl; a resumed run first forgets the lines after its checkpoint."""

    def __init__(self, path: Path, step: int = 0) -> None:
        self._path = path
        kept = [line for line in read_log(path) if line["step"] <= step] if step else []
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(path, lambda file: _write_text(file, text))
        self._file = path.open("a", encoding="utf-8")

    def step(self, record: StepRecord) -> None:
        """Adds a step."""
        self._write(asdict(record))

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Adds an evaluation after `step` steps."""
        self._write(
            {
                "step": step,
                "held_out_bits_per_byte": result.carried,
                "held_out_bits_per_byte_state_dropped": result.dropped,
                "held_out_bytes": result.bytes,
            }
        )

    def sample(self, step: int, text: str) -> list[dict[str, Any]]:
        """Adds a text written after `step` steps; gives the lines so far, for a file of all."""
        self._write({"step": step, "sample": text})
        return read_log(self._path)

    def close(self) -> None:
        """Closes the file."""
        # All lines are written, but for one that a full disk refused, of which `_write` told.
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()  # who follows the file sees each step
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error


class NoLog:
    """Hears what a `RunLog` does and keeps nothing: another process of the run has the log."""

    def step(self, record: StepRecord) -> None:
        """Nothing."""

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Nothing."""

    def sample(self, step: int, text: str) -> list[dict[str, Any]]:
        """Nothing; no lines."""
        return []

    def close(self) -> None:
        """Nothing."""


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log: objects with a whole number as `step`. Others are left out, such as a
    last one that a kill left incomplete."""
    lines = []
    if path.exists():
        for text in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                line = json_object(text)
                if type(line.get("step")) is int:
                    lines.append(line)
    return lines


def plot_loss(log: Path, image: Path) -> None:
    """Draws bits per byte, of training and of the held-out text, and the learning rate as a PNG."""
    from matplotlib.figure import Figure  # takes half a second, so only when a plot is wanted

    lines = read_log(log)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "held_out_bits_per_byte" in line]
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot(
        [line["step"] for line in steps],
        _smoothed([line["bits_per_byte"] for line in steps]),
        label="training",
        color="0.6",
        linewidth=1,
    )
    for key, label in (
        ("held_out_bits_per_byte", "held out, state carried"),
        ("held_out_bits_per_byte_state_dropped", "held out, state dropped"),
    ):
        known = [line for line in evaluations if line.get(key) is not None]
        if known or not evaluations:
            values = [line[key] for line in known]
            axes.plot([line["step"] for line in known], values, marker="o", label=label)
    axes.set(ylabel="bits per byte")
    axes.legend()
    below.plot([line["step"] for line in steps], [line["lr"] for line in steps], linewidth=1)
    below.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    for part in (axes, below):
        part.grid(alpha=0.3)
    write_atomically(image, lambda path: figure.savefig(path, format="png", dpi=120))


def _smoothed(values: list[float], weight: float = 0.9) -> list[float]:
    """An exponential mean that starts at the first value's own level."""
    smooth, mean, total = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        smooth.append(mean / total)
    return smooth
