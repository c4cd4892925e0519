"""A finished artifact: open it (hashes are checked), run it, prove it. Imports torch and safetensors only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsec import registry, store
from sparsec.backend import CHECK_FILE, FORMAT, Backend, Check, CheckData, Parts
from sparsec.errors import ArtifactError, GraphError, UsageError, VerificationError
from sparsec.pipeline import Progress, no_progress


@dataclass(frozen=True)
class Artifact:
    """An opened artifact folder and its manifest."""

    root: Path
    manifest: dict[str, Any]

    @staticmethod
    def open(path: str | Path) -> Artifact:
        """Open a folder after checking every file against its hash. Raises ArtifactError naming what is wrong."""
        root = Path(path)
        if not root.exists():
            raise UsageError(f"{root} does not exist; expected an artifact folder such as minilm.sparsec")
        manifest = store.read(root, FORMAT)
        for key, kind in (("sites", list), ("backends", dict), ("inputs", list), ("recipe", dict)):
            if not isinstance(manifest.get(key), kind):
                raise ArtifactError(f"{root}: manifest.json has no {key}")
        return Artifact(root, manifest)

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends whose files it holds."""
        return tuple(self.manifest["backends"])

    def load(self, backend: str = "", trust: bool = False, device: str = "") -> Any:
        """A callable for inference: inputs by name or position -> outputs by name. Default: the first backend.

        `trust`: run code that the artifact holds, which only the tensorrt backend's does. `device`: see `load`.
        """
        one = self._backend(backend)
        if one.runs_code and not trust:
            raise UsageError(
                f"{self.root}: backend {one.name} would run {one.runs_code}, and a hash cannot tell what that does; "
                "if you know who made it, load it with trust=True"
            )
        return one.load_on(device, self.root, self.manifest) if device else one.load(self.root, self.manifest)

    def load_dense(self) -> Any:
        """The same weights unpacked and run densely: what the kernels are measured against."""
        return self._backend("kernel").load_dense(self.root, self.manifest)

    def parts(self, device: str = "cpu") -> Parts:
        """Its tensors and kernels by the names of the model it was compiled from; `attach` puts them there."""
        return self._backend("kernel").parts(self.root, self.manifest, device)

    def _backend(self, backend: str) -> Backend:
        name = backend or self.backends[0]
        if name not in self.backends:
            raise UsageError(
                f"{self.root} holds {', '.join(self.backends)}, not {name}; compile it with --backend {name}"
            )
        one = registry.backend(name)
        if reason := one.unavailable():
            raise UsageError(f"backend {name} cannot run here: {reason}")
        return one

    def compile_for(self, device: str, progress: Progress = no_progress) -> Check:
        """Compile its GPU kernels into this user's cache, so that loading it there compiles nothing; needs no GPU.

        `device`: `h200`, an architecture such as `sm_80`, or `cuda`, this machine's GPU. Raises UsageError for another,
        and where NVRTC is not installed.
        """
        return self._backend("kernel").compile_for(device, self.root, progress)

    def verify(self) -> list[Check]:
        """Prove it again from disk: patterns bit for bit, tables, kernels, outputs against the stored ones."""
        return verify_folder(self.root, self.manifest)


def verify_folder(root: Path, manifest: dict[str, Any]) -> list[Check]:
    """All checks of all backends on a folder whose hashes hold, or that has no manifest file yet."""
    check = CheckData.from_tensors(store.load_tensors(root / CHECK_FILE))
    checks: list[Check] = []
    for name in manifest["backends"]:
        one = registry.backend(name)
        if reason := one.cannot_verify():
            checks.append(Check(f"{name}: available", False, f"cannot be verified here: {reason}"))
            continue
        try:
            checks += one.verify(root, manifest, check)
        except (ArtifactError, GraphError) as error:
            checks.append(Check(f"{name}: files", False, str(error)))
    return checks


def prove_written(folder: Path, manifest: dict[str, Any]) -> None:
    """Prove from disk what was just written, and note it in the manifest. Raises VerificationError where it fails."""
    checks = verify_folder(folder, manifest)
    if bad := [check for check in checks if not check.ok]:
        raise VerificationError(f"what was written does not hold ({bad[0].name}: {bad[0].detail}); nothing was kept")
    manifest["checks"] = [{"name": check.name, "detail": check.detail} for check in checks]


def load(path: str | Path, backend: str = "", trust: bool = False, device: str = "") -> Any:
    """Load an artifact for inference: a callable, inputs by name or position -> dict of outputs by name.

    Needs neither transformers nor the model's source. Hashes, shapes and index ranges are checked before any native
    code reads a byte; raises ArtifactError when something does not hold. A TensorRT engine loads with `trust` only.
    `device`: `cuda` or `cuda:1` runs backend kernel on a GPU, from a model in bf16 or fp16; `cpu`, the default, on the
    CPU. Other backends choose themselves.
    """
    return Artifact.open(path).load(backend, trust, device)


def verify(path: str | Path) -> list[Check]:
    """Prove an artifact from disk. Raises ArtifactError when a file was changed; other findings are in the checks."""
    return Artifact.open(path).verify()
