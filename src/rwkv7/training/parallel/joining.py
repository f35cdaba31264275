"""From whole numbers to parts and back: moments given to cards, a checkpoint in parts made one.

How parts are written and read is in shards.py, what an ordinary checkpoint is in checkpoint.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from rwkv7.training.checkpoint import MOMENTS, in_order, newest_checkpoint, save_checkpoint
from rwkv7.training.tuning import Tuning

from .shards import join_shards, newest_shards

__all__ = ["join_newest", "share_moments"]


def share_moments(whole: torch.optim.Optimizer, parts: torch.optim.Optimizer) -> None:
    """Give the optimizer of a sharded model its parts of the moments that `whole` has.

    Args:
        whole: of the same model before it was sharded, the same numbers on every rank.
        parts: of the sharded model, without moments yet.
    """
    states = {}
    for number, ((_, old), (_, new)) in enumerate(
        zip(in_order(whole), in_order(parts), strict=True)
    ):
        if old not in whole.state:
            continue
        assert isinstance(new, DTensor)
        found = whole.state[old]
        states[number] = {
            moment: found[moment].to(new.device)
            if moment == "step"
            else distribute_tensor(
                found[moment].to(new.device), new.device_mesh, new.placements, src_data_rank=None
            )
            for moment in MOMENTS
        }
    parts.load_state_dict({**parts.state_dict(), "state": states})


def join_newest(run: Path) -> None:
    """Make the newest checkpoint of the run an ordinary one, if it is in parts; these then go.

    In one process, with the memory for the whole model and its moments. Raises what `join_shards`
    and `save_checkpoint` raise, and leaves the parts where they were.
    """
    shards, ordinary = newest_shards(run), newest_checkpoint(run)
    if shards is not None and (ordinary is None or ordinary.step < shards.step):
        model, optimizer = join_shards(shards)
        tuning = Tuning(model, shards.base)
        save_checkpoint(run, tuning, optimizer, shards.settings, shards.step, shards.machine)
    for path in (run / "checkpoints").glob("sharded-*"):
        shutil.rmtree(path, ignore_errors=True)
