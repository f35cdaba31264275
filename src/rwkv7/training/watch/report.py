"""What a person sees of a training run: one progress bar, or plain lines without a terminal.

`Report` itself says nothing, which is what a library call wants. The log on disk is log.py's.
"""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from rwkv7.training.evaluate import Evaluation

from .log import StepRecord

__all__ = ["BarReport", "LineReport", "Report", "ReportToAll", "console_report"]

LINE_EVERY = 5.0  # seconds between two lines without a terminal
SMOOTH = 0.95  # of the shown loss and speed, from step to step


class Report:
    """Hears of all that happens in a run and shows nothing. Subclass it to show something."""

    def begin(self, step: int, steps: int) -> None:
        """`step` steps of `steps` are done, the next ones begin."""

    def step(self, record: StepRecord) -> None:
        """A step is done."""

    def evaluation(self, step: int, result: Evaluation) -> None:
        """The held-out text was read after `step` steps."""

    def sample(self, step: int, text: str) -> None:
        """The model wrote this after `step` steps."""

    def note(self, text: str) -> None:
        """Something to know, a sentence without markup."""

    def end(self) -> None:
        """No step follows: training is over or was interrupted, or failed."""


class ReportToAll(Report):
    """Tells several reports the same."""

    def __init__(self, *reports: Report) -> None:
        self._reports = reports

    def begin(self, step: int, steps: int) -> None:
        for report in self._reports:
            report.begin(step, steps)

    def step(self, record: StepRecord) -> None:
        for report in self._reports:
            report.step(record)

    def evaluation(self, step: int, result: Evaluation) -> None:
        for report in self._reports:
            report.evaluation(step, result)

    def sample(self, step: int, text: str) -> None:
        for report in self._reports:
            report.sample(step, text)

    def note(self, text: str) -> None:
        for report in self._reports:
            report.note(text)

    def end(self) -> None:
        for report in self._reports:
            report.end()


class _ConsoleReport(Report):
    def __init__(self, console: Console) -> None:
        self._console = console
        self._steps = 0
        self._loss = self._bits = self._seconds = self._weight = 0.0

    def begin(self, step: int, steps: int) -> None:
        self._steps = steps

    def step(self, record: StepRecord) -> None:
        self._weight = SMOOTH * self._weight + (1 - SMOOTH)
        share = (1 - SMOOTH) / self._weight
        self._loss += share * (record.loss - self._loss)
        self._bits += share * (record.bits_per_byte - self._bits)
        self._seconds += share * (record.seconds - self._seconds)

    def evaluation(self, step: int, result: Evaluation) -> None:
        if result.dropped is None:
            what = f"held-out answers {result.carried:.4f} bits per byte"
        else:
            what = (
                f"held-out text {result.carried:.4f} bits per byte with the state carried, "
                f"{result.dropped:.4f} with it dropped"
            )
        self.note(f"step {step:,}: {what} ({result.bytes:,} bytes)")

    def sample(self, step: int, text: str) -> None:
        self.note(f"step {step:,} writes: {text!r}")

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _figures(self, record: StepRecord) -> str:
        speed = record.tokens / max(self._seconds, 1e-9)
        share = "" if record.mfu is None else f"  {record.mfu:.0%} MFU"
        return f"loss {self._loss:.4f}  {self._bits:.4f} bits/byte  {speed:,.0f} tokens/s{share}"


class BarReport(_ConsoleReport):
    """A progress bar with loss, bits per byte, tokens/s and the time left."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bar = Progress(
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )
        self._task = TaskID(0)

    def begin(self, step: int, steps: int) -> None:
        super().begin(step, steps)
        self._task = self._bar.add_task("", total=steps, completed=step, figures="")
        self._bar.start()

    def step(self, record: StepRecord) -> None:
        super().step(record)
        self._bar.update(self._task, completed=record.step, figures=self._figures(record))

    def end(self) -> None:
        self._bar.stop()


class LineReport(_ConsoleReport):
    """A line every few seconds, for logs and pipes."""

    def __init__(self, console: Console, every: float = LINE_EVERY) -> None:
        super().__init__(console)
        self._every, self._last = every, time.monotonic()

    def step(self, record: StepRecord) -> None:
        super().step(record)
        now = time.monotonic()
        if now - self._last >= self._every or record.step == self._steps:
            self._last = now
            left = round((self._steps - record.step) * self._seconds)
            clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
            self.note(
                f"step {record.step:,}/{self._steps:,}  {self._figures(record)}  {clock} left"
            )


def console_report(console: Console | None = None) -> Report:
    """A bar where `console` (None: stdout) is a terminal, lines where it is not."""
    console = console or Console()
    return BarReport(console) if console.is_terminal else LineReport(console)
