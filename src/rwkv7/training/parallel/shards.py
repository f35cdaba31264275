"""Checkpoints that every card writes its part of, for going on with any number of cards.

RUN/checkpoints/sharded-00000123/ holds .safetensors files, one a rank, in which
torch.distributed.checkpoint notes where each part belongs, and training.json. It is there whole or
not at all, and nothing in it is ever executed. The ranks share the folder. Ordinary checkpoints,
one file for the model, are in training/checkpoint.py; `join_shards` gives what they save.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from rwkv7.config import ModelConfig
from rwkv7.files import json_object, sync_folder, write_atomically
from rwkv7.nn import RWKV7
from rwkv7.training.checkpoint import KEPT, MOMENTS, TRAINING, in_order, machine
from rwkv7.training.optim import make_optimizer
from rwkv7.training.settings import TrainSettings
from rwkv7.training.tuning import Base

__all__ = ["Shards", "join_shards", "load_shards", "newest_shards", "save_shards"]

FORMAT = 1
_NAME = re.compile(r"sharded-(\d{8,})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shards:
    """A whole sharded checkpoint on disk: its folder, the steps done, and what its
    training.json says."""

    path: Path
    step: int
    settings: TrainSettings
    config: ModelConfig
    machine: dict[str, Any]
    base: Base | None


def save_shards(
    run: Path,
    model: RWKV7,
    optimizer: torch.optim.Optimizer,
    settings: TrainSettings,
    step: int,
    group: dist.ProcessGroup | None = None,
    base: Base | None = None,
) -> Path:
    """Write the checkpoint of `step` steps done, each rank its part, and keep the newest two.

    A collective. It is written under another name and renamed when all parts are on the disk, so
    that a kill of any rank at any moment leaves the earlier ones whole.

    Args:
        run: the run's folder, which all ranks see.
        model, optimizer: as `parallelise` and `make_optimizer` left them, sharded or not.
        settings: of the run, kept beside the numbers.
        group: the ranks that hold the model, all processes when None.
        base: the model that the run began from, kept beside the numbers.

    Returns the folder. Raises OSError, on every rank, when a part cannot be written.
    """
    folder = run / "checkpoints"
    final = folder / f"sharded-{step:08d}"
    partial = folder / f".{final.name}.partial"
    first = dist.get_rank(group) == 0
    _check_torch()
    _on_first(first, group, final, lambda: _make_room(folder, partial))
    try:
        dcp.save(
            _tensors(model, optimizer),
            storage_writer=dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True),
            process_group=group,
        )
    except CheckpointException as error:
        raise _unwritable(final, error) from None
    about = {
        "format": FORMAT,
        "step": step,
        "settings": settings.to_dict(),
        "config": asdict(model.config),
        "machine": machine(model),
        "base": base and base.to_dict(),
    }
    _on_first(first, group, final, lambda: _complete(partial, final, about))
    return final


def newest_shards(run: Path) -> Shards | None:
    """The newest whole sharded checkpoint of the run, or None. Reads no tensor."""
    for step, path in sorted(_folders(run), reverse=True):
        # What a wrong training.json raises depends on where it is wrong; none stops the search.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            about = json_object((path / TRAINING).read_bytes())
            sizes = {file.name: file.stat().st_size for file in path.glob("*.safetensors")}
            if about["format"] == FORMAT and sizes and sizes == about["bytes"]:
                origin = about.get("base")
                return Shards(
                    path=path,
                    step=step,
                    settings=TrainSettings.from_dict(about["settings"]),
                    config=ModelConfig(**about["config"]),
                    machine=dict(about.get("machine", {})),
                    base=None if origin is None else Base.from_dict(origin),
                )
    return None


def load_shards(
    shards: Shards,
    model: RWKV7,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None = None,
    *,
    alone: bool = False,
) -> None:
    """Put what was saved into the model and its optimizer, in place, each rank its part.

    A collective where there is a process group, unless this process is to do it `alone`. The
    number of ranks, and whether they share the model (FSDP) or each have all of it, may differ from
    when it was saved.

    Raises ValueError, on every rank, when files are damaged, or are another model's.
    """
    states = {} if shards.step == 0 else _empty_moments(optimizer)
    tensors = _tensors(model, optimizer, states)
    alone = alone or not dist.is_initialized()
    _check_torch()
    try:
        with warnings.catch_warnings():
            if alone:
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(
                tensors,
                storage_reader=dcp.HuggingFaceStorageReader(str(shards.path)),
                process_group=group,
                no_dist=alone,
            )
    except (CheckpointException, ValueError, RuntimeError) as error:
        raise ValueError(f"{shards.path}: cannot be loaded ({_reason(error)})") from None
    if states:
        numbered = dict(enumerate(states.values()))
        optimizer.load_state_dict({**optimizer.state_dict(), "state": numbered})


def join_shards(shards: Shards) -> tuple[RWKV7, torch.optim.AdamW]:
    """The whole model (fp32, on the CPU) and its optimizer, in one process.

    For writing an ordinary checkpoint, or a model file, at the end. Raises what `load_shards` does.
    """
    model = RWKV7(shards.config, torch.float32, "meta").to_empty(device="cpu")
    optimizer = make_optimizer(model, shards.settings)
    load_shards(shards, model, optimizer, alone=True)
    return model, optimizer


def _check_torch() -> None:
    if not hasattr(dcp, "HuggingFaceStorageWriter"):
        raise RuntimeError(
            f"sharded checkpoints: torch {torch.__version__} cannot write parts of .safetensors "
            "files (torch.distributed.checkpoint.HuggingFaceStorageWriter); install a newer one"
        )


def _tensors(
    model: RWKV7,
    optimizer: torch.optim.Optimizer,
    states: dict[str, dict[str, Tensor]] | None = None,
) -> dict[str, Any]:
    """What is saved, by name: parameters, and the moments that `states` or the optimizer has."""
    tensors = {f"model.{name}": x.detach() for name, x in model.named_parameters()}
    if states is None:
        states = {
            name: optimizer.state[x] for name, x in in_order(optimizer) if x in optimizer.state
        }
    for name, moments in states.items():
        tensors |= {f"optimizer.{name}.{moment}": moments[moment] for moment in MOMENTS}
    return tensors


def _empty_moments(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Room for the moments of each parameter, laid out over the ranks as it is."""
    return {
        name: {
            moment: torch.zeros((), dtype=torch.float32, device=x.device)
            if moment == "step"
            else torch.zeros_like(x, requires_grad=False)
            for moment in MOMENTS
        }
        for name, x in in_order(optimizer)
    }


