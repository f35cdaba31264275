"""Data parallelism: one model on many cards, each working on its own rows of a step's batch.

`parallelise` gives a `Cards`, whose gradients, loss and norm are those of the whole batch on one
card. Which rows a rank has is in rows.py, one sequence over several cards in context.py.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from rwkv7.nn import RWKV7
from rwkv7.training.batch import Batch
from rwkv7.training.loss import next_token_loss

__all__ = ["Cards", "Mode", "parallelise"]

Mode = Literal["ddp", "fsdp"]


def parallelise(
    model: RWKV7,
    mode: Mode = "ddp",
    *,
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
    autocast: torch.dtype | None = None,
    backend: str | None = None,
) -> Cards:
    """The model on all ranks of a group. A collective; the optimizer is made after it.

    Args:
        model: on this rank's device, or for "fsdp" on the CPU, so that no card has to hold all of
            it; the weights of the group's first rank count.
        mode: "ddp" keeps the whole model on each card, "fsdp" a part of every parameter (they
            become DTensors, in place), of its gradient and of its moments.
        group: the ranks, all processes when None.
        device: of this rank, the model's when None; "fsdp" moves the parts there.
        autocast: the dtype of the products, None for the parameters' own.
        backend: the operator's backend, None for the first that accepts the call.

    Raises:
        ValueError: another mode, or no process group.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode: expected one of {', '.join(get_args(Mode))}, found {mode!r}")
    if not dist.is_initialized():
        raise ValueError(
            "group: expected torch.distributed to be set up (torch.distributed.init_process_group, "
            "in processes that torchrun started), found no process group"
        )
    objective: nn.Module = _Objective(model, backend)
    with torch.no_grad():
        for x in model.parameters():
            dist.broadcast(x, group=group, group_src=0)
    if mode == "ddp":
        # The weights are equal already; there are no buffers.
        objective = DistributedDataParallel(
            objective, process_group=group, init_sync=False, gradient_as_bucket_view=True
        )
    else:
        mesh = _mesh(group, (device or model.device).type)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "hidden")
    return Cards(model, objective, group, autocast)


class Cards:
    """A model spread over the ranks of a group; `parallelise` makes it.

    model: the model itself, for the optimizer, for evaluation and for checkpoints. Sharded, its
        calls are collectives.
    rank, size: this process's place in the group, and how many there are.
    """

    def __init__(
        self,
        model: RWKV7,
        objective: nn.Module,
        group: dist.ProcessGroup | None,
        autocast: torch.dtype | None,
    ) -> None:
        self.model, self._objective, self._group = model, objective, group
        self._autocast = autocast
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def backward(self, parts: Sequence[Batch], predicted: int) -> Tensor:
        """Add the gradient of the whole step's mean loss to `.grad`, and return that loss.

        A collective: all ranks have as many parts.

        Args:
            parts: this rank's rows of the step's batch, on its device, in as many parts as memory
                asks for; gradients travel once, after the last.
            predicted: how many targets the step has on all ranks and in all parts: the loss is the
                mean over them, whatever rank they are on.

        Returns:
            the mean loss over all ranks, a scalar without gradient.
        """
        total = self.own_backward(parts, predicted)
        dist.all_reduce(total, group=self._group)
        return total

    def own_backward(self, parts: Sequence[Batch], predicted: int) -> Tensor:
        """As `backward`, but the loss is this rank's part, of which the whole is the sum."""
        if not parts:
            raise ValueError("parts: expected at least one batch, found none")
        total = None
        for number, part in enumerate(parts, 1):
            with self._exchange(number == len(parts)):
                with self._precision(), _quiet():
                    # The exchange takes the mean over ranks; the sum is wanted.
                    loss = self._objective(
                        part.inputs, part.targets, part.cu_seqlens, predicted / self.size
                    )
                loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total / self.size

    def clip_(self, largest: float) -> Tensor:
        """Scale the gradient to a norm of at most `largest`; the norm before, over all cards."""
        parameters = [x for x in self.model.parameters() if x.grad is not None]
        if not any(isinstance(x.grad, DTensor) for x in parameters):
            return clip_grad_norm_(parameters, largest)
        # On what lies here: torch's own would dispatch every part of a gradient by itself.
        with torch.no_grad():
            parts = [cast("DTensor", x.grad).to_local() for x in parameters]
            total = torch.stack(torch._foreach_norm(parts)).square().sum()
            dist.all_reduce(total, group=self._group)
            norm = total.sqrt()
            torch._foreach_mul_(parts, (largest / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Around calls of a model without gradients, which leave parts of it whole on each card:
        afterwards its parameters are what the optimizer and checkpoints know, again."""
        try:
            yield
        finally:
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _exchange(self, wanted: bool) -> contextlib.AbstractContextManager[None]:
        if isinstance(self._objective, DistributedDataParallel):
            return contextlib.nullcontext() if wanted else self._objective.no_sync()
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(wanted)
        return contextlib.nullcontext()

    def _precision(self) -> torch.autocast:
        wanted = self._autocast is not None
        return torch.autocast(self.model.device.type, self._autocast, enabled=wanted)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Blocks hand layer 0's value through as it came, and nothing changes it in place.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        yield


def _mesh(group: dist.ProcessGroup | None, device: str) -> DeviceMesh:
    if group is None:
        return init_device_mesh(device, (dist.get_world_size(),))
    return DeviceMesh.from_group(group, device)


class _Objective(nn.Module):
    """Tokens to loss in one call, which is what DDP wants to see."""

    def __init__(self, model: RWKV7, backend: str | None) -> None:
        super().__init__()
        self.model, self.backend = model, backend

    def forward(
        self, inputs: Tensor, targets: Tensor, cu_seqlens: Tensor | None, denominator: float
    ) -> Tensor:
        features, _ = self.model.hidden(inputs, cu_seqlens=cu_seqlens, backend=self.backend)
        return next_token_loss(self.model.head, features, targets, denominator=denominator)
