"""The machine underneath: which device to use, and what to write beside a measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

# What can change a number or a time here.
_PACKAGES = ("rwkv7", "torch", "triton", "numpy", "safetensors")

_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def best_device() -> torch.device:
    """CUDA (or ROCm) when there is one, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def device_called(name: str | torch.device | None) -> torch.device:
    """The device of that name, the best one for None; ValueError where it is not to be had."""
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device: {str(name)!r} cannot be used here ({reason}); the best is {best_device()}"
        ) from None
    return device


def dtype_called(name: str) -> torch.dtype:
    """The dtype that the command line calls `name`; ValueError for an unknown one."""
    if name not in _DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(_DTYPES)}, found {name!r}")
    return _DTYPES[name]


def device_name(device: torch.device) -> str:
    """The device's own name, such as that of the card or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor()


@dataclass(frozen=True, slots=True)
class CardLimits:
    """Of a card, by NVIDIA's data sheets and architecture papers.

    Attributes:
        flops: dense products in 16 bits with sums in fp32, operations a second.
        bytes: of its memory, a second.
    """

    flops: float
    bytes: float


# By a part of the card's name; the first that fits counts.
_CARDS = (
    ("H100 PCIe", CardLimits(756e12, 2.0e12)),
    ("H100 NVL", CardLimits(835e12, 3.9e12)),
    ("H200 NVL", CardLimits(835e12, 4.8e12)),
    ("H100", CardLimits(989e12, 3.35e12)),
    ("H200", CardLimits(989e12, 4.8e12)),
    ("B200", CardLimits(2250e12, 8.0e12)),
    ("A100-SXM4-80GB", CardLimits(312e12, 2.04e12)),
    ("A100", CardLimits(312e12, 1.56e12)),
    ("L40S", CardLimits(362e12, 0.86e12)),
    ("RTX 4090", CardLimits(165e12, 1.01e12)),
    ("RTX 3090", CardLimits(71e12, 0.94e12)),
)


def card_limits(name: str) -> CardLimits | None:
    """What the card of that name can do at most; None if it is not known."""
    return next((limits for part, limits in _CARDS if part in name), None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The most operations a second of the device's matrix units in `dtype`; None if unknown."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    limits = card_limits(device_name(device))
    return None if limits is None else limits.flops


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, str | int]:
    """Machine, threads and versions, as they belong beside a result; nothing personal in it."""
    found: dict[str, str | int] = {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        device = torch.device("cuda")
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda or f"ROCm {torch.version.hip}"
    versions = {name: package_version(name) for name in _PACKAGES}
    versions["torch"] = str(torch.__version__)  # says too what it is built for, "+cu130"
    return {**found, **{name: version for name, version in versions.items() if version}}


def available_cores() -> int:
    """The cores this process may use, which a container can make fewer than there are."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    # platform.processor() is empty or the bare architecture on Linux.
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
