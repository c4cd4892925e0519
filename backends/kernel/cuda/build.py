"""Compile a variant of a kernel for a GPU with NVRTC. Needs neither a GPU nor the CUDA toolkit, only the extra `cuda`.

A compiled kernel (cubin) is kept in $XDG_CACHE_HOME/sparsec/cubins, under a name that stands for its sources, macros,
GPU and compiler; artifacts never hold one. A file that is not what was written is compiled again.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from sparsec.errors import UsageError

FIRST_CAPABILITY = (8, 0)  # Ampere: the first GPUs with sparse tensor cores
_FOLDER = Path(__file__).parent
_OPTIONS = ("--std=c++17", "--ptxas-options=-v")
_DIGEST = hashlib.sha256().digest_size

log = logging.getLogger("sparsec")


def arch_of(capability: tuple[int, int]) -> str:
    """NVRTC's name of a GPU: sm_80, sm_90a. Raises UsageError below sm_80."""
    major, minor = capability
    if capability < FIRST_CAPABILITY:
        raise UsageError(
            f"this GPU has compute capability {major}.{minor}; sparse tensor cores come with 8.0 (Ampere): find a "
            'newer GPU, or use the CPU (device="cpu"), which has sparse kernels too'
        )
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


@cache
def unavailable() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        _nvrtc().nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        return (
            f"the GPU kernels are compiled where they run, and NVRTC is not there ({' '.join(str(error).split())}): "
            "pip install 'sparsec[cuda]'"
        )
    return None


def cuda_version() -> tuple[int, int]:
    """The CUDA version that NVRTC compiles for. Raises UsageError where nothing can be compiled."""
    if reason := unavailable():
        raise UsageError(reason)
    _, major, minor = _nvrtc().nvrtcVersion()
    return major, minor


def cubin(kernel: str, macros: Mapping[str, int], arch: str) -> bytes:
    """The kernel `kernel`.cu for a GPU, from the cache if it is there. Raises UsageError where it cannot be made."""
    file = cache_file(kernel, macros, arch)
    found = _read(file)
    if found is None:
        found = compile_kernel(kernel, macros, arch).cubin
        _write(file, found)
    return found


class Compiled(NamedTuple):
    """What a GPU runs, the PTX that it was assembled from, and what the assembler says about registers."""

    cubin: bytes
    ptx: str
    log: str


def compile_kernel(kernel: str, macros: Mapping[str, int], arch: str) -> Compiled:
    """Compile for a GPU. Raises UsageError with the compiler's words."""
    if reason := unavailable():
        raise UsageError(reason)
    nvrtc, found = _nvrtc(), sources(kernel)
    names, texts = [name.encode() for name in found], [text.encode() for text in found.values()]
    options = [f"--gpu-architecture={arch}", *_OPTIONS, *_defines(macros)]
    _, program = nvrtc.nvrtcCreateProgram(texts[0], names[0], len(names) - 1, texts[1:], names[1:])
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        words = _text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode().strip("\0 \n")
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            said = " ".join(words.split())[:1000] or result.name
            raise UsageError(f"{kernel}.cu does not compile for {arch}: {said}; update nvidia-cuda-nvrtc")
        ptx = _text(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX).decode().rstrip("\0")
        return Compiled(_text(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), ptx, words)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def sources(kernel: str) -> dict[str, str]:
    """The kernel's source, then all headers, by name."""
    files = [_FOLDER / f"{kernel}.cu", *sorted(_FOLDER.glob("*.cuh"))]
    return {file.name: file.read_text() for file in files}


def cache_file(kernel: str, macros: Mapping[str, int], arch: str) -> Path:
    """Where a cubin is kept."""
    version = None if unavailable() else cuda_version()
    stands_for = [sources(kernel), _defines(macros), arch, _OPTIONS, version]
    key = hashlib.sha256(json.dumps(stands_for).encode()).hexdigest()[:24]
    return cache_folder() / f"{kernel}-{arch}-{key}"


def cache_folder() -> Path:
    """Where this user's cubins are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sparsec" / "cubins"


def _defines(macros: Mapping[str, int]) -> list[str]:
    return [f"-D{name}={value}" for name, value in sorted(macros.items())]


def _text(program: Any, size_of: Any, read: Any) -> bytes:
    _, size = size_of(program)
    read(program, found := bytearray(size))
    return bytes(found)


def _nvrtc() -> Any:
    return importlib.import_module("cuda.bindings.nvrtc")


def _read(file: Path) -> bytes | None:
    """What `_write` wrote, or None."""
    try:
        raw = file.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(raw[_DIGEST:]).digest() != raw[:_DIGEST]:
        log.info("%s is damaged and will be compiled again", file)
        return None
    return raw[_DIGEST:]


def _write(file: Path, found: bytes) -> None:
    """Replace the file in one step; a folder that cannot be written costs another compilation, nothing else."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as scratch:
            scratch.write(hashlib.sha256(found).digest() + found)
        os.replace(scratch.name, file)
    except OSError as error:
        log.info("%s cannot be written, so the kernel is compiled again next time (%s)", file, error)
