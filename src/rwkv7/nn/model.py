"""The language model: embedding, blocks, head. `RWKV7` is what users hold.

Files are left to `weights`, what a state is to `state`, the loss to `training`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv7.config import ModelConfig
from rwkv7.state import LayerState, ModelState

from .again import recomputing, remember
from .before import Before
from .channel_mix import ChannelMix
from .fused import (
    ChannelMixWeights,
    Norm,
    Shifted,
    Stream,
    TimeMixWeights,
    channel_mix_of_one_,
    channel_mix_of_rows_,
    runs_layers,
    shifted_mixes,
    time_mix_of_one_,
    time_mix_of_rows_,
)
from .init import initialise_
from .linear import Linear
from .time_mix import TimeMix
from .token_shift import Packing, Slots, packing, slots_of

RECOMPUTE = ("nothing", "cheap", "layers")


class Block(nn.Module):
    """One layer: x += TimeMix(ln1(x)), then x += ChannelMix(ln2(x)). Block 0 begins with ln0."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        C = config.width
        self.ln0 = nn.LayerNorm(C, dtype=dtype, device=device) if layer == 0 else None
        self.ln1 = nn.LayerNorm(C, dtype=dtype, device=device)
        self.ln2 = nn.LayerNorm(C, dtype=dtype, device=device)
        self.att = TimeMix(config, layer, dtype, device)
        self.ffn = ChannelMix(config, dtype, device)

    def forward(
        self,
        x: Tensor,
        added: Tensor | None,
        v_first: Tensor | None,
        state: LayerState | None,
        packed: Packing | None = None,
        backend: str | None = None,
        before: Before | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, LayerState]:
        """One layer over T ≥ 1 tokens, whose input is x + added, and whose output x + added again.

        The next layer takes both terms: their sum, its layer norm and its token shift are one
        launch.

        Args:
            x: [B, T, C].
            added: [B, T, C], or None for nothing.
            v_first: layer 0's value, [B, T, C]; None for block 0, which gives it.
            state: the layer's; None means zeros.
            packed: the ends of packed sequences.
            backend: the operator's backend, None for its default.
            before: what another process holds of the sequence, None when it is all here.

        Returns:
            (x, added, layer 0's value, the layer's state).
        """
        wkv, time_shift, channel_shift = (None, None, None) if state is None else state
        if self.ln0 is not None:
            x, added = self.ln0(x if added is None else x + added), None
        mixes = self.att.mixes()
        x, mixed, time_shift, _ = _begun(x, added, self.ln1, time_shift, packed, mixes, before)
        added, v_first, wkv = self.att(mixed, v_first, wkv, packed, backend, before)
        mixes = self.ffn.mixes()
        x, mixed, channel_shift, _ = _begun(
            x, added, self.ln2, channel_shift, packed, mixes, before
        )
        added = self.ffn(*mixed)
        # Autocast may run layer norms in float32; the state keeps the model's dtype.
        dtype = self.ln1.weight.dtype
        state = LayerState(wkv, time_shift.to(dtype), channel_shift.to(dtype))
        return x, added, v_first, state

    def step_(
        self, stream: Stream, v_first: Tensor | None, pool: LayerState, slots: Slots
    ) -> tuple[Stream, Tensor]:
        """(the stream [B, 1, C], layer 0's value) for one token each; rows of `pool` change."""
        if self.ln0 is not None:
            stream = Stream(self.ln0(stream.total()))
        if runs_layers(stream.x, *pool):
            time, channel = self.att.weights_of_step(), self.ffn.weights_of_step()
            if time is not None and channel is not None:
                return self._layer_(stream, v_first, pool, slots.wkv, time, channel)
        # A product of [B, 1, C] is four operations on the CPU, one of [B, C] is two.
        x = stream.total().squeeze(1)
        out, v_first = self.att.step_(self.ln1(x), v_first, pool.time_shift, pool.wkv, slots)
        x = x + out
        x = x + self.ffn.step_(self.ln2(x), pool.channel_shift, slots)
        return Stream(x.unsqueeze(1)), v_first

    def _layer_(
        self,
        stream: Stream,
        v_first: Tensor | None,
        pool: LayerState,
        slots: Tensor,
        time: TimeMixWeights,
        channel: ChannelMixWeights,
    ) -> tuple[Stream, Tensor]:
        """`step_` by the kernels that take a layer's weights whole."""
        first, second = _norm(self.ln1), _norm(self.ln2)
        if stream.x.shape[0] > 1:
            stream, v_first = time_mix_of_rows_(
                stream, v_first, first, time, pool.time_shift, pool.wkv, slots
            )
            return channel_mix_of_rows_(stream, second, channel, pool.channel_shift, slots), v_first
        x, v_first = time_mix_of_one_(
            stream.total(), v_first, first, time, pool.time_shift, pool.wkv, slots
        )
        return Stream(channel_mix_of_one_(x, second, channel, pool.channel_shift, slots)), v_first


