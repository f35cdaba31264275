"""From source to a compiled kernel: NVRTC, and a folder that remembers what it made.

NVRTC comes with torch's builds for CUDA, and so does (from CUDA 13 on) cuda-bindings, through which
it is called. What it makes is kept under a key of everything that went in, checked by a digest and
put in place in one step: processes may share the folder, and a killed one leaves nothing behind
that another would take for a kernel. Importing this module loads no compiler.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from rwkv7.files import write_atomically

from .plan import Kernel, Macros

SOURCES = Path(__file__).with_name("kernels")
FOLDER_VARIABLE = "RWKV7_CACHE_DIR"
_DIGEST = hashlib.sha256().digest_size


def architecture(capability: tuple[int, int]) -> str:
    """What kernels are compiled for on a card of that compute capability: "sm_90a", "sm_80"."""
    major, minor = capability
    # From 9.0 on an architecture has features of its own, which its "a" form lets kernels use.
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


@functools.cache
def why_not(target: str) -> str | None:
    """Why nothing can be compiled for the architecture `target` here, or None."""
    wanted = (torch.version.cuda or "").partition(".")[0]
    package = f"cuda-bindings=={wanted}.*" if wanted else "cuda-bindings"
    try:
        major, minor = _version()
        known = checked(_nvrtc().nvrtcGetSupportedArchs(), "asking NVRTC")
    except ImportError:
        return f"cuda-bindings is not installed (pip install '{package}')"
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        return f"NVRTC, the compiler that comes with torch for CUDA, is not found ({reason})"
    if wanted and str(major) != wanted:
        return f"NVRTC {major}.{minor} beside torch for CUDA {wanted} (pip install '{package}')"
    if int(target.removeprefix("sm_").rstrip("a")) not in known:
        return f"NVRTC {major}.{minor} does not know {target}; a later one may"
    return None


def compiled(kernel: Kernel, macros: Macros, target: str) -> bytes:
    """The kernel as a cubin for `target`: from the cache, or compiled (seconds) and kept there.

    Raises:
        RuntimeError: NVRTC refuses the source; its log is in the message.
    """
    try:
        folder = cache_folder()
    except RuntimeError:  # nowhere to keep it
        return compile_kernel(kernel, macros, target)[0]
    entry = folder / _entry_name(kernel, macros, target)
    if (found := _read(entry)) is not None:
        return found
    cubin, _ = compile_kernel(kernel, macros, target)
    _keep(entry, cubin)
    return cubin


def compile_kernel(kernel: Kernel, macros: Macros, target: str) -> tuple[bytes, str]:
    """The kernel as a cubin for `target`, compiled in any case, and NVRTC's log of it.

    Raises:
        RuntimeError: with the log, when it does not compile.
    """
    nvrtc = _nvrtc()
    options = _options(macros, target)
    doing = f"compiling {kernel.entry} with NVRTC ({' '.join(options)})"
    program, sources = kernel.program(macros).encode(), _sources(kernel)
    names = [name.encode() for name in sources]
    texts = [text.encode() for text in sources.values()]
    created = nvrtc.nvrtcCreateProgram(program, b"program.cu", len(names), texts, names)
    unit = checked(created, doing)
    try:
        (status,) = nvrtc.nvrtcCompileProgram(unit, len(options), [o.encode() for o in options])
        # cuda-bindings writes into the bytes that it is given.
        log = bytes(checked(nvrtc.nvrtcGetProgramLogSize(unit), doing))
        checked(nvrtc.nvrtcGetProgramLog(unit, log), doing)
        text = log.rstrip(b"\0 \n").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{doing}: {status.name}\n{text}")
        cubin = bytes(checked(nvrtc.nvrtcGetCUBINSize(unit), doing))
        checked(nvrtc.nvrtcGetCUBIN(unit, cubin), doing)
        return cubin, text
    finally:
        nvrtc.nvrtcDestroyProgram(unit)


def cache_folder() -> Path:
    """Where compiled kernels are kept: RWKV7_CACHE_DIR, or the user's folder for caches.

    Raises:
        RuntimeError: the user has no home folder.
    """
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen) / "kernels"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
    else:
        base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rwkv7" / "kernels"


def report() -> dict[str, str]:
    """The compiler, the folder of compiled kernels, and which there are for which architecture."""
    try:
        lines = {"compiler": "NVRTC {}.{}".format(*_version())}
    except (ImportError, RuntimeError, OSError) as error:
        lines = {"compiler": f"none here: {str(error).strip().splitlines()[0]}"}
    try:
        folder = cache_folder()
    except RuntimeError as error:
        return {**lines, "folder": f"none: {error} ({FOLDER_VARIABLE} names one)"}
    entries = sorted(folder.glob("*.cubin"))
    size = sum(entry.stat().st_size for entry in entries) / 2**20
    lines["folder"] = f"{folder} ({len(entries)} files, {size:.1f} MiB)"
    for entry in entries:
        name, target, *_ = entry.stem.split("-")
        lines[target] = ", ".join(filter(None, [lines.get(target), name]))
    return lines


def checked(result: tuple[Any, ...], doing: str) -> Any:
    """What a function of cuda-bindings returned after its status.

    Raises:
        RuntimeError: the status is an error; names it, and what was being done.
    """
    if int(result[0]) != 0:
        raise RuntimeError(f"{doing}: {result[0].name}")
    return result[1] if len(result) == 2 else result[1:]


def _entry_name(kernel: Kernel, macros: Macros, target: str) -> str:
    """kernel-target-macros-digest of all that goes into the cubin."""
    inputs = [kernel.program(macros), _sources(kernel), _options(macros, target), _version()]
    key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:24]
    chosen = [name.lower() for name, value in macros if value]
    return "-".join([kernel.name, target, *chosen, f"{key}.cubin"])


def _sources(kernel: Kernel) -> dict[str, str]:
    """The kernel's file and all headers, by name."""
    paths = [SOURCES / f"{kernel.name}.cu", *sorted(SOURCES.glob("*.cuh"))]
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def _options(macros: Macros, target: str) -> list[str]:
    # No fast-math: it flushes the subnormal numbers that scaled products are made of.
    return [
        f"--gpu-architecture={target}",
        "--std=c++17",
        "--ptxas-options=-v",  # registers and spills, into the log
        *(f"-D{name}={value}" for name, value in macros),
    ]


def _nvrtc() -> Any:
    from cuda.bindings import nvrtc

    return nvrtc


def _version() -> tuple[int, int]:
    version: tuple[int, int] = checked(_nvrtc().nvrtcVersion(), "asking NVRTC for its version")
    return version


def _read(entry: Path) -> bytes | None:
    """An entry's cubin; None where there is none, or one that is damaged."""
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    digest, cubin = content[:_DIGEST], content[_DIGEST:]
    return cubin if cubin and hashlib.sha256(cubin).digest() == digest else None


def _keep(entry: Path, cubin: bytes) -> None:
    def write(path: Path) -> None:
        path.write_bytes(hashlib.sha256(cubin).digest() + cubin)

    try:
        # A compiled kernel is a program: nobody else may put one here.
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(entry, write)
    except OSError as error:
        warnings.warn(
            f"a compiled kernel could not be kept, so every process compiles it anew ({error}); "
            f"{FOLDER_VARIABLE} names another folder",
            RuntimeWarning,
            stacklevel=2,
        )
