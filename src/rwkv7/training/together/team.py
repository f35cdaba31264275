"""How the processes of a run make its steps: one alone, or each with its part of every batch.

The gradient is the whole batch's either way. torch's own DDP and FSDP2 serve a model that is
trained as a whole; carried states, tuned states and adapters are summed after the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from rwkv7.training.batch import Batch
from rwkv7.training.checkpoint import save_checkpoint
from rwkv7.training.loss import predicted
from rwkv7.training.optim import make_optimizer
from rwkv7.training.settings import TrainSettings
from rwkv7.training.step import step_gradients
from rwkv7.training.tuning import Tuning
from rwkv7.wkv7 import unchecked

from .processes import Crew, lost_processes

if TYPE_CHECKING:
    from rwkv7.training.parallel import Cards

__all__ = ["Team", "check_team", "join_checkpoint", "weights_place"]


def check_team(settings: TrainSettings, size: int) -> None:
    """Raises ValueError for settings of a run that `size` processes cannot make together."""
    if size == 1:
        return
    if settings.batch < size:
        raise ValueError(
            f"batch: expected at least one for each of {size} processes, found {settings.batch}"
        )
    if settings.parallel == "fsdp" and settings.tune != "full":
        raise ValueError(
            f'parallel: expected "ddp" with tune {settings.tune!r}, of which there is little to '
            'share out, found "fsdp"'
        )
    if settings.parallel == "fsdp" and settings.carry != "off":
        raise ValueError(
            f'parallel: expected "ddp" with carry {settings.carry!r}, found "fsdp", whose cards '
            "would not go through windows in step"
        )
    if settings.pack and settings.carry == "truncated":
        raise ValueError(
            'carry: expected "off" or "exact" for packed documents in several processes, found '
            '"truncated", whose gradient depends on where windows are cut'
        )


def weights_place(parallel: str, size: int, device: torch.device) -> torch.device:
    """Where a run's model is made: on its device, or, where no card is to hold all of it, on the
    CPU."""
    return torch.device("cpu") if size > 1 and parallel == "fsdp" else device


def join_checkpoint(out: Path) -> None:
    """Makes the run's newest checkpoint an ordinary one, should it be in parts (`join_newest`)."""
    if any((out / "checkpoints").glob("sharded-*")):
        from rwkv7.training.parallel import join_newest

        join_newest(out)


class Team:
    """The processes of `crew` at work on one model. All of them make it, and call its methods.

    crew: the processes. optimizer: of what is trained, this process's part.
    """

    def __init__(
        self,
        crew: Crew,
        settings: TrainSettings,
        device: torch.device,
        tuning: Tuning,
        optimizer: torch.optim.AdamW,
    ) -> None:
        """`tuning` and `optimizer` are whole and the same in all processes; "fsdp" shares them
        out, the model in place."""
        self.crew, self.device, self.optimizer = crew, device, optimizer
        self._settings, self._tuning, self._cards = settings, tuning, None
        if crew.size == 1:
            return
        if settings.tune == "full" and settings.carry == "off":
            self._cards = self._spread()
        else:
            with torch.no_grad(), lost_processes():
                for x in tuning.trained.parameters():
                    dist.broadcast(x, 0)

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the model only."""
        return self.crew.size > 1 and self._settings.parallel == "fsdp"

    def gradients(self, batch: Batch) -> Tensor:
        """Adds the gradients of the whole batch's mean loss to `.grad` and returns that loss.

        Args:
            batch: of the step, on the CPU. Every process has all of it and works on its part.
        """
        if self.crew.size == 1:
            return step_gradients(self._tuning, batch.to(self.device), self._settings)
        # What is no number must not stop one process alone, for which the others would wait.
        with unchecked(), lost_processes():
            if self._cards is not None:
                return self._cards.backward(self._parts(batch), _count(batch))
            from rwkv7.training.parallel import sum_gradients

            loss = self._own_gradients(batch)
            sum_gradients(self._tuning.trained.parameters())
            dist.all_reduce(loss)
            return loss

    def own_gradients(self, batch: Batch) -> Tensor:
        """As `gradients`, of this process's part of the loss; shared gradients stay the sum."""
        if self.crew.size == 1:
            return self.gradients(batch)
        with unchecked(), lost_processes():
            if self._cards is not None and self.sharded:
                return self._cards.own_backward(self._parts(batch), _count(batch))
            return self._own_gradients(batch)

    def clip_(self) -> Tensor:
        """Scales the gradient to the largest norm that the settings allow; the norm before."""
        if self._cards is not None:
            return self._cards.clip_(self._settings.clip)
        return clip_grad_norm_(self._tuning.trained.parameters(), self._settings.clip)

    @contextlib.contextmanager
    def reading(self) -> Iterator[bool]:
        """Around what the model reads without gradients: gives whether this process reads. All do
        of which each has a part of the model, else the first."""
        with contextlib.ExitStack() as stack:
            if self._cards is not None and self.sharded:
                stack.enter_context(self._cards.reading())
            yield self.sharded or self.crew.first

    def save(self, out: Path, step: int) -> None:
        """Writes the checkpoint of `step` steps: one, or with a part of every process."""
        if not self.sharded:
            self.crew.on_first(
                lambda: save_checkpoint(out, self._tuning, self.optimizer, self._settings, step)
            )
            return
        from rwkv7.training.parallel import save_shards

        with lost_processes():
            save_shards(
                out,
                self._tuning.model,
                self.optimizer,
                self._settings,
                step,
                base=self._tuning.base,
            )

    def join(self, out: Path) -> None:
        """Has the first process make one checkpoint of the newest parts, if it is in parts."""
        if self.sharded:
            self.crew.on_first(lambda: join_checkpoint(out))

    def _spread(self) -> Cards:
        from rwkv7.training.parallel import parallelise, share_moments  # loading it takes seconds

        model = self._tuning.model
        bf16 = torch.bfloat16 if self._settings.dtype == "bf16" else None
        mode: Literal["ddp", "fsdp"] = "fsdp" if self.sharded else "ddp"
        with lost_processes():
            cards = parallelise(model, mode, device=self.device, autocast=bf16)
        if self.sharded:
            whole, self.optimizer = self.optimizer, make_optimizer(model, self._settings)
            share_moments(whole, self.optimizer)
        return cards

    def _parts(self, batch: Batch) -> list[Batch]:
        from rwkv7.training.parallel import share

        mine = share(batch, self.crew.rank, self.crew.size)
        count = min(self._settings.accumulate, self._settings.batch // self.crew.size)
        return [share(mine, part, count).to(self.device) for part in range(count)]

    def _own_gradients(self, batch: Batch) -> Tensor:
        from rwkv7.training.parallel import share

        mine = share(batch, self.crew.rank, self.crew.size)
        rows, size = self._settings.batch, self.crew.size
        settings = replace(
            self._settings,
            batch=-(-rows // size),
            accumulate=min(self._settings.accumulate, rows // size),
        )
        return step_gradients(self._tuning, mine.to(self.device), settings, _count(batch))


def _count(batch: Batch) -> int:
    return max(1, int(predicted(batch.targets)))
