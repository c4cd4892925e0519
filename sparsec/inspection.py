"""Look into weights that anybody wrote: which patterns their zeros form, and where they break one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec import registry, store
from sparsec.artifact import Artifact
from sparsec.backend import Check
from sparsec.errors import UsageError
from sparsec.migrating.decoding import decoded
from sparsec.migrating.stored import PICKLED, opened
from sparsec.onnxfile.opened import OnnxFile
from sparsec.onnxfile.weights import Weight, survey, weights_of
from sparsec.pattern import Pattern
from sparsec.pipeline import Progress, no_progress
from sparsec.program import FORMAT as PROGRAM_FORMAT
from sparsec.program import Program
from sparsec.sites import PRUNED_FROM, Exclusion

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.selection import Selection

_USUAL = "1:16 1:8 64:2:16 2:16 1:4 64:2:8 2:8 64:2:5 2:5 2:4 4:8"  # sparsest first, then strictest first
_CANDIDATES = tuple(map(Pattern.parse, _USUAL.split()))


@dataclass(frozen=True)
class Found:
    """What the zeros of one 2-D weight say."""

    name: str
    shape: tuple[int, ...]
    sparsity: float
    """Share of zeros."""
    pattern: Pattern | None
    """The first of the usual patterns, sparsest first, that it satisfies; of packed tables, what they say."""
    note: str = ""
    """Of an .onnx file: the operator that reads it, the type it is stored in, where the same bytes are again."""
    users: tuple[str, ...] = ()
    """The nodes of an .onnx file that read it."""

    @property
    def sparse(self) -> bool:
        """Whether somebody made it sparse."""
        return self.sparsity >= PRUNED_FROM


def weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """All 2-D floating-point weights of a Hugging Face folder, an .onnx, .safetensors or state dict's file, by name.

    Weights that another tool compressed or masked are given as its model computes with them.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist; expected an artifact, a program, a model folder, or a weights file")
    if path.suffix == ".onnx":
        yield from ((weight.name, values) for weight, values in weights_of(path))
        return
    if not any(path.glob("*.safetensors")) if path.is_dir() else path.suffix not in (".safetensors", *PICKLED):
        raise UsageError(
            f"{path}: expected an artifact, a program, a model folder with .safetensors, or a file of the kinds "
            f".safetensors, .onnx, {', '.join(PICKLED)}"
        )
    for name, tensor in decoded(opened(path)):
        if tensor.dim() == 2 and tensor.is_floating_point():
            yield name, tensor


def look(name: str, weight: Tensor) -> Found:
    """Describe one weight, (rows, cols) or (batch, rows, cols)."""
    sparsity = _zeros(weight)
    enough = [pattern for pattern in _CANDIDATES if 1 - pattern.density <= sparsity + 0.02]
    pattern = (
        next((one for one in enough if not one.violations(_matrices(weight)).count), None)
        if sparsity >= PRUNED_FROM
        else None
    )
    shape = weight.shape[1:] if weight.dim() == 3 and len(weight) == 1 else weight.shape
    return Found(name, tuple(shape), sparsity, pattern)


def _matrices(weight: Tensor) -> Tensor:
    """(batch, rows, cols)."""
    return weight if weight.dim() == 3 else weight[None]


def _zeros(weight: Tensor) -> float:
    """The share of zeros."""
    return 1 - int(weight.count_nonzero()) / weight.numel() if weight.numel() else 0.0


def check(path: Path, pattern: Pattern) -> list[Check]:
    """Whether every weight that was made sparse follows the pattern; raises UsageError when none was."""
    found = [
        _follows(name, pattern, _matrices(weight)) for name, weight in weights(path) if _zeros(weight) >= PRUNED_FROM
    ]
    if not found:
        raise UsageError(f"{path}: no weight has zeros to speak of, so there is nothing that {pattern} could hold for")
    if path.suffix == ".onnx" and (others := [one for one in survey(OnnxFile(path)).exclusions if one.role == "other"]):
        found.append(Check("not looked at", True, "; ".join(f"{one.name}: {one.reason}" for one in others)))
    return found


def _onnx(path: Path) -> tuple[list[Found], list[Exclusion]]:
    """What an .onnx file holds: its weights, and the stored matrices that are none, with their reasons."""
    file = OnnxFile(path)
    found = survey(file)
    return [_look_in(file, weight) for weight in found.weights], list(found.exclusions)


def _look_in(file: OnnxFile, weight: Weight) -> Found:
    seen = look(weight.name, weight.read(file))
    note = f"{weight.kind}{f' x{len(weight.users)}' if weight.users[1:] else ''}, {weight.dtype}"
    note += f", same bytes as {', '.join(weight.twins)}" if weight.twins else ""
    return dataclasses.replace(seen, pattern=weight.packed or seen.pattern, note=note, users=weight.users)


