"""The loop of a run: step, log, evaluate, save, and stop when asked to.

What a step computes depends on the settings, the text and the number of the step alone, so a run
that was interrupted, or killed and resumed, ends with the same weights, bit for bit on the CPU. A
state that is carried never leaves its step, which reads whole sequences: there is none to save. How
a run begins or is taken up again is in runs.py.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from rwkv7.nn import RWKV7
from rwkv7.tokenizer import get_tokenizer

from .carry import batch_gradients
from .checkpoint import newest_checkpoint, save_checkpoint
from .data import TokenData
from .evaluate import Evaluation, evaluate
from .interrupt import interruptible
from .log import RunLog, StepRecord, plot_loss
from .optim import learning_rate, set_learning_rate
from .report import Report
from .settings import TrainSettings
from .sources import make_source

__all__ = ["OnStep", "Run", "TrainResult", "TrainingDivergedError"]

OnStep = Callable[[StepRecord], "bool | None"]


class TrainingDivergedError(ArithmeticError):
    """The loss or the gradient is no longer a finite number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a run ended: the steps done, whether that is all, the newest checkpoint, the last
    evaluation (None when interrupted or nothing is held out), and the speed of its steps."""

    step: int
    finished: bool
    checkpoint: Path
    evaluation: Evaluation | None
    tokens_per_second: float


class Run:
    """A run in memory: all that a step reads and changes. `step` is how many are done."""

    def __init__(
        self,
        out: Path,
        settings: TrainSettings,
        data: TokenData,
        model: RWKV7,
        optimizer: torch.optim.Optimizer,
        step: int = 0,
    ) -> None:
        self.out, self.settings, self.data = out, settings, data
        self.model, self.optimizer, self.step, self.saved = model, optimizer, step, step
        self.tokenizer = get_tokenizer(settings.tokenizer)
        self.source = make_source(data.documents, settings)
        self.model.checkpoint_layers = settings.checkpoint_layers
        self.device = model.emb.weight.device
        self.bits_of_a_nat = data.info.train_tokens / data.info.train_bytes / math.log(2)

    def go_on(self, report: Report, on_step: OnStep | None) -> TrainResult:
        """Trains to the last step or until asked to stop, saves, and reads the held-out text."""
        log = RunLog(self.out / "log.jsonl", self.step)
        report.begin(self.step, self.settings.steps)
        try:
            with interruptible() as interrupted:
                seconds, tokens = 0.0, 0
                while self.step < self.settings.steps:
                    record = self._train_step()
                    seconds, tokens = seconds + record.seconds, tokens + record.tokens
                    log.step(record)
                    report.step(record)
                    stop = bool(on_step and on_step(record)) or interrupted()
                    last = self.step == self.settings.steps
                    if self.step % self.settings.eval_every == 0 and not (stop or last):
                        self._evaluate(log, report, self.settings.eval_tokens)
                    if stop or last or self.step % self.settings.save_every == 0:
                        self._save()
                    if stop:
                        break
            report.end()
            result = self._finish(log, report)
        finally:
            report.end()
            log.close()
        return replace(result, tokens_per_second=tokens / seconds if seconds else 0.0)

    def _train_step(self) -> StepRecord:
        started, settings = time.perf_counter(), self.settings
        batch = self.source.batch(self.step).to(self.device)
        rate = learning_rate(settings, self.step)
        set_learning_rate(self.optimizer, rate)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        # A packed row holds the tokens of the whole batch, so its windows do too.
        rows = 1 if batch.cu_seqlens is None else settings.batch
        with self._precision():
            loss = batch_gradients(
                self.model,
                batch,
                mode=settings.carry,
                window=settings.window * rows,
                parts=settings.accumulate,
            )
        norm = clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        nats, size = torch.stack((loss, norm)).tolist()
        if not (math.isfinite(nats) and math.isfinite(size)):
            raise TrainingDivergedError(
                f"stopped at step {self.step + 1}: the loss is {nats} and the gradient's norm "
                f"{size}. The last good checkpoint, of step {self.saved}, is kept. A new run with "
                "a lower learning rate or a smaller clip may get past this"
            )
        self.step += 1
        return StepRecord(
            step=self.step,
            loss=nats,
            bits_per_byte=nats * self.bits_of_a_nat,
            lr=rate,
            grad_norm=size,
            tokens=batch.inputs.numel(),
            seconds=time.perf_counter() - started,
        )

    def _finish(self, log: RunLog, report: Report) -> TrainResult:
        finished, evaluation = self.step >= self.settings.steps, None
        if finished:
            # All is saved: Ctrl-C now only leaves out the last evaluation.
            with contextlib.suppress(KeyboardInterrupt):
                evaluation = self._evaluate(log, report, None)
        plot_loss(self.out / "log.jsonl", self.out / "loss.png")
        checkpoint = newest_checkpoint(self.out)
        assert checkpoint is not None
        return TrainResult(
            step=self.step,
            finished=finished,
            checkpoint=checkpoint.path,
            evaluation=evaluation,
            tokens_per_second=0.0,
        )

    def _evaluate(self, log: RunLog, report: Report, most: int | None) -> Evaluation | None:
        tokens = self.data.held_out[:most]
        if len(tokens) == 0:
            return None
        whole = len(tokens) == len(self.data.held_out)
        with self._precision():
            result = evaluate(
                self.model,
                tokens,
                self.tokenizer,
                window=self.settings.window,
                size=self.data.info.held_out_bytes if whole else None,
            )
        log.evaluation(self.step, result)
        report.evaluation(self.step, result)
        plot_loss(self.out / "log.jsonl", self.out / "loss.png")
        return result

    def _save(self) -> None:
        save_checkpoint(self.out, self.model, self.optimizer, self.settings, self.step)
        self.saved = self.step

    def _precision(self) -> torch.autocast:
        """Products in bf16 where asked for; weights, state and moments stay fp32."""
        wanted = self.settings.dtype == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted)