def _begun(
    x: Tensor,
    added: Tensor | None,
    norm: nn.LayerNorm,
    carried: Tensor | None,
    packed: Packing | None,
    mixes: tuple[Tensor, ...],
    before: Before | None,
) -> Shifted:
    """`shifted_mixes`, whose mixes and norms are cheap to make again from the sum."""
    if before is not None:
        end = x[:, -1] if added is None else x[:, -1] + added[:, -1]
        carried = before.shift(norm(end), carried)

    def again(x: Tensor, moments: Tensor | None) -> tuple[Tensor, ...]:
        same = shifted_mixes(x, None, norm, carried, packed, mixes, moments)
        return *same.mixed, same.last

    found = shifted_mixes(x, added, norm, carried, packed, mixes)
    remember(again, (found.x, found.moments), (*found.mixed, found.last))
    return found


def _norm(module: nn.LayerNorm) -> Norm:
    return Norm(module.weight, module.bias, module.eps)


class RWKV7(nn.Module):
    """An RWKV-7 language model, with the official checkpoints' parameter names.

    A new model has the official initialisation; `load_model` gives a trained one. `model.recompute`
    says what a backward pass computes again instead of keeping it, for the same gradients in less
    memory and more time: "nothing", "cheap" (all of a block but what matrix products and the
    operator gave), or "layers" (whole blocks).

    Args:
        config: the sizes; kept as `model.config`.
        dtype: of all parameters; None means torch's default.
        device: where they live; None means torch's default.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute = "nothing"
        V, C = config.vocab_size, config.width
        # Made without memory first: the modules' own initialisation would be thrown away. (An
        # embedding given its weight does not begin with one.)
        table = torch.empty(V, C, dtype=dtype, device="meta")
        self.emb = nn.Embedding.from_pretrained(table, freeze=False)
        self.blocks = nn.ModuleList(
            Block(config, layer, dtype, "meta") for layer in range(config.layers)
        )
        self.ln_out = nn.LayerNorm(C, dtype=dtype, device="meta")
        self.head = Linear(C, V, dtype, "meta")
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type != "meta":
            # Not to_empty(), which takes half a second to import what it asks of meta tensors.
            empty = {
                name: torch.empty(x.shape, dtype=x.dtype, device=device)
                for name, x in self.named_parameters()
            }
            self.load_state_dict(empty, assign=True)
            initialise_(self)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.emb.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.emb.weight.device

    def forward(
        self,
        tokens: Tensor,  # [B, T]
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,  # [S + 1]
        last_only: bool = False,
        backend: str | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Logits for the token after each token, and the state after the last.

        Args:
            tokens: [B, T], int32 or int64, any T ≥ 0. When packed, [1, T].
            state: what the same call returned for the tokens before; None at the start. Its rows
                are the B sequences, or the S packed ones. Never changed.
            cu_seqlens: offsets [S + 1] of packed sequences, from 0 to T; a sequence may be empty
                and then keeps its state. Padded batches go through `rwkv7.packing.run_padded`.
            last_only: only each sequence's last logits, [B, 1, V] or, packed, [1, S, V]. A
                sequence without tokens has none: its row is NaN.
            backend: the operator's backend, None for the first that accepts the call.

        Returns:
            logits [B, T, V] in the model's dtype (that of autocast under it), and the state.

        Raises:
            ValueError, TypeError: tokens, offsets or a state that do not fit; on the CPU also
                tokens outside the vocabulary.
        """
        features, state = self.hidden(tokens, state, cu_seqlens, backend)
        if not last_only:
            return self.head(features), state
        if features.shape[1] == 0:
            rows = 1 if cu_seqlens is None else state.batch
            nothing = features.new_full((features.shape[0], rows, features.shape[2]), math.nan)
            return self.head(nothing), state
        if cu_seqlens is None:
            return self.head(features[:, -1:]), state
        ends = cu_seqlens[1:].long()
        last = features.index_select(1, (ends - 1).clamp(min=0))
        empty = (ends == cu_seqlens[:-1])[None, :, None]
        return self.head(last).masked_fill(empty, math.nan), state

    def hidden(
        self,
        tokens: Tensor,  # [B, T]
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,  # [S + 1]
        backend: str | None = None,
        before: Before | None = None,
    ) -> tuple[Tensor, ModelState]:
        """What the head reads, [B, T, C], after `ln_out`, and the state: `forward` less the head.

        For a loss that applies the head in pieces, and for a sequence in pieces on several cards:
        `before` is what another process holds of it. Other arguments and errors are `forward`'s.
        """
        self._check_tokens(tokens)
        packed = None if cu_seqlens is None else packing(cu_seqlens, tokens)
        batch = tokens.shape[0] if packed is None else packed.sequences
        if state is not None:
            state.check(self.config, batch, self.dtype, self.device)
        x = self._embed(tokens)
        if tokens.numel() == 0:
            # A copy: what is done to the state that comes out must not reach the one given.
            if state is not None:
                return self.ln_out(x), state.clone()
            return self.ln_out(x), ModelState.zeros(self.config, batch, self.dtype, self.device)
        if self.recompute not in RECOMPUTE:
            expected = ", ".join(RECOMPUTE)
            raise ValueError(f"recompute: expected one of {expected}, found {self.recompute!r}")
        added, v_first, layers = None, None, []
        given = [None] * len(self.blocks) if state is None else state.layers
        for block, layer in zip(self.blocks, given, strict=True):
            if self.recompute == "layers" and torch.is_grad_enabled():
                # The sum alone is kept. Nothing in a block is random, so no generator's state is.
                x = x if added is None else x + added
                x, added, v_first, layer = checkpoint(
                    block, x, None, v_first, layer, packed, backend, before,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
            else:
                wanted = self.recompute == "cheap" and torch.is_grad_enabled()
                with recomputing() if wanted else contextlib.nullcontext():
                    x, added, v_first, layer = block(
                        x, added, v_first, layer, packed, backend, before
                    )
            layers.append(layer)
        x = x if added is None else x + added
        return self.ln_out(x), ModelState(tuple(layers))

    @torch.no_grad()
    def step_(self, tokens: Tensor, pool: ModelState, slots: Tensor) -> Tensor:
        """Logits after one token each for B sequences, rows of `pool` advanced **in place**.

        For many sequences that come and go: nothing is gathered, no memory outlives the call, and
        on a GPU with a step kernel it can be captured in a CUDA graph. For inference only.

        Args:
            tokens: [B], int32 or int64.
            pool: P states of this model, changed.
            slots: [B], int32 or int64, each sequence's row of the pool; none is named twice. -1
                skips a sequence: its logits mean nothing, and the shifts of the pool's last row,
                which must then be no sequence's, are overwritten.

        Returns:
            logits [B, V] in the model's dtype.

        Raises:
            ValueError, TypeError: tokens, a pool or slots that do not fit; values are looked at
                as `wkv7_step_` does.
        """
        self._check_tokens(tokens[:, None])
        pool.check(self.config, pool.batch, self.dtype, self.device)
        chosen = slots_of(slots, tokens, pool.batch)
        stream, v_first = Stream(self._embed(tokens)[:, None]), None
        blocks = cast("Iterable[Block]", self.blocks)  # a ModuleList does not say what it holds
        for block, layer in zip(blocks, pool.layers, strict=True):
            stream, v_first = block.step_(stream, v_first, layer, chosen)
        return self.head(self.ln_out(stream.total()))[:, 0]

    def compile_step(self, backend: str = "inductor") -> None:
        """Have `step_` compiled block by block from now on: fewer launches of fewer bytes.

        The first steps of a width wait for the compiler, seconds to a minute; two graphs serve all
        layers. Results agree within rounding.

        Args:
            backend: of torch.compile.
        """
        for block in cast("Iterable[Block]", self.blocks):
            compiled = torch.compile(block.step_, fullgraph=True, backend=backend)
            block.step_ = compiled  # type: ignore[method-assign]

    def _check_tokens(self, tokens: Tensor) -> None:
        if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int32, torch.int64):
            found = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"tokens: expected an int32 or int64 tensor, found {found}")
        if tokens.dim() != 2:
            raise ValueError(f"tokens: expected [B, T], found the shape {list(tokens.shape)}")
        if tokens.device != self.device:
            raise ValueError(
                f"tokens: expected the device of the model, {self.device}, found {tokens.device}"
            )

    def _embed(self, tokens: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.emb(tokens)
        try:
            return self.emb(tokens)
        except IndexError:
            low, high = (int(x) for x in tokens.aminmax())
            raise ValueError(
                f"tokens: expected ids from 0 to {self.config.vocab_size - 1}, "
                f"found {low} to {high}"
            ) from None


def parameter_count(config: ModelConfig) -> int:
    """How many numbers a model of these sizes has, told from small ones: layers after the first are
    alike."""
    one, two = (
        sum(x.numel() for x in RWKV7(replace(config, layers=layers), device="meta").parameters())
        for layers in (1, 2)
    )
    return one + (config.layers - 1) * (two - one)
