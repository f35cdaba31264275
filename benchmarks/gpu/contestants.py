"""The two sides of a training benchmark: this library's training step, and FLA's RWKV-7 model.

Both get the same batches and sizes, and differ in the model, its initialisation and its optimizer.
How they are timed is the callers' affair.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from rwkv7.config import ModelConfig
from rwkv7.nn import RWKV7
from rwkv7.state import ModelState
from rwkv7.training import TrainSettings
from rwkv7.training.batch import Batch
from rwkv7.training.carry import batch_gradients
from rwkv7.training.loss import next_token_loss
from rwkv7.training.optim import learning_rate, make_optimizer, set_learning_rate

# Plain AdamW over one group, with what FLA's own trainer (flame, on torchtitan) sets.
FLA_BETAS = (0.9, 0.95)
FLA_EPS = 1e-15


class Contestant(Protocol):
    """A model, its optimizer and its training step."""

    name: str
    model: Any

    def step(self, batch: Batch, number: int) -> tuple[float, float]:
        """One training step (from 0): its loss in nats a token, and the gradient's norm."""

    def loss(self, batch: Batch) -> float:
        """The loss alone, in nats a predicted token; no gradient."""


class Ours:
    """`rwkv7 train`'s step: batch_gradients under autocast, clipping, AdamW in three groups."""

    def __init__(
        self,
        config: ModelConfig,
        settings: TrainSettings,
        device: torch.device,
        *,
        backend: str | None = None,
        products: torch.dtype = torch.bfloat16,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.name = "rwkv7" + (f", backend {backend}" if backend else "")
        self.settings, self._products = settings, products
        self.model = on_backend(config, backend, device)
        self.model.recompute = settings.recompute
        self.optimizer = make_optimizer(self.model, settings)

    def step(self, batch: Batch, number: int) -> tuple[float, float]:
        set_learning_rate(self.optimizer, learning_rate(self.settings, number))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self._precision():
            loss = batch_gradients(self.model, batch)
        norm = clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        nats, size = torch.stack((loss, norm)).tolist()
        return nats, size

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        with self._precision():
            features, _ = self.model.hidden(batch.inputs, cu_seqlens=batch.cu_seqlens)
            return next_token_loss(self.model.head, features, batch.targets).item()

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, self._products)


def on_backend(config: ModelConfig, backend: str | None, device: torch.device) -> RWKV7:
    """A new model whose training steps run the operator on that backend, None for its default."""
    model = _OnBackend(config, device=device)
    model.backend = backend
    return model


class _OnBackend(RWKV7):
    """A model whose operator runs on one backend, for training steps, which name none."""

    backend: str | None = None

    def hidden(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, ModelState]:
        """As RWKV7.hidden."""
        return super().hidden(tokens, state, cu_seqlens, backend or self.backend)


class Fla:
    """RWKV7ForCausalLM of flash-linear-attention with its fused norms, kernels and loss.

    Args:
        head: "linear": its fused linear cross entropy, which never holds all logits; "logits": its
            fused cross entropy on all of them. Both with L2Warp, its default.
        masters: True: weights in the products' dtype and fp32 copies that the optimizer changes, as
            its trainer has them through FSDP's mixed precision. False: fp32 weights and autocast.
    """

    def __init__(
        self,
        config: ModelConfig,
        settings: TrainSettings,
        device: torch.device,
        *,
        head: str = "linear",
        masters: bool = False,
        products: torch.dtype = torch.bfloat16,
    ) -> None:
        torch.manual_seed(settings.seed)
        kind = "16-bit weights with fp32 masters" if masters else "fp32 weights, autocast"
        self.name = f"fla, {head} loss, {kind}"
        self.settings, self._products, self._device = settings, products, device
        self.model = _fla_model(config, head).to(device).train()
        weights: list[Tensor] = list(self.model.parameters())
        self._weights: list[Tensor] = []
        if masters:
            self._weights = weights
            weights = [nn.Parameter(x.detach().clone()) for x in weights]
            self.model.to(products)
        self._trained = weights
        self.optimizer = torch.optim.AdamW(
            weights,
            lr=settings.lr,
            betas=FLA_BETAS,
            eps=FLA_EPS,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def step(self, batch: Batch, number: int) -> tuple[float, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, number)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(batch)
        loss.backward()
        for master, weight in zip(self._trained, self._weights, strict=False):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        norm = clip_grad_norm_(self._trained, self.settings.clip)
        self.optimizer.step()
        if self._weights:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, self._trained)
        nats, size = torch.stack((loss.detach(), norm)).tolist()
        return nats, size

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        return self._loss(batch).item()

    def _loss(self, batch: Batch) -> Tensor:
        offsets = None if batch.cu_seqlens is None else batch.cu_seqlens.long()
        with torch.autocast(self._device.type, self._products, enabled=not self._weights):
            found = self.model(
                input_ids=batch.inputs, shift_labels=batch.targets, cu_seqlens=offsets
            )
        return found.loss


def _fla_model(config: ModelConfig, head: str) -> Any:
    from fla.models.rwkv7 import RWKV7Config, RWKV7ForCausalLM

    sizes = RWKV7Config(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        head_dim=config.head_size,
        decay_low_rank_dim=config.decay_rank,
        a_low_rank_dim=config.iclr_rank,
        v_low_rank_dim=config.value_rank,
        gate_low_rank_dim=config.gate_rank,
        vocab_size=config.vocab_size,
        fuse_norm=True,
        fuse_linear_cross_entropy=head == "linear",
        fuse_cross_entropy=head == "logits",
        use_cache=False,
    )
    return RWKV7ForCausalLM(sizes)
