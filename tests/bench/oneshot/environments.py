"""One virtual environment a peer: they exclude each other, and sparsec's transformers too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"
REQUIREMENTS = {
    "llmc": ("llmcompressor==0.14.0.1",),
    "modelopt": ("nvidia-modelopt==0.47.0", "requests", "transformers>=5,<6"),
    "onnxsim": ("onnxsim==0.8.1", "transformers>=5,<6"),
}
_PROBE = "import sys, importlib.metadata as m; print([m.version(name) for name in sys.argv[1:]])"


class UnavailableError(Exception):
    """A peer that cannot be run here, with the reason."""


def python_of(tool: str, folder: Path) -> Path:
    """The Python of a tool's environment under `folder`, installed when it is not there. Raises UnavailableError."""
    if tool == "sparsec":
        return Path(sys.executable)
    place = folder / tool
    python, packages = place / "bin" / "python", REQUIREMENTS[tool]
    if _has(python, packages):
        return python
    print(f"installing {', '.join(packages)} in {place}", file=sys.stderr)
    _run(sys.executable, "-m", "venv", str(place))
    for wanted in ((TORCH,), packages):  # torch first, so that the peer does not choose its own
        _run(str(python), "-m", "pip", "install", "--quiet", *wanted)
    if not _has(python, packages):
        raise UnavailableError(f"{tool}: {', '.join(packages)} could be installed in {place}, but not be found there")
    return python


def _has(python: Path, packages: tuple[str, ...]) -> bool:
    """Whether all packages are there, those with a fixed version in that one."""
    if not python.exists():
        return False
    names = [package.partition("==")[0].split(">=")[0] for package in packages]
    done = subprocess.run([python, "-c", _PROBE, *names], capture_output=True, text=True)
    found = done.stdout.strip("[]\n").replace("'", "").split(", ")
    return done.returncode == 0 and all(
        "==" not in package or package.endswith(f"=={version}")
        for package, version in zip(packages, found, strict=True)
    )


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnavailableError(f"{' '.join(command[1:])} failed: {last}")