def _on_first(
    first: bool, group: dist.ProcessGroup | None, final: Path, work: Callable[[], None]
) -> None:
    """Have the first rank do it while the others wait; what it met is raised on all of them."""
    problem: list[Any] = [None]
    if first:
        try:
            work()
        except OSError as error:
            problem = [error]
    dist.broadcast_object_list(problem, group=group, group_src=0)
    if problem[0] is not None:
        raise _unwritable(final, problem[0])


def _make_room(folder: Path, partial: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".sharded-*.partial"):
        shutil.rmtree(leftover)
    partial.mkdir()


def _complete(partial: Path, final: Path, about: dict[str, Any]) -> None:
    sizes = {file.name: file.stat().st_size for file in partial.glob("*.safetensors")}
    text = json.dumps({**about, "bytes": sizes}, indent=1) + "\n"
    write_atomically(partial / TRAINING, lambda file: _write(file, text))
    if final.exists():  # left by an earlier run of the same step, perhaps damaged since
        shutil.rmtree(final)
    partial.rename(final)
    sync_folder(final.parent)
    for _, old in sorted(_folders(final.parent.parent), reverse=True)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _folders(run: Path) -> list[tuple[int, Path]]:
    found = ((_NAME.fullmatch(path.name), path) for path in (run / "checkpoints").glob("sharded-*"))
    return [(int(match[1]), path) for match, path in found if match]


def _unwritable(final: Path, error: BaseException) -> OSError:
    return OSError(
        f"{final}: the checkpoint could not be written ({_reason(error)}); "
        "the earlier ones are whole"
    )


def _reason(error: BaseException) -> str:
    """What was met, in a line; of an exception for several ranks, on the first of them."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]
