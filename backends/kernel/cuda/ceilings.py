"""What a GPU can do at most: rates of its tensor cores, shared memory, L2 cache and memory, and where they are from.

A table comes from `sparsec bench --calibrate`, which measures it (see `calibrating`) and keeps it in
$XDG_CACHE_HOME/sparsec under a name that stands for the GPU, the kernels' sources and torch; or from SHIPPED. What was
not measured is labelled "model".
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsec import store
from sparsec.backends.kernel.cuda.build import arch_of
from sparsec.backends.kernel.cuda.variants import Device
from sparsec.cost import Basis
from sparsec.errors import ArtifactError, UsageError

_FORMAT = 1
_RATES = (
    "dense_flops", "sparse_flops", "two_of_four_flops", "two_of_four_bytes", "l2_bytes", "memory_bytes",
    "launch_seconds",
)  # fmt: skip

log = logging.getLogger("sparsec")


@dataclass(frozen=True)
class Ceilings:
    """A GPU's limits, each for the whole GPU and a second. Operations: a multiplication and an addition are two."""

    gpu: str
    basis: Basis
    device: Device
    dense_flops: float
    """What torch's dense product in bf16 reaches on large weights."""
    sparse_flops: float
    """mma.sp.m16n8k32, every product of gathered columns counted, kept or not."""
    two_of_four_flops: float
    """torch's 2:4 product (cuSPARSELt), every product of the dense weight counted."""
    two_of_four_bytes: float
    """What it reads from memory where tokens are few."""
    gather_bytes: Mapping[int, float]
    """By M: what ldmatrix reads from shared memory when its 8 lines are 4 of every M. With 4 of every 4 no two of them
    are in the same banks, so gather_bytes[4] is what shared memory gives at all."""
    l2_bytes: float
    memory_bytes: float
    launch_seconds: float
    """What the smallest kernel takes in a CUDA graph."""
    mma_flops: float = 0.0
    """mma.m16n8k16 without sparsity, to compare with `sparse_flops`; no kernel uses it. 0: not known."""
    reached: Mapping[str, float] = field(default_factory=dict)
    """By kernel: the share of the roofline of these ceilings that was measured; 1 where nothing was."""

    def gather(self, m: int) -> float:
        """`gather_bytes` of the next measured M that is not larger."""
        return self.gather_bytes[max((known for known in self.gather_bytes if known <= m), default=4)]


# 132 multiprocessors at 1.755 GHz read 128 bytes of shared memory a clock; the gather's conflicts were counted in a
# simulation. The dense rate and memory were measured on an H200 once; what mma.sp, L2 and cuSPARSELt reach is assumed
# from published figures of Hopper GPUs: 0.63 to 1.26 times dense peak, 5.5 to 7.5 TB/s, 1.20 times dense where tokens
# are many and no gain worth naming where they are few.
H200 = Ceilings(
    "NVIDIA H200", "model", Device(arch="sm_90a", multiprocessors=132, shared_bytes=232448),
    dense_flops=790e12, sparse_flops=871e12, two_of_four_flops=948e12,
    two_of_four_bytes=2.6e12, gather_bytes={4: 29.7e12, 5: 15.4e12, 8: 15.0e12, 16: 12.7e12},
    l2_bytes=5.5e12, memory_bytes=4.3e12, launch_seconds=2.5e-6,
)  # fmt: skip
SHIPPED = {"h200": H200}


def named(device: str) -> Ceilings:
    """The table of a device that need not be here (`h200`), or of a GPU of this machine (`cuda`, `cuda:1`).

    Raises UsageError where there is none.
    """
    if found := SHIPPED.get(device.lower()):
        return found
    if not device.startswith("cuda"):
        raise UsageError(
            f"there is no table of device {device!r}; expected cuda or cuda:1, a GPU of this machine, or one that is "
            f"known: {', '.join(SHIPPED)}"
        )
    if not torch.cuda.is_available():
        raise UsageError(f"{device}: no CUDA GPU was found; GPUs that are known without one: {', '.join(SHIPPED)}")
    if found := of_gpu(index_of(device)):
        return found
    name = torch.cuda.get_device_name(index_of(device))
    raise UsageError(f"{device}: {name} was not measured yet; run: sparsec bench --calibrate --device {device}")


def index_of(device: str) -> int:
    """The number of a CUDA GPU of this machine. Raises UsageError where it has no such GPU."""
    try:
        index = torch.device(device).index
    except RuntimeError as error:
        raise UsageError(f"device {device!r} cannot be read; expected cuda, or cuda:1") from error
    number = torch.cuda.current_device() if index is None else index
    if number >= torch.cuda.device_count():
        raise UsageError(f"{device}: this machine has {torch.cuda.device_count()} CUDA GPUs, counted from cuda:0")
    return number


def of_gpu(index: int) -> Ceilings | None:
    """The table of a GPU of this machine: the one that was measured here, else a shipped one, else None."""
    name, device = torch.cuda.get_device_name(index), device_of(index)
    return read(cache_file(name, device)) or next(
        (one for one in SHIPPED.values() if one.gpu == name and one.device == device), None
    )


def device_of(index: int) -> Device:
    """What a GPU of this machine offers a kernel. Raises UsageError below sm_80."""
    found = torch.cuda.get_device_properties(index)
    most = found.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch does not declare it
    arch = arch_of((found.major, found.minor))
    return Device(arch=arch, multiprocessors=found.multi_processor_count, shared_bytes=most)


def cache_file(name: str, device: Device) -> Path:
    """Where the table of a GPU is kept."""
    sources = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.cu*"))]
    stands_for = [_FORMAT, name, dataclasses.astuple(device), torch.__version__, *sources]
    key = hashlib.sha256(json.dumps(stands_for).encode()).hexdigest()[:16]
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sparsec" / f"gpu-{key}.json"


def write(file: Path, table: Ceilings) -> None:
    """Keep a table. Raises UsageError where it cannot be written: it was asked for."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        store.replace_file(file, json.dumps(dataclasses.asdict(table), indent=1).encode())
    except (OSError, ArtifactError) as error:
        raise UsageError(f"the table of {table.gpu} cannot be kept: {error}; set XDG_CACHE_HOME to a folder") from error


def read(file: Path) -> Ceilings | None:
    """What `write` wrote; None where there is no file, or it holds anything else."""
    try:
        return from_data(json.loads(file.read_text()))
    except OSError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        log.info("%s is damaged, and as good as not there (%s)", file, error)
        return None


def from_data(data: dict[str, Any]) -> Ceilings:
    """A table from its fields as JSON has them; raises ValueError, TypeError or KeyError."""
    gather = {int(m): float(rate) for m, rate in data["gather_bytes"].items()}
    reached = {str(kernel): float(share) for kernel, share in data["reached"].items()}
    made = Ceilings(**{**data, "device": Device(**data["device"]), "gather_bytes": gather, "reached": reached})
    rates = [*(getattr(made, name) for name in _RATES), *gather.values(), *reached.values()]
    if 4 not in gather or made.basis not in ("measured", "model") or not all(_is_rate(one) for one in rates):
        raise ValueError("expected rates above 0")
    return made


def _is_rate(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0
