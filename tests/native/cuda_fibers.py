"""Run the GPU kernels' own sources on the CPU: g++, cuda_fibers.h and AddressSanitizer make programs of them."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sparsec.backends.kernel import cuda

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = Path(cuda.__file__).parent
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-w", "-fsanitize=address,alignment", "-fno-sanitize-recover=all"),
    "--param=asan-stack=0",  # fibers share no stack that the sanitizer knows
]


@cache
def missing() -> str | None:
    """Why this machine cannot build the programs, or None."""
    if not shutil.which("g++"):
        return "g++ is not installed"
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        if not Path(found.strip()).is_absolute():
            return f"g++ has no {name}: install the libraries of its sanitizers"
    return None


def build(kernel: str, macros: Mapping[str, int], edited: Mapping[str, str] | None = None) -> Path:
    """The program of a variant, built unless it is there; `edited`: other texts of some sources, by name."""
    edited = edited or {}
    files = [*sorted(SOURCES.glob("*.cu*")), HERE / f"{kernel}_on_cpu.cpp", *sorted(HERE.glob("cuda_*.h"))]
    flags = [*FLAGS, *(f"-D{name}={value}" for name, value in macros.items())]
    texts = [edited.get(path.name) or path.read_text() for path in files]
    key = hashlib.sha256("\0".join([*texts, *flags]).encode()).hexdigest()[:16]
    program = ROOT / "build/native" / f"{kernel}-{key}"
    if program.is_file():
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=program.parent) as folder:
        folders = [SOURCES, HERE]
        if edited:  # all of them: a header is looked for beside who includes it first
            for path, text in zip(files, texts, strict=True):
                (Path(folder) / path.name).write_text(text)
            folders = [Path(folder)]
        made = Path(folder) / program.name
        command = ["g++", *flags, *(f"-I{one}" for one in folders), "-o", str(made), str(HERE / f"{kernel}_on_cpu.cpp")]
        subprocess.run(command, check=True, timeout=600)
        os.replace(made, program)  # whole or not there: two test processes may build at once
    return program


def launch(program: Path, numbers: Sequence[int], tables: Sequence[Tensor | None], y: Tensor) -> Tensor:
    """Run it; what is written in `y` comes back. Raises RuntimeError with what the program or the sanitizer says."""
    with tempfile.TemporaryDirectory() as folder:
        case, result = Path(folder) / "case", Path(folder) / "result"
        with case.open("wb") as file:
            file.write(struct.pack("16q", *numbers, *[0] * (16 - len(numbers))))
            for table in (*tables, y):
                raw = b"" if table is None else table.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                file.write(struct.pack("q", len(raw)) + raw)
        environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
        done = subprocess.run(
            [str(program), str(case), str(result)], env=environment, capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            raise RuntimeError(f"exit {done.returncode}: {done.stderr[:2000]}")
        return torch.frombuffer(bytearray(result.read_bytes()), dtype=y.dtype).view(y.shape)
