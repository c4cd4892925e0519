"""One interface over TensorRT (10, 11: builds on the GPU it is for) and TensorRT-RTX (builds anywhere).

Both have the same Python API; what differs is here:

1. TensorRT-RTX and TensorRT 11 are strongly typed: they compute in the types of the ONNX file. TensorRT 10 may also be
   told to use fp16 or bf16 where it is faster.
2. TensorRT times kernels while it builds, so it needs a GPU then. TensorRT-RTX needs one only to run.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparsec.errors import ArtifactError, UsageError
from sparsec.store import replace_file

Choice = Literal["auto", "tensorrt", "rtx", "none"]
Precision = Literal["model", "fp16", "bf16"]
INSTALL = {
    "rtx": "pip install 'sparsec[rtx]' (95 MB; builds without a GPU)",
    "tensorrt": "pip install 'sparsec[tensorrt]' on a machine with an NVIDIA GPU",
}
_MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
_SEVERITIES = {"INTERNAL_ERROR": "F", "ERROR": "E", "WARNING": "W", "INFO": "I", "VERBOSE": "V"}  # as trtexec writes


@dataclass(frozen=True)
class Driver:
    """An installed TensorRT."""

    name: Literal["tensorrt", "rtx"]

    def module(self) -> Any:
        """The Python package. Raises UsageError where it cannot be loaded."""
        try:
            return importlib.import_module(_MODULES[self.name])
        except (ImportError, OSError) as error:
            raise UsageError(f"{_MODULES[self.name]} cannot be loaded: {error}; {INSTALL[self.name]}") from error

    @property
    def version(self) -> str:
        """Such as 10.13.2 or 1.7.1.116."""
        return str(self.module().__version__)

    @property
    def strongly_typed(self) -> bool:
        """Whether types are the ONNX file's, and nothing else can be asked for (rule 1)."""
        return self.name == "rtx" or int(self.version.partition(".")[0]) >= 11

    def cannot_build(self) -> str | None:
        """Why it cannot build here, or None (rule 2)."""
        if importlib.util.find_spec(_MODULES[self.name]) is None:
            return f"{_MODULES[self.name]} is not installed; {INSTALL[self.name]}"
        if self.name == "tensorrt" and not gpus():
            return "TensorRT times kernels on the GPU it builds for, and there is none here; " + INSTALL["rtx"]
        return None


def choose(choice: Choice) -> Driver | None:
    """The driver to build with, None for `none`. Raises UsageError saying what to install."""
    if choice == "none":
        return None
    names: list[Literal["tensorrt", "rtx"]] = ["tensorrt", "rtx"] if choice == "auto" else [choice]
    reasons = []
    for driver in map(Driver, names):
        reason = driver.cannot_build()
        if reason is None:
            return driver
        reasons.append(reason)
    raise UsageError(f"{' and '.join(reasons)}. Or write the ONNX file and build.sh only: 'tensorrt{{driver=none}}'")


def gpus() -> int:
    """How many GPUs the NVIDIA driver shows; 0 without a driver. Asks it directly: torch may be built for CPUs."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


@dataclass(frozen=True)
class Settings:
    """How to build; plain data."""

    driver: Literal["tensorrt", "rtx"]
    sparse: bool = True
    """Whether sparse kernels may be used: BuilderFlag.SPARSE_WEIGHTS."""
    precision: Precision = "model"
    workspace_mb: int = 0
    """Most scratch memory of a kernel; 0: TensorRT's default, all there is."""
    shapes: Mapping[str, tuple[list[int], list[int], list[int]]] = field(default_factory=dict)
    """Smallest, usual and largest shape of the inputs with dynamic sizes."""
    timing_cache: str = ""
    refit: bool = False
    strip: bool = False


def build(settings: Settings, onnx: Path, engine: Path, log: Path) -> dict[str, Any]:
    """Write an engine of an ONNX file, and the verbose log of the build, whether it succeeds or not; its facts.

    Raises ArtifactError with TensorRT's own words, UsageError where the timing cache is another device's.
    """
    driver = Driver(settings.driver)
    trt = driver.module()
    lines: list[tuple[str, str]] = []
    logger = _logger(trt, lines)
    try:
        plan = _build(trt, logger, settings, onnx, lines)
        engine.write_bytes(plan)
        read_back = _reads(trt, logger, engine) if gpus() else None
    finally:
        log.write_text("".join(f"[{_SEVERITIES.get(severity, severity)}] {text}\n" for severity, text in lines))
    return {"version": driver.version, "nbytes_engine": len(plan), "read_back": read_back}


def _logger(trt: Any, lines: list[tuple[str, str]]) -> Any:
    """A logger that keeps everything."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            lines.append((severity.name, text))

    return Logger()


def _build(trt: Any, logger: Any, settings: Settings, onnx: Path, lines: list[tuple[str, str]]) -> bytes:
    builder = trt.Builder(logger)
    typed = settings.precision == "model"  # rule 1
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if typed else 0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        raise ArtifactError(_unparsed(parser))
    config = builder.create_builder_config()
    for flag in _flags(settings):
        config.set_flag(getattr(trt.BuilderFlag, flag))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the log names neither layers nor tactics
    if settings.workspace_mb:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mb << 20)
    if settings.shapes:
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in settings.shapes.items():
            profile.set_shape(name, smallest, usual, largest)
        config.add_optimization_profile(profile)
    cache = Path(settings.timing_cache) if settings.timing_cache else None
    if cache:
        _read_cache(config, cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        said = [text for severity, text in lines if severity in ("ERROR", "INTERNAL_ERROR")]
        raise ArtifactError(f"TensorRT could not build the engine: {said[-1] if said else 'it gave no reason'}")
    if cache:
        replace_file(cache, bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def _flags(settings: Settings) -> list[str]:
    wanted = {
        "SPARSE_WEIGHTS": settings.sparse,
        "REFIT": settings.refit,
        "STRIP_PLAN": settings.strip,
        "FP16": settings.precision == "fp16",
        "BF16": settings.precision == "bf16",
    }
    return [flag for flag, set_it in wanted.items() if set_it]


def _unparsed(parser: Any) -> str:
    error = parser.get_error(0)
    return (
        f"TensorRT cannot read node {error.node_name() or '?'} ({error.node_operator() or '?'}) of the ONNX file: "
        f"{error.desc()}; leave tensorrt out of --backend, or write that part of the model with other operators"
    )


def _read_cache(config: Any, path: Path) -> None:
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise UsageError(f"timing_cache {path} is no cache of this TensorRT and GPU; delete it, or name another file")


def _reads(trt: Any, logger: Any, engine: Path) -> bool:
    """Whether the engine can be loaded again, from disk."""
    return trt.Runtime(logger).deserialize_cuda_engine(engine.read_bytes()) is not None
