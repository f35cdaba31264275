"""The kernels of the backend `cuda` through NVRTC, which needs no GPU: each compiles for every
architecture, in the registers and without more spills than the table says."""

from __future__ import annotations

import re

import pytest
import torch

from rwkv7.wkv7.backends.cuda import compiler, plan
from rwkv7.wkv7.contract import Call

_reason = compiler.why_not("sm_90a")
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))

# Of INPUT_FP16, W_FP32, LOGIT, PACKED and SAVE. Every pair of them in all its four ways; every set
# would take minutes, and whatever the GPU's suite calls is compiled there.
VARIANTS = ("00000", "00011", "00101", "01001", "10001", "11110")
# Registers of a thread and bytes spilled, at most, by kernel and whether w has 32 bits. Registers
# decide how many blocks share a multiprocessor: a rise is a decision, not an accident.
LIMITS = {
    ("forward", 0): (128, 160),
    ("forward", 1): (168, 40),
    ("backward", 0): (255, 32),
    ("backward", 1): (255, 32),
}


def macros(kernel: plan.Kernel, variant: str) -> plan.Macros:
    """As a call that asks for the variant has them."""
    fp16, wide, logit, packed, save = (value == "1" for value in variant)
    x = torch.zeros(1, 1, 1, 64, dtype=torch.float16 if fp16 else torch.bfloat16)
    w = x.float() if wide else x
    offsets = torch.tensor([0, 1]) if packed else None
    call = Call(x, w, x, x, x, x, None, "logit" if logit else "log_bounded", offsets)
    if kernel is plan.FORWARD:
        return plan.forward_macros(call, save)
    return plan.backward_macros(call)


def usage(log: str, entry: str) -> tuple[int, int]:
    """Registers and bytes of spill stores that ptxas reports for the function."""
    about = log[log.index(f"Function properties for {entry}") :]
    registers = re.search(r"Used (\d+) registers", about)
    spills = re.search(r"(\d+) bytes spill stores", about)
    assert registers and spills, log
    return int(registers[1]), int(spills[1])


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kernel", plan.KERNELS, ids=lambda kernel: kernel.name)
def test_compiles_in_its_registers(kernel: plan.Kernel, variant: str, target: str) -> None:
    chosen = macros(kernel, variant)
    cubin, log = compiler.compile_kernel(kernel, chosen, target)
    assert cubin.startswith(b"\x7fELF")
    registers, spilled = usage(log, kernel.entry)
    most_registers, most_spilled = LIMITS[kernel.name, dict(chosen)["W_FP32"]]
    assert registers <= most_registers and spilled <= most_spilled, (registers, spilled)
