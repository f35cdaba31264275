"""The host side of the backend `cuda` without a GPU: what is kept of compiled kernels, what a
launch hands to the driver, and which calls and cards are refused."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rwkv7.wkv7.backends import cuda
from rwkv7.wkv7.backends.cuda import CudaBackend, compiler, launch, plan
from rwkv7.wkv7.contract import Call

FORWARD = plan.KERNELS[0]
MACROS = (("INPUT_FP16", 0), ("W_FP32", 0), ("LOGIT", 1), ("PACKED", 0), ("SAVE", 0))


@pytest.fixture
def compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An empty cache, and a compiler that only notes what it was asked for."""
    asked: list[str] = []

    def compile_kernel(kernel: plan.Kernel, macros: plan.Macros, target: str) -> tuple[bytes, str]:
        asked.append(f"{kernel.name} {target}")
        return f"cubin {len(asked)}".encode(), ""

    monkeypatch.setenv(compiler.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(compiler, "compile_kernel", compile_kernel)
    monkeypatch.setattr(compiler, "_version", lambda: (13, 0))
    return asked


def entries() -> list[Path]:
    return sorted(compiler.cache_folder().iterdir())


def get(target: str = "sm_90a", macros: plan.Macros = MACROS) -> bytes:
    return compiler.compiled(FORWARD, macros, target)


def test_a_kernel_is_compiled_once(compilations: list[str]) -> None:
    assert get() == get() == b"cubin 1"
    assert len(compilations) == 1 and len(entries()) == 1


def test_everything_that_goes_in_is_in_the_key(
    compilations: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get()
    get("sm_80")
    get(macros=(("INPUT_FP16", 1), *MACROS[1:]))
    monkeypatch.setattr(compiler, "_version", lambda: (13, 1))
    get()
    for path in compiler.SOURCES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)
    get()
    assert len(compilations) == 4  # the same source from another folder is the same
    with (tmp_path / "warp.cuh").open("a") as header:
        header.write("// changed\n")
    get()
    assert len(compilations) == 5
    assert len(entries()) == 5


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_entry_is_compiled_anew(compilations: list[str], damage: bytes | None) -> None:
    whole = get()
    (entry,) = entries()
    content = bytearray(entry.read_bytes())
    content[-1] ^= 1
    entry.write_bytes(bytes(content) if damage is None else damage)
    assert get() != whole and len(compilations) == 2
    assert get() == b"cubin 2" and len(compilations) == 2


def test_a_folder_that_cannot_be_written_only_warns(
    compilations: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(compiler.FOLDER_VARIABLE, str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match=compiler.FOLDER_VARIABLE):
        assert get() == b"cubin 1"


PROGRAM = f"""
import sys
from rwkv7.wkv7.backends.cuda import compiler, plan
def compile_kernel(kernel, macros, target):
    print("compiling", flush=True)
    sys.stdin.readline()
    return b"x" * 1_000_000, ""
compiler.compile_kernel, compiler._version = compile_kernel, lambda: (13, 0)
print(len(compiler.compiled(plan.KERNELS[0], {MACROS}, "sm_90a")), flush=True)
"""


def process(folder: Path) -> subprocess.Popen[str]:
    """Another process that gets the kernel; if it compiles, until it is told a line."""
    environment = os.environ | {compiler.FOLDER_VARIABLE: str(folder)}
    command = [sys.executable, "-c", PROGRAM]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)


def test_processes_share_the_folder(tmp_path: Path) -> None:
    """Two at once, one killed while it compiles; then one that finds what they left."""
    *both, killed = [process(tmp_path) for _ in range(3)]
    for one in (*both, killed):
        assert one.stdout is not None and one.stdout.readline() == "compiling\n"
    killed.kill()
    killed.communicate()
    for one in both:
        assert one.communicate("go on\n")[0] == "1000000\n" and one.returncode == 0
    folder = tmp_path / "kernels"
    assert [path.suffix for path in folder.iterdir()] == [".cubin"]
    last = process(tmp_path)
    assert last.communicate("go on\n")[0] == "1000000\n"  # without compiling


class Driver:
    """Stands for cuda.bindings.driver: notes what it is told."""

    class CUresult(enum.IntEnum):
        CUDA_SUCCESS = 0
        CUDA_ERROR_INVALID_CONTEXT = 201
        CUDA_ERROR_INVALID_IMAGE = 200

    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared",
        CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT="carveout",
    )

    def __init__(self, context: int) -> None:
        self.context = context
        self.device = 0  # torch's current one
        self.launched_on: list[int] = []
        self.told: list[tuple[Any, ...]] = []
        self.arguments: list[int] = []

    def note(self, *what: Any, gives: Any = None) -> tuple[Any, ...]:
        self.told.append(what)
        return (self.CUresult.CUDA_SUCCESS,) if gives is None else (self.CUresult(0), gives)

    def CUdevice(self, index: int) -> int:
        return index

    def cuCtxGetCurrent(self) -> tuple[Any, ...]:
        return self.CUresult(0), self.context

    def cuDevicePrimaryCtxRetain(self, index: int) -> tuple[Any, ...]:
        return self.note("retain", index, gives=7)

    def cuCtxSetCurrent(self, context: int) -> tuple[Any, ...]:
        self.context = context
        return self.note("current", context)

    def cuModuleLoadData(self, cubin: bytes) -> tuple[Any, ...]:
        if cubin == b"bad":
            return self.CUresult.CUDA_ERROR_INVALID_IMAGE, 0
        return self.note("load", cubin, gives="module")

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[Any, ...]:
        return self.note("function", module, name, gives="function")

    def cuFuncSetAttribute(self, *what: Any) -> tuple[Any, ...]:
        return self.note("attribute", *what)

    def cuLaunchKernel(self, *how: Any) -> tuple[Any, ...]:
        if self.context == 0:
            return (self.CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        slots = ctypes.cast(how[9], ctypes.POINTER(ctypes.POINTER(ctypes.c_uint64)))
        self.arguments = [slots[i][0] for i in range(3)]
        self.launched_on.append(self.device)
        return self.note("launch", *how[:9])


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """A card of compute capability 9.0 whose context this thread has not opened."""
    driver = Driver(context=0)

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        before, driver.device = driver.device, wanted.index
        yield
        driver.device = before

    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: driver.device)
    # A torch without CUDA lacks it.
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: 42 + index, raising=False
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(compiler, "compiled", lambda kernel, macros, target: target.encode())
    launch.load.cache_clear()
    yield driver
    launch.load.cache_clear()


