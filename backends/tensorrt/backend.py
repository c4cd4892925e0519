"""The TensorRT backend: an engine that may use sparse kernels, and a table of what is known about each layer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sparsec.backend import Backend, Check, CheckData, Emitted, Verdict
from sparsec.backends.tensorrt import building, profiles
from sparsec.backends.tensorrt.driver import Choice, Driver, Precision, Settings, choose, gpus
from sparsec.backends.tensorrt.held import count
from sparsec.backends.tensorrt.layers import NOT_BUILT, RTX_CANNOT_SAY, Row, summary, table, to_json
from sparsec.backends.tensorrt.log import parse
from sparsec.backends.tensorrt.network import TWO_OF_FOUR, Network, targets_of
from sparsec.backends.tensorrt.script import script
from sparsec.errors import RecipeError, UsageError
from sparsec.intersection import towards_2_4
from sparsec.recipe import make_backend

if TYPE_CHECKING:
    from sparsec.backends.tensorrt.session import TensorRTModule
    from sparsec.cost import TokenRange
    from sparsec.layout import Values
    from sparsec.program import Program

FOLDER, MODEL, SCRIPT = "tensorrt", "model.onnx", "build.sh"
ENGINE, LOG, TABLE = "model.engine", "build.log", "layers.json"
_KERNELS = {"rtx": "what RTX picks", "tensorrt": "what TensorRT picks", "none": "nothing yet"}


@dataclass(frozen=True)
class TensorRTBackend(Backend):
    """A folder `tensorrt/`: the dense ONNX file with exact zeros, an engine, its build log, the layer table, build.sh.

    1. TensorRT accelerates one pattern, 2:4 along the inputs; a site of a pattern that is not 2:4 too is refused.
    2. Nothing is claimed that the build log does not say. Without an engine the table says so.
    3. The engine is native code: it runs only where the artifact's maker is trusted.
    """

    name: ClassVar[str] = "tensorrt"
    describes: ClassVar[str] = (
        "a TensorRT or TensorRT-RTX engine that may use 2:4 kernels, and what is known of each layer"
    )
    runs_code: ClassVar[str | None] = "a TensorRT engine, which is native code for the GPU"

    driver: Choice = "auto"
    """tensorrt, rtx, none (ONNX file and build.sh only), or auto: the first of the two that can build here."""
    precision: Precision = "model"
    """fp16 or bf16 lets TensorRT 10 use it beside the model's own type; others take --dtype."""
    sizes: str = ""
    """smallest:usual:largest of dynamic sizes, as `batch=1:8:32 length=1:128:512`; default: the model's limits."""
    workspace_mb: int = 0
    timing_cache: str = ""
    """A file NAME.cache that is read and replaced; builds on the same GPU are then faster."""
    refit: bool = False
    strip: bool = False
    """Leave the weights out of the engine; it must be refitted before it runs."""

    def __post_init__(self) -> None:
        profiles.read(self.sizes)
        if self.workspace_mb < 0:
            raise RecipeError(f"backend tensorrt: workspace_mb is {self.workspace_mb}; expected 0 (no limit) or more")
        if self.timing_cache and not self.timing_cache.endswith(".cache"):  # it is replaced, whatever it was
            raise RecipeError(f"backend tensorrt: timing_cache is {self.timing_cache!r}; expected a name on .cache")

    def unavailable(self) -> str | None:
        """None, or what to install."""
        try:
            driver = choose(self.driver)
        except UsageError as error:
            return str(error)
        return (self._misfit(driver) if driver else None) or _onnx().unavailable()

    def _misfit(self, driver: Driver) -> str | None:
        """Why the driver cannot do what the options ask for."""
        if self.precision != "model" and driver.strongly_typed:
            return (
                f"{driver.name} {driver.version} computes in the types of the model, so precision={self.precision} "
                f"means nothing to it; use --dtype {self.precision} instead"
            )
        if driver.name == "rtx" and self.timing_cache:
            return "TensorRT-RTX times nothing while it builds, so a timing_cache has no use; leave it out"
        if driver.name == "rtx" and (self.refit or self.strip) and not gpus():
            return "TensorRT-RTX needs a GPU to build an engine for refit=true or strip=true; leave them out"
        return None

    def cannot_verify(self) -> str | None:
        """Verification reads the ONNX file and the log, so it needs no TensorRT."""
        return _onnx().unavailable()

    def refuses(self, program: Program) -> str | None:
        """Patterns without a kernel (rule 1), sizes that do not fit, and what the ONNX backend refuses."""
        for site in program.sites.sparse:
            if site.pattern is not None and not site.pattern.implies(TWO_OF_FOUR):
                return (
                    f"{site.name}: TensorRT accelerates only 2:4, found {site.pattern}; {towards_2_4(site.pattern)}, "
                    "or leave the site dense with --ignore"
                )
        return profiles.misfit(profiles.read(self.sizes), program) or _onnx().refuses(program)

    def plan(self, program: Program, values: Values = "fp32", tokens: TokenRange | None = None) -> tuple[Verdict, ...]:
        """What is known before a build: TensorRT decides while it builds, and TensorRT-RTX when it runs."""
        driver = choose(self.driver)
        name = driver.name if driver else "none"
        reasons = {"rtx": RTX_CANNOT_SAY, "none": NOT_BUILT}
        reason = reasons.get(name, "TensorRT takes sparse kernels where they time faster than dense ones")
        return tuple(Verdict(site.name, False, _KERNELS[name], reason) for site in program.sites.sparse)

    def emit(self, program: Program, folder: Path, values: Values = "fp32") -> Emitted:
        """Write `tensorrt/` of a frozen program."""
        if reason := self.refuses(program):  # a pass may have chosen the patterns
            raise UsageError(f"backend tensorrt cannot write this model: {reason}")
        driver, out = choose(self.driver), folder / FOLDER
        out.mkdir()
        exported = _onnx().emit(program, out, values)
        settings = self._settings(driver, program)
        (out / SCRIPT).write_text(script(MODEL, settings))
        built = building.run(settings, out / MODEL, out / ENGINE, out / LOG) if driver else {}
        rows = read_table(out, program, driver.name if driver else "none", self.precision)
        (out / TABLE).write_text(json.dumps(to_json(rows), indent=1) + "\n")
        facts = {
            "driver": driver.name if driver else "none",
            **built,
            "precision": self.precision,
            "shapes": settings.shapes,
            "strip": self.strip,
            "layers": summary(rows),
            "held": self._held(out, program, driver),
            "note": _note(driver, rows),
            "needs_trust": driver is not None,  # to load it, which the model card says
            "onnx": exported.data,
        }
        verdicts = _verdicts(rows) if driver and driver.name == "tensorrt" else ()
        return Emitted(exported.nbytes_sparse, sum(path.stat().st_size for path in out.iterdir()), facts, verdicts)

    def _held(self, out: Path, program: Program, driver: Driver | None) -> int | None:
        """How many sparse weights the engine's bytes show; verify must find as many. None: not to be seen."""
        if driver is None or driver.name != "rtx" or self.strip:
            return None
        sparse = [target for target in targets_of(program) if target.pattern]
        return count(out / ENGINE, Network(out / MODEL).weights(sparse))

    def _settings(self, driver: Driver | None, program: Program) -> Settings:
        sizes = profiles.ranges(profiles.read(self.sizes), program)
        cache = str(Path(self.timing_cache).absolute()) if self.timing_cache else ""
        shapes = profiles.shapes(sizes, program)
        name = driver.name if driver else "tensorrt"
        return Settings(name, True, self.precision, self.workspace_mb, shapes, cache, self.refit, self.strip)

    def verify(self, folder: Path, manifest: dict[str, Any], check: CheckData) -> list[Check]:
        """Re-read the ONNX file, the log, the table and the engine's bytes; the engine itself is not run."""
        from sparsec.backends.tensorrt.checks import verify

        return verify(folder / FOLDER, manifest, check)

    def load(self, folder: Path, manifest: dict[str, Any]) -> TensorRTModule:
        """The engine on the GPU: inputs by position or name -> outputs by name."""
        from sparsec.backends.tensorrt.session import open_engine

        return open_engine(folder / FOLDER / ENGINE, manifest)

    def findings(self, folder: Path, manifest: dict[str, Any]) -> list[str]:
        """What `prove` found on somebody's GPU."""
        from sparsec.backends.tensorrt.proof import words

        return words(folder / FOLDER)


def read_table(folder: Path, program: Program, built: Any, precision: str) -> list[Row]:
    """The layer table of the files in `tensorrt/`."""
    log = parse((folder / LOG).read_text(errors="replace") if (folder / LOG).is_file() else "")
    return table(Network(folder / MODEL).products(targets_of(program)), log, built, precision)


def _onnx() -> Backend:
    return make_backend("onnx{weights=dense}")


def _note(driver: Driver | None, rows: list[Row]) -> str:
    """The sentence that every report of the artifact shows."""
    if driver is None:
        return NOT_BUILT
    return RTX_CANNOT_SAY if driver.name == "rtx" else f"as TensorRT's build log says, {summary(rows)}"


def _verdicts(rows: list[Row]) -> tuple[Verdict, ...]:
    """What the build decided for each site; several products with one weight must all be sparse."""
    found = []
    for site in dict.fromkeys(row.site for row in rows if row.pattern):
        mine = [row for row in rows if row.site == site]
        dense = next((row for row in mine if not row.chosen), None)
        kernel = "dense" if dense else mine[0].tactic or "a sparse kernel"
        found.append(Verdict(site, dense is None, kernel, dense.why if dense else ""))
    return tuple(found)
