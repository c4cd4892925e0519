"""A GPU that weights go to, and what is known of it there.

A GPU without sparse tensor cores (below sm_80) is one too: on it all weights run dense, the reference path, which is
said once.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from sparsec import semi_structured
from sparsec.backends.kernel.cuda import ceilings
from sparsec.backends.kernel.cuda.ceilings import Ceilings
from sparsec.backends.kernel.cuda.driver import no_gpu, too_old, unprepared
from sparsec.backends.kernel.install import say_once
from sparsec.cost import TokenRange
from sparsec.errors import UsageError
from sparsec.semi_structured import Compress

log = logging.getLogger("sparsec")


@dataclass(frozen=True)
class Destination:
    """Where weights go, and what decides their form."""

    device: torch.device
    table: Ceilings | None = None
    """The GPU's limits, where they are known."""
    tokens: TokenRange | None = None
    """What layers were declared to see."""
    compress: Compress | None = None
    """For torch's 2:4 product, where this torch has one."""
    too_old: str | None = None
    """Why no sparse kernel runs there."""


def destination(device: torch.device, tokens: TokenRange | None) -> Destination:
    """A GPU of this machine, by its number. Raises UsageError where it is not there, or something is not installed."""
    if reason := no_gpu():
        raise UsageError(f"{device}: {reason}")
    if reason := too_old(device.index):
        say_once(reason)
        return Destination(device, tokens=tokens, too_old=reason)
    if reason := unprepared():
        raise UsageError(f"{device}: {reason}")
    table = ceilings.of_gpu(device.index)
    if table is None:
        name = torch.cuda.get_device_name(device)
        log.warning("%s was not measured, so no layer runs dense for speed: sparsec bench --calibrate", name)
    with torch.cuda.device(device):
        return Destination(device, table, tokens, semi_structured.compressor())
