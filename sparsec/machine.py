"""What the figures of a measurement hold for: processor, instruction sets, versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsec import registry
from sparsec.version import __version__


def facts() -> dict[str, Any]:
    """What the figures hold for."""
    import torch

    facts = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "kernels": registry.backend("kernel").instruction_set() or "none",
        "torch": torch.__version__,
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        "sparsec": __version__,
    }
    try:
        import onnxruntime
    except ImportError:
        return facts
    return {**facts, "onnxruntime": onnxruntime.__version__}


def caution(machine: Mapping[str, Any], threads: Sequence[int]) -> str | None:
    """Why these wall times are not to be believed: other programs held the cores when measuring began."""
    if max(threads) == 1 or machine["load"] + max(threads) <= machine["cores"] + 0.5:
        return None
    return (
        f"the load was {machine['load']} on {machine['cores']} cores when measuring began: the wall times of several "
        "threads tell about the other programs; measure again on an idle machine"
    )


def line(machine: Mapping[str, Any], threads: Sequence[int]) -> str:
    """`AMD EPYC, 2 cores; threads 1, 2; kernels avx2; torch 2.13.0 (AVX2), onnxruntime 1.31.1; sparsec 0.1.0`."""
    counts = ", ".join(map(str, dict.fromkeys(threads)))
    others = f", onnxruntime {machine['onnxruntime']}" if "onnxruntime" in machine else ""
    return (
        f"{machine['processor']}, {machine['cores']} cores; threads {counts}; kernels {machine['kernels']}; "
        f"torch {machine['torch']} ({machine['torch_kernels']}){others}; sparsec {machine['sparsec']}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
