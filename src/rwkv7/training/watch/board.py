"""A run's figures for TensorBoard, in RUN/tensorboard. Off unless asked for; an extra."""

from __future__ import annotations

from pathlib import Path

from rwkv7.training.evaluate import Evaluation

from .log import StepRecord
from .report import Report

__all__ = ["BoardReport"]


class BoardReport(Report):
    """Writes what it hears as scalars and texts; steps that are done again replace the old ones."""

    def __init__(self, folder: Path) -> None:
        """ValueError where the package tensorboard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                'tensorboard: needs the package tensorboard: run `pip install "rwkv7[tensorboard]"`'
            ) from error
        self._folder, self._make = folder, SummaryWriter
        self._writer: SummaryWriter | None = None

    def begin(self, step: int, steps: int) -> None:
        """Opens the files; what an earlier process wrote for later steps no longer counts."""
        self._writer = self._make(str(self._folder), purge_step=step + 1)

    def step(self, record: StepRecord) -> None:
        """Adds loss, bits per byte, learning rate, norm, speed and, where known, the MFU."""
        speed = record.tokens / max(record.seconds, 1e-9)
        self._add(
            record.step,
            {
                "training/loss": record.loss,
                "training/bits_per_byte": record.bits_per_byte,
                "training/learning_rate": record.lr,
                "training/gradient_norm": record.grad_norm,
                "speed/tokens_per_second": speed,
                "speed/mfu": record.mfu,
            },
        )

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Adds the held-out figures."""
        figures = {
            "held_out/bits_per_byte": result.carried,
            "held_out/bits_per_byte_state_dropped": result.dropped,
        }
        self._add(step, figures)

    def sample(self, step: int, text: str) -> None:
        """Adds a text, as it is."""
        if self._writer:
            indented = "".join(f"    {line}\n" for line in text.splitlines())
            self._writer.add_text("sample", indented, step)

    def end(self) -> None:
        """Writes out what is not yet on disk."""
        if self._writer:
            self._writer.flush()

    def _add(self, step: int, figures: dict[str, float | None]) -> None:
        for name, value in figures.items():
            if self._writer and value is not None:
                self._writer.add_scalar(name, value, step)
