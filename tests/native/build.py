#!/usr/bin/env python3
"""Build the CPU kernels another way, for tests. By hand, from the top folder:

    env $(python tests/native/build.py emulated) pytest -s tests/backends/kernel/cpu

sanitized: stops at the first access outside an allocation (AddressSanitizer) and the first undefined operation.
emulated: AVX-512 and VNNI in plain C++ (emulated/immintrin.h), for processors without them; AddressSanitizer too.
A library is kept in build/native until a source changes; building one takes about half a minute.
"""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal, get_args
from unittest.mock import patch

Variant = Literal["emulated", "sanitized"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)

ROOT = Path(__file__).resolve().parents[2]
EMULATED = Path(__file__).parent / "emulated"
SIMDE = Path("/usr/include/simde/x86/avx512.h")
# Python is not instrumented, so the sanitizers must be loaded first; they look for C++'s exceptions at once.
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")
# -O1 and checks as calls: in full, instrumented kernels take minutes to compile.
SANITIZED = ["-O1", "-g1", "-fsanitize=address", "--param=asan-instrumentation-with-call-threshold=0"]
FLAGS: dict[Variant, list[str]] = {
    "sanitized": [*SANITIZED, "-fsanitize=undefined", "-fno-sanitize-recover=undefined"],
    "emulated": [
        *(*SANITIZED, "--param=asan-stack=0", "-Wno-psabi", f"-I{EMULATED}"),
        "-D__builtin_cpu_supports(name)=true",  # what the library asks before it runs a level
        *("-mavx2", "-mfma", "-mf16c"),  # SIMDe must see them before g++ 12 reads the pragmas
    ],
}
# Left out of emulated files: the compiler must not use what the processor lacks.
TARGET = re.compile(r'#pragma GCC target\("[^"]*(?:avx512|avxvnni)[^"]*"\)')


def missing(variant: Variant) -> str | None:
    """Why this machine cannot build or run the variant, or None."""
    if not shutil.which("g++"):
        return "g++ is not installed"
    absent = [name for name in RUNTIMES if not Path(runtime(name)).is_absolute()]
    if absent:
        return f"g++ has no {', '.join(absent)}: install the libraries of its sanitizers"
    if variant == "emulated" and not SIMDE.is_file():
        return "SIMDe is not installed: install libsimde-dev"
    if variant == "emulated" and not re.search(r"\bavx2\b", Path("/proc/cpuinfo").read_text()):
        return "emulation needs a processor with AVX2"
    return None


def runtime(name: str) -> str:
    """Where g++ finds one of its libraries; the bare name where it does not."""
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def release(module: str = "_kernels") -> tuple[list[Path], list[Path], list[str]]:
    """The sources of a library that Python loads, the folders of their headers, and the flags of both."""
    with patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    found = next(one for one in setup.call_args.kwargs["ext_modules"] if one.name.endswith(f".{module}"))
    sources = [ROOT / source for source in found.sources]
    folders = {path.parent for path in sources} | {ROOT / folder for folder in found.include_dirs}
    return sources, sorted(folders), found.extra_compile_args


def build(variant: Variant, module: str = "_kernels") -> Path:
    """A library's variant, built unless one of these very sources is there."""
    paths, folders, flags = release(module)
    flags = [*flags, "-fPIC", *FLAGS[variant], *(f"-I{folder}" for folder in folders)]
    sources = {path: path.read_text() for path in paths}
    headers = [path.read_text() for folder in (*folders, EMULATED) for path in sorted(folder.glob("*.h"))]
    key = hashlib.sha256("\0".join([*sources.values(), *headers, *flags]).encode()).hexdigest()[:16]
    library = ROOT / "build/native" / f"{variant}-{key}.so"
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiling = []
        for path, text in sources.items():
            copy = Path(folder) / path.name
            copy.write_text(f'#line 1 "{path}"\n{TARGET.sub("", text) if variant == "emulated" else text}')
            command = ["g++", *flags, "-c", str(copy), "-o", str(copy.with_suffix(".o"))]
            compiling.append(subprocess.Popen(command))
        failed = [process.args for process in compiling if process.wait()]
        if failed:
            raise RuntimeError(f"the {variant} library does not compile: {failed}")
        objects = [str(Path(folder) / f"{path.stem}.o") for path in paths]
        linked = Path(folder) / library.name
        subprocess.run(["g++", "-shared", *flags, *objects, "-o", str(linked)], check=True)
        os.replace(linked, library)  # whole or not there: two test processes may build at once
    return library


def environment(variant: Variant) -> dict[str, str]:
    """The variables under which Python runs on the variant's library."""
    return {
        "SPARSEC_LIBRARY": str(build(variant)),
        "LD_PRELOAD": ":".join(runtime(name) for name in RUNTIMES),
        "ASAN_OPTIONS": "detect_leaks=0",  # those would be Python's
    }


def main(arguments: list[str]) -> None:
    for variant in VARIANTS:
        if arguments == [variant]:
            reason = missing(variant)
            if reason:
                sys.exit(reason)
            print(*(f"{name}={value}" for name, value in environment(variant).items()))
            return
    sys.exit(f"expected one of {', '.join(VARIANTS)}, found {arguments}")


if __name__ == "__main__":
    main(sys.argv[1:])
