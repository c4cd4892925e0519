"""What a GPU will run: the instructions of a compiled kernel, where the wheel nvidia-cuda-nvdisasm is installed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile


@cache
def disassembler() -> Path | None:
    """Where nvdisasm is, or None."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    return next((found for folder in folders or () for found in Path(folder).glob("cu*/bin/nvdisasm")), None)


def instructions(cubin: bytes) -> list[str]:
    """Those of all its functions, with their operands. Needs a `disassembler`."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(disassembler()), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"^ +/\*[0-9a-f]{4,}\*/ +(.*?) *;", text, re.MULTILINE)
