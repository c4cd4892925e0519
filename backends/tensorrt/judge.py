"""An independent judge of 2:4: `polygraphy inspect sparsity`, run as a program, its text read.

It is written in plain Python: 2 to 7 microseconds a weight.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from sparsec.backends.tensorrt.network import Product

_RUN = "import sys; from polygraphy.tools import main; sys.exit(main())"
_FOUND = re.compile(r"Found (sparse|non-sparse) tensor: (.*)")


def installed() -> bool:
    """Whether there is a judge."""
    return importlib.util.find_spec("polygraphy") is not None


def can_judge(product: Product) -> bool:
    """Whether its word on a weight counts.

    It passes over inputs that are not divisible by 4, and reads the wrong bytes of bfloat16 (0.53.6).
    """
    fits = product.node is not None and product.inputs % 4 == 0 and product.dtype in ("float", "float16")
    return fits and product.target.kind == "linear"


def judge(onnx: Path) -> dict[str, bool]:
    """Whether it finds each weight of a Gemm, MatMul or Conv 2:4, by name; all of them, dense ones too.

    Its exit status says nothing (0 either way), so its words are read.
    """
    command = [sys.executable, "-P", "-c", _RUN, "inspect", "sparsity", onnx.name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=onnx.parent, check=False)
    return read(done.stdout + done.stderr)


def read(text: str) -> dict[str, bool]:
    """What its words say, by weight.

    >>> read("[I] Found sparse tensor: up.weight\\n[W] Found non-sparse tensor: down.weight")
    {'up.weight': True, 'down.weight': False}
    """
    return {name.strip(): word == "sparse" for word, name in _FOUND.findall(text)}


def fault(found: dict[str, bool], names: Iterable[str]) -> str | None:
    """The first of these weights that it did not find 2:4, or None."""
    for name in names:
        if not found.get(name, False):
            return f"{name}: polygraphy {'finds it not 2:4' if name in found else 'does not look at it'}"
    return None
