"""The kernels of the backend `cuda` through NVRTC, which needs no GPU: each compiles for every
architecture, in the registers and without more spills than the table says."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from rwkv7.wkv7.backends.cuda import compiler, plan
from rwkv7.wkv7.contract import Call

_reason = compiler.why_not("sm_90a")
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))

# Of INPUT_FP16, W_FP32, LOGIT and PACKED, by head size. Every pair of them in all its four ways,
# at the larger size two sets; all sets would take minutes, and whatever the GPU's suite calls is
# compiled there.
COMMON = {64: ("0000", "0011", "0101", "1001", "1110"), 128: ("1110", "0011")}
OWN = {
    "forward": ({"SAVE": False}, {"SAVE": True}),
    "backward": ({"APART": False}, {"APART": True}),
    "relay": ({"SAVE": False}, {"SAVE": True}),
    "relay_back": ({},),
    "segment": ({},),
    "segment_back": ({},),
    "chain": ({"BACK": False}, {"BACK": True}),
}
# Registers of a thread and bytes spilled, at most, by kernel, head size, and whether w has 32 bits.
# Registers decide how many blocks share a multiprocessor: a rise is a decision, not an accident.
LIMITS = {
    ("forward", 64, 0): (128, 64),
    ("forward", 64, 1): (128, 64),
    ("backward", 64, 0): (255, 32),
    ("backward", 64, 1): (255, 32),
    ("relay", 64, 0): (128, 64),
    ("relay", 64, 1): (128, 64),
    ("relay_back", 64, 0): (128, 0),
    ("relay_back", 64, 1): (128, 0),
    ("segment", 64, 0): (168, 32),
    ("segment", 64, 1): (168, 32),
    ("segment_back", 64, 0): (128, 96),
    ("segment_back", 64, 1): (128, 0),
    ("chain", 64, 0): (255, 0),
    ("chain", 64, 1): (255, 0),
    ("forward", 128, 0): (255, 32),
    ("forward", 128, 1): (255, 32),
    ("backward", 128, 0): (255, 64),
    ("backward", 128, 1): (255, 64),
    ("relay", 128, 0): (255, 0),
    ("relay", 128, 1): (255, 0),
    ("relay_back", 128, 0): (255, 0),
    ("relay_back", 128, 1): (255, 0),
    ("segment", 128, 0): (255, 64),
    ("segment", 128, 1): (255, 64),
    ("segment_back", 128, 0): (255, 0),
    ("segment_back", 128, 1): (255, 0),
    ("chain", 128, 0): (255, 0),
    ("chain", 128, 1): (255, 0),
}
VARIANTS = [
    (kernel, common, own)
    for kernel in plan.KERNELS
    for common, own in zip(COMMON[kernel.head], itertools.cycle(OWN[kernel.name]), strict=False)
]


def macros(kernel: plan.Kernel, common: str, own: dict[str, bool]) -> plan.Macros:
    fp16, fp32, logit, packed = (value == "1" for value in common)
    x = torch.zeros(1, 4, 1, kernel.head, dtype=torch.float16 if fp16 else torch.bfloat16)
    offsets = torch.tensor([0, 4]) if packed else None
    decay = "logit" if logit else "log_bounded"
    w = x.float() if fp32 else x
    return plan.macros(Call(x, w, x, x, x, x, None, decay, offsets), own)


def usage(log: str, entry: str) -> tuple[int, int]:
    """Registers and bytes of spill stores that ptxas reports for the function."""
    about = log[log.index(f"Function properties for {entry}") :]
    registers = re.search(r"Used (\d+) registers", about)
    spills = re.search(r"(\d+) bytes spill stores", about)
    assert registers and spills, log
    return int(registers[1]), int(spills[1])


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    ("kernel", "common", "own"), VARIANTS, ids=lambda x: getattr(x, "name", str(x))
)
def test_compiles_in_its_registers(
    kernel: plan.Kernel, common: str, own: dict[str, bool], target: str
) -> None:
    chosen = macros(kernel, common, own)
    cubin, log = compiler.compile_kernel(kernel, chosen, target)
    assert cubin.startswith(b"\x7fELF")
    registers, spilled = usage(log, kernel.entry)
    most_registers, most_spilled = LIMITS[kernel.name, kernel.head, dict(chosen)["W_FP32"]]
    assert registers <= most_registers and spilled <= most_spilled, (registers, spilled)
    assert "serialized" not in log  # products of a group that would wait for each other
