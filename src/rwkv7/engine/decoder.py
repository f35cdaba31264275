"""One token for every running request: fixed widths, and CUDA graphs where there are any.

What a step computes is `RWKV7.step_`; this decides in which shapes it is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rwkv7.nn import RWKV7
from rwkv7.wkv7 import batch_invariant, unchecked

from .capture import captured, graph_memory
from .pool import Pool

# A product of 5 rows treats its last rows otherwise than its first, one of 16 treats all alike.
ROW_MULTIPLE = 16
# Widths that are captured, up to the number of slots: padding costs little beside the weights.
_GRAPH_WIDTHS = (1, 2, 4, 8, *range(16, 65, 16), *range(96, 513, 32), *range(640, 8193, 128))
_PROBE_STEPS = 3


class Decoder:
    """Steps of a pool's states, at most one for each slot.

    Args:
        model: on the device of the pool.
        pool: changed in place by every call.
        deterministic: every call has the same width, so that a row's bits do not depend on how
            many there are. Where rows of one width differ from each other (a machine whose
            products treat rows unequally), rows go one by one.
        graphs: capture the step in a CUDA graph for each width; nothing is captured elsewhere.
    """

    def __init__(self, model: RWKV7, pool: Pool, deterministic: bool, graphs: bool) -> None:
        self._model, self._pool = model, pool
        self._mode = batch_invariant if deterministic else contextlib.nullcontext
        self._steps: dict[int, Callable[[Tensor], Tensor]] = {}
        self.widths: tuple[int, ...] = ()  # none: a call is as wide as its rows
        captures = graphs and model.device.type == "cuda"
        if deterministic:
            self.widths = (-(-pool.slots // ROW_MULTIPLE) * ROW_MULTIPLE,)
            if not self._rows_agree():
                self.widths = (1,)
        elif captures:
            self.widths = (*(w for w in _GRAPH_WIDTHS if w < pool.slots), pool.slots)
        if captures:
            memory = graph_memory()
            for width in reversed(self.widths):
                rows = self._padding(width).to(model.device)
                self._steps[width] = captured(self._step, rows, memory)

    def __call__(self, tokens: Sequence[int], slots: Sequence[int]) -> Tensor:
        """Logits [n, V] after one token each for n different slots; good until the next call."""
        widest = self.widths[-1] if self.widths else len(tokens)
        if len(tokens) <= widest:
            return self._run(tokens, slots)
        parts = range(0, len(tokens), widest)
        # Cloned: a captured step writes its logits to the same place every time.
        logits = [self._run(tokens[i : i + widest], slots[i : i + widest]).clone() for i in parts]
        return torch.cat(logits)

    def _run(self, tokens: Sequence[int], slots: Sequence[int]) -> Tensor:
        n = len(tokens)
        width = next((width for width in self.widths if width >= n), n)
        rows = self._padding(width)
        rows.numpy()[:, :n] = tokens, slots  # torch.tensor takes several times as long
        return self._steps.get(width, self._step)(rows)[:n]

    def _padding(self, width: int) -> Tensor:
        """Rows [2, width] of tokens and slots that do nothing."""
        cuda = self._model.device.type == "cuda"
        rows = torch.zeros(2, width, dtype=torch.int64, pin_memory=cuda)
        rows[1] = -1
        return rows

    def _step(self, rows: Tensor) -> Tensor:
        rows = rows.to(self._model.device, non_blocking=True)
        with self._mode(), unchecked():
            return self._model.step_(rows[0], self._pool.state, rows[1])

    def _rows_agree(self) -> bool:
        """Whether the same tokens in every slot give the same bits in every row."""
        slots = range(self._pool.slots)
        agree = True
        for token in range(_PROBE_STEPS):
            logits = self._run([token % self._model.config.vocab_size] * len(slots), slots)
            agree &= bool((logits == logits[:1]).all())
        self._pool.clear(slots)
        return agree