def test_a_launch(card: Driver) -> None:
    device = torch.device("cuda", 1)
    for _ in range(2):
        launch.launch(FORWARD, MACROS, device, [(12, (2**63, 0, 65))])
    shared = FORWARD.shared_bytes(MACROS)
    started = ("launch", "function", 12, 1, 1, FORWARD.threads, 1, 1, shared, 43)
    assert card.told == [
        ("retain", 1),
        ("current", 7),
        ("load", b"sm_90a"),
        ("function", "module", b"wkv7_forward"),
        ("attribute", "function", "shared", shared),
        ("attribute", "function", "carveout", 100),
        started,
        started,
    ]
    assert card.arguments == [2**63, 0, 65]
    assert card.launched_on == [1, 1] and card.device == 0


def test_a_launch_from_a_thread_without_a_context(card: Driver) -> None:
    device = torch.device("cuda", 0)
    launch.launch(FORWARD, MACROS, device, [(1, (1, 2, 3))])
    card.context, card.told[:] = 0, []
    launch.launch(FORWARD, MACROS, device, [(1, (1, 2, 3))])
    assert [what[0] for what in card.told] == ["retain", "current", "launch"]


def test_a_launch_while_another_thread_starts_one(
    card: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own arguments: cuda-bindings lets other threads run while the driver reads."""
    start, found, device = card.cuLaunchKernel, [], torch.device("cuda", 0)

    def interrupted(*how: Any) -> tuple[Any, ...]:
        if not found:
            found.append(None)
            other = threading.Thread(
                target=launch.launch, args=(FORWARD, MACROS, device, [(1, (7, 8, 9))])
            )
            other.start()
            other.join()
        result = start(*how)
        found.append(card.arguments)
        return result

    monkeypatch.setattr(card, "cuLaunchKernel", interrupted)
    launch.launch(FORWARD, MACROS, device, [(1, (1, 2, 3))])
    assert found[1:] == [[7, 8, 9], [1, 2, 3]]


def test_what_the_driver_refuses_is_said(card: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "compiled", lambda kernel, macros, target: b"bad")
    with pytest.raises(RuntimeError, match="loading wkv7_forward for sm_90a.*INVALID_IMAGE"):
        launch.launch(FORWARD, MACROS, torch.device("cuda", 0), [(1, (1, 2, 3))])


def call(
    dtype: torch.dtype = torch.bfloat16, decay: str = "logit", K: int = 64, V: int = 64
) -> Call:
    key, value = (torch.zeros(1, 1, 1, size, dtype=dtype) for size in (K, V))
    return Call(key, key, key, value, key, key, None, decay, None)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (call(torch.float32), "float32"),
        (call(K=32, V=32), "K = 32"),
        (call(V=32), "V = 32"),
        (call(decay="log"), "log_bounded"),
        (call(), None),
        (call(K=128, V=128), None),
    ],
)
def test_calls_that_no_kernel_takes(asked: Call, reason: str | None) -> None:
    found = plan.refuses(asked)
    assert found is None if reason is None else found is not None and reason in found
    assert "needs an NVIDIA GPU" in str(CudaBackend().refuses(asked))


@pytest.mark.parametrize(
    ("capability", "kib", "head", "reason"),
    [
        ((7, 5), 64, 64, "compute capability"),
        ((8, 6), 99, 64, "121 KiB of shared memory a block at K = V = 64, this card has 99"),
        ((8, 0), 163, 64, "not for sm_80"),
        ((8, 0), 163, 128, "221 KiB of shared memory a block at K = V = 128, this card has 163"),
        ((9, 0), 227, 128, "not for sm_90a"),
    ],
)
def test_cards_that_are_refused(
    capability: tuple[int, int], kib: int, head: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(launch, "card", lambda device: plan.Card(108, kib * 1024))
    monkeypatch.setattr(compiler, "why_not", lambda target: f"not for {target}")
    found = cuda._card_refuses.__wrapped__(0, head)
    assert found is not None and reason in found


def test_without_the_compiler_the_reason_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "cuda-bindings==12.*" in str(compiler.why_not.__wrapped__("sm_90a"))
    assert "none here" in compiler.report()["compiler"]


def test_an_nvrtc_of_another_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    nvrtc = SimpleNamespace(
        nvrtcVersion=lambda: (0, 13, 1), nvrtcGetSupportedArchs=lambda: (0, [80, 90])
    )
    monkeypatch.setattr(compiler, "_nvrtc", lambda: nvrtc)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "NVRTC 13.1 beside torch for CUDA 12" in str(compiler.why_not.__wrapped__("sm_90a"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert compiler.why_not.__wrapped__("sm_90a") is None
    assert "does not know sm_100a" in str(compiler.why_not.__wrapped__("sm_100a"))


@pytest.mark.parametrize(
    ("sizes", "way"),
    [
        ((8, 4096, 64, 64), "walk"),
        ((1, 200, 4, 64), "walk"),
        ((8, 4096, 12, 64), "relay"),
        ((1, 8192, 32, 64), "relay"),
        ((1, 8192, 32, 128), "relay"),
        ((1, 65536, 32, 64), "segments"),
    ],
)
def test_how_calls_are_walked(sizes: tuple[int, ...], way: str) -> None:
    """By shape and card; inside `batch_invariant()` and packed, one walk a sequence and head."""
    card = plan.Card(132, 227 * 1024)
    x = torch.empty(sizes, dtype=torch.bfloat16, device="meta")
    call = Call(x, x, x, x, x, x, None, "logit", None)
    slabs, tokens = plan.slabs(call, card), plan.segment(call, card)
    assert (bool(slabs), tokens is not None) == (way == "relay", way == "segments")
    assert not slabs or sum(slabs) == -(-sizes[1] // 64)
    for other in (replace(call, invariant=True), replace(call, cu_seqlens=torch.tensor([0, 9]))):
        assert not plan.slabs(other, card) and plan.segment(other, card) is None
