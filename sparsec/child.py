"""Jobs that run in a process of their own: what they take is given back when they end, and a crash ends them only.

A job is a module with `main`, run as `python -m MODULE ARGUMENTS`; its last line on stdout is a JSON object: what it
found, or `error` and `kind`, the name of one of sparsec's errors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsec import errors


def run(module: str, arguments: Sequence[str], what: str, advice: str, cwd: Path | None = None) -> dict[str, Any]:
    """What the job reports. Raises the error it reports, or ArtifactError where it died: `what` it is, `advice`."""
    # -P: a file in the current folder must not be taken for a package.
    command = [sys.executable, "-P", "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), cwd=cwd, check=False)
    try:
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise errors.ArtifactError(f"{what} {_death(done)}; {advice}") from None
    if message := report.get("error"):
        raise getattr(errors, report["kind"], errors.ArtifactError)(message)
    return report


def _environment() -> dict[str, str]:
    """The child finds the packages that this process found, and computes on as many threads."""
    import torch

    paths = [os.path.abspath(path) for path in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(torch.get_num_threads())}


def _death(process: subprocess.CompletedProcess[str]) -> str:
    if process.returncode < 0:
        return f"was ended by signal {-process.returncode}, perhaps for want of memory"
    lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
    return f"ended with status {process.returncode}: {lines[-1] if lines else 'it said nothing'}"