def inspect(path: Path) -> tuple[str, Any]:
    """What a path is: `artifact` with its manifest, `program` with the Program, or `weights` with a list of Found.

    `onnx`: an .onnx file, with a list of Found and a list of Exclusion.
    """
    if (path / store.MANIFEST).is_file():
        if store.read_manifest(path).get("format") == PROGRAM_FORMAT:
            return "program", Program.load(path)
        return "artifact", Artifact.open(path).manifest
    if path.suffix == ".onnx":
        return "onnx", _onnx(path)
    return "weights", [look(name, weight) for name, weight in weights(path)]


def findings(path: Path, manifest: dict[str, Any]) -> list[str]:
    """What was found out about an artifact after it was compiled, such as a proof of speed on somebody's GPU."""
    lines = []
    for name in manifest["backends"]:
        try:
            found = registry.backend(name).findings(path, manifest)
        except UsageError as error:  # it is not installed here; the manifest can be shown all the same
            found = [str(error)]
        lines += [f"{name}: {line}" for line in found]
    return lines


def to_json(kind: str, found: Any) -> dict[str, Any]:
    """What `inspect` found, as plain data."""
    if kind == "artifact":
        return {"manifest": found}
    if kind == "program":
        return {"facts": sorted(found.facts), "history": found.history, "dump": found.dump()}
    listed, others = found if kind == "onnx" else (found, None)
    rows = [
        {"name": f.name, "shape": f.shape, "sparsity": f.sparsity, "pattern": f.pattern and str(f.pattern)}
        | ({"note": f.note, "users": f.users} if f.note else {})
        for f in listed
    ]
    return {"weights": rows} | ({"others": [vars(one) for one in others]} if others is not None else {})


def verify(path: Path, pattern: str | None, device: str = "", progress: Progress = no_progress) -> list[Check]:
    """All checks of an artifact or program; of plain weights, the pattern of every weight that was made sparse.

    `device`: see `Artifact.compile_for`; only artifacts have kernels.
    """
    asked = Pattern.parse(pattern) if pattern else None
    if device and not (path / store.MANIFEST).is_file():
        raise UsageError(f"{path} is no artifact, so no kernels can be compiled for {device}: leave --device out")
    if (path / store.MANIFEST).is_file() and store.read_manifest(path).get("format") == PROGRAM_FORMAT:
        return _verify_program(Program.load(path), asked)
    if (path / store.MANIFEST).exists() or path.suffix == ".sparsec":
        artifact = Artifact.open(path)
        results = [Check("files", True, f"{len(artifact.manifest['files'])} files have their recorded SHA-256")]
        results += artifact.verify() + (_declared(artifact, asked) if asked else [])
        return results + ([artifact.compile_for(device, progress)] if device else [])
    if asked is None:
        next(weights(path), None)  # says what is wrong with a path that holds no weights at all
        raise UsageError(f"{path} declares no pattern; say which one must hold with --pattern, such as --pattern 2:4")
    return check(path, asked)


def _verify_program(program: Program, asked: Pattern | None) -> list[Check]:
    """Every site with a selection must be zero outside it, once its mask is folded in."""
    results = [Check("program", True, "files have their recorded SHA-256, graph and sites fit together")]
    for site in program.sites.sparse:
        required = asked or site.pattern
        if site.mask is None and required is not None and "lowered" not in program.facts:
            selection = site.selection if required == site.pattern else None
            results.append(_follows(site.name, required, site.read(program.module), selection))
    return results


def _declared(artifact: Artifact, asked: Pattern) -> list[Check]:
    sparse = [site for site in artifact.manifest["sites"] if site["pattern"]]
    found = [(site["name"], Pattern.parse(site["pattern"])) for site in sparse]
    other = [f"{name} has {pattern}" for name, pattern in found if not pattern.implies(asked)]
    return [Check(f"pattern {asked}", not other, other[0] if other else f"{len(sparse)} sites declare what implies it")]


def _follows(name: str, pattern: Pattern, weight: Tensor, selection: Selection | None = None) -> Check:
    """Whether a weight (batch, rows, cols) follows a pattern: with this selection, or with any that can be found."""
    found = pattern.violations_of(weight, selection) if selection else pattern.violations(weight)
    if found.count:
        return Check(name, False, f"{found.count} violations: {found.first[0]}")
    if selection is None and not pattern.decidable:
        selection = pattern.project(weight.abs())
        if pattern.violations_of(weight, selection).count:
            return Check(name, False, "not proven: no count is broken, but no groups of columns were found that fit")
    return Check(name, True, "holds bit for bit")
