"""The loop of a run: step, log, evaluate, save, and stop when asked to.

What a step computes depends on the settings, the text and the number of the step alone, so a run
that was interrupted, or killed and resumed, ends with the same weights, bit for bit on the CPU. A
state that is carried never leaves its step, which reads whole sequences: there is none to save. How
a run begins or is taken up again is in runs.py, how several processes make a step in together/.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rwkv7.tokenizer import get_tokenizer

from .batch import Batch
from .checkpoint import newest_checkpoint
from .data import ChatData, TokenData
from .evaluate import Evaluation, evaluate, evaluate_answers
from .interrupt import interruptible
from .optim import learning_rate, set_learning_rate
from .settings import TrainSettings
from .sources import make_source
from .step import precision
from .together.processes import OtherProcessError
from .together.team import Team
from .tuning import Tuning
from .watch.diverged import earliest, first_not_finite
from .watch.log import NoLog, RunLog, StepRecord, plot_loss
from .watch.report import Report
from .watch.samples import write_sample, write_samples
from .watch.speed import Utilisation

__all__ = ["OnStep", "Run", "TrainResult", "TrainingDivergedError"]

OnStep = Callable[[StepRecord], "bool | None"]


class TrainingDivergedError(ArithmeticError):
    """The loss or the gradient is no longer a finite number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a run ended: the steps done, whether that is all, the newest checkpoint, the last
    evaluation (None when interrupted or nothing is held out), the speed of its steps, and how many
    records of its text were left out because they could not be read."""

    step: int
    finished: bool
    checkpoint: Path
    evaluation: Evaluation | None
    tokens_per_second: float
    bad_records: int = 0


class Run:
    """A run in memory: all that a step reads and changes. `step` is how many are done."""

    def __init__(
        self,
        out: Path,
        settings: TrainSettings,
        data: TokenData | ChatData,
        tuning: Tuning,
        team: Team,
        step: int = 0,
    ) -> None:
        self.out, self.settings, self.data = out, settings, data
        self.tuning, self.model = tuning, tuning.model
        self.team, self.crew, self.optimizer = team, team.crew, team.optimizer
        self.step = self.saved = step
        self.tokenizer = get_tokenizer(settings.tokenizer)
        self.source = make_source(data, settings)
        self.model.recompute = settings.recompute
        self.device = team.device
        products = torch.bfloat16 if settings.dtype == "bf16" else self.model.dtype
        self.utilisation = Utilisation(self.model, products)
        self.bits_of_a_nat = data.info.train_tokens / data.info.train_bytes / math.log(2)

    def go_on(self, report: Report, on_step: OnStep | None) -> TrainResult:
        """Trains to the last step or until asked to stop, saves, and reads the held-out text."""
        path = self.out / "log.jsonl"
        log = self.crew.on_first(lambda: RunLog(path, self.step)) or NoLog()
        report.begin(self.step, self.settings.steps)
        try:
            with interruptible() as interrupted:
                seconds, tokens = 0.0, 0
                while self.step < self.settings.steps:
                    record = self._train_step()
                    seconds, tokens = seconds + record.seconds, tokens + record.tokens
                    log.step(record)
                    report.step(record)
                    stop = self.crew.any(bool(on_step and on_step(record)) or interrupted())
                    last = self.step == self.settings.steps
                    if self.step % self.settings.eval_every == 0 and not (stop or last):
                        self._evaluate(log, report, self.settings.eval_tokens)
                    if self._is_sampled() and not stop:
                        self._sample(log, report)
                    if stop or last or self.step % self.settings.save_every == 0:
                        self._save()
                    if stop:
                        break
            report.end()
            self.team.join(self.out)
            result = self._finish(log, report)
        except TrainingDivergedError:
            plot_loss(self.out / "log.jsonl", self.out / "loss.png")  # how it came to that
            raise
        finally:
            report.end()
            log.close()
        return replace(result, tokens_per_second=tokens / seconds if seconds else 0.0)

    def _train_step(self) -> StepRecord:
        started, settings = time.perf_counter(), self.settings
        batch = self.source.batch(self.step)
        rate = learning_rate(settings, self.step)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            loss = self.team.gradients(batch)
        except ValueError as error:  # the operator refuses what is no number, where it looks
            if self.crew.size > 1:
                raise
            raise TrainingDivergedError(self._diagnosis(batch, error)) from error
        norm = self.team.clip_()
        # What is not finite changes no weight: the optimizer's kernel sees to it on the device, so
        # that nobody waits for the answer here, and the step can be looked at again as it was.
        bad = ~(loss + norm).isfinite()
        self.optimizer.found_inf = bad.to(torch.float32)  # type: ignore[attr-defined]
        self.optimizer.step()
        nats, size = torch.stack((loss, norm)).tolist()
        if not (math.isfinite(nats) and math.isfinite(size)):
            what = f"the loss is {nats} and the gradient's norm {size}"
            message = self._diagnosis(batch, what)
            raise TrainingDivergedError(message) if self.crew.first else OtherProcessError(message)
        self.step += 1
        seconds = time.perf_counter() - started
        return StepRecord(
            step=self.step,
            loss=nats,
            bits_per_byte=nats * self.bits_of_a_nat,
            lr=rate,
            grad_norm=size,
            tokens=batch.inputs.numel(),
            seconds=seconds,
            mfu=self.utilisation.at(batch.inputs.numel() / seconds / self.crew.size),
        )

    def _diagnosis(self, batch: Batch, what: str | ValueError) -> str:
        """Which step, which batch and which tensor, for a person; an error that has to do with none
        is raised again."""

        def again() -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            return self.team.own_gradients(batch)

        found = self.crew.gather(first_not_finite(self.model, self.tuning.trained, again))
        first = earliest(found)
        if first is None and isinstance(what, ValueError):
            raise what
        first = first or "nothing when the step was run again, a fault that comes and goes"
        return (
            f"stopped at step {self.step + 1}: {what}. First not finite: {first}. The batch: "
            f"{self.source.where(self.step)}. The last good checkpoint, of step {self.saved}, is "
            "kept. A new run with a lower learning rate or a smaller clip may get past this"
        )

    def _finish(self, log: RunLog | NoLog, report: Report) -> TrainResult:
        finished, evaluation = self.step >= self.settings.steps, None
        if finished:
            # All is saved: Ctrl-C now only leaves out the last evaluation.
            quietly = interruptible if self.crew.size > 1 else _until_interrupted
            with quietly():
                evaluation = self._evaluate(log, report, None)
        self.crew.on_first(self._plot)
        checkpoint = self.crew.from_first(newest_checkpoint(self.out))
        assert checkpoint is not None
        return TrainResult(
            step=self.step,
            finished=finished,
            checkpoint=checkpoint.path,
            evaluation=evaluation,
            tokens_per_second=0.0,
            bad_records=self.data.info.bad_records,
        )

    def _evaluate(self, log: RunLog | NoLog, report: Report, most: int | None) -> Evaluation | None:
        if len(self.data.held_out) == 0:
            return None
        with precision(self.settings, self.device), self.team.reading() as reads:
            found = self.crew.together(lambda: self._read_held_out(most) if reads else None)
        result = self.crew.from_first(found)
        assert result is not None
        log.evaluation(self.step, result)
        report.evaluation(self.step, result)
        self.crew.on_first(self._plot)
        return result

    def _plot(self) -> None:
        plot_loss(self.out / "log.jsonl", self.out / "loss.png")

    def _read_held_out(self, most: int | None) -> Evaluation:
        if isinstance(self.data, ChatData):
            initial = self.tuning.initial
            return evaluate_answers(self.model, self.data.held_out, self.tokenizer, most, initial)
        tokens = self.data.held_out[:most]
        whole = len(tokens) == len(self.data.held_out)
        return evaluate(
            self.model,
            tokens,
            self.tokenizer,
            window=self.settings.window,
            size=self.data.info.held_out_bytes if whole else None,
            initial=self.tuning.initial,
        )

    def _is_sampled(self) -> bool:
        return self.settings.sample_every > 0 and self.step % self.settings.sample_every == 0

    def _sample(self, log: RunLog | NoLog, report: Report) -> None:
        with precision(self.settings, self.device), self.team.reading() as reads:
            text = self.crew.together(lambda: self._written() if reads else "")
        lines = log.sample(self.step, text)
        self.crew.on_first(lambda: write_samples(self.out / "samples.txt", lines))
        report.sample(self.step, text)

    def _written(self) -> str:
        return write_sample(
            self.model,
            self.tokenizer,
            self.settings.sample_prompt,
            seed=self.settings.seed,
            initial=self.tuning.initial,
            # Processes that read together stop together.
            agreed=self.crew.from_first if self.team.sharded else None,
        )

    def _save(self) -> None:
        self.team.save(self.out, self.step)
        self.saved = self.step


@contextlib.contextmanager
def _until_interrupted() -> Iterator[None]:
    with contextlib.suppress(KeyboardInterrupt):
        yield
