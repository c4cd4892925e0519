"""An engine on the GPU as a callable. The same for TensorRT and TensorRT-RTX, whose interfaces agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.backends.tensorrt.driver import Driver, gpus
from sparsec.errors import ArtifactError, UsageError
from sparsec.program import bind

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_TYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8",
    "INT32": "int32", "INT64": "int64", "BOOL": "bool",
}  # fmt: skip


def open_engine(path: Path, manifest: dict[str, Any]) -> TensorRTModule:
    """The engine of an artifact. Raises UsageError naming what is missing here, or what built it."""
    facts = manifest["backends"]["tensorrt"]
    if facts["driver"] == "none":
        raise UsageError(f"{path.parent} holds no engine, only the ONNX file and build.sh: {facts['note']}")
    driver = Driver(facts["driver"])
    check_version(facts, driver.version)
    if facts["strip"]:
        raise UsageError(f"{path} was built with strip=true, without its weights: refit it with TensorRT's own tools")
    check_gpu()
    inputs = [entry["name"] for entry in manifest["inputs"]]
    return TensorRTModule(driver, path.read_bytes(), inputs, manifest["outputs"])


def check_version(facts: Mapping[str, Any], installed: str) -> None:
    """An engine runs with the version that built it only; raises ArtifactError naming both."""
    if facts["version"] != installed:
        raise ArtifactError(
            f"the engine was built by {facts['driver']} {facts['version']}, and {installed} is installed, which does "
            "not run it: install that version, or compile again"
        )


def check_gpu() -> None:
    """Raise UsageError unless there is a GPU, and a torch that holds tensors on it."""
    import torch

    if not gpus():
        raise UsageError(
            "a TensorRT engine runs on an NVIDIA GPU, and there is none here; compile with --backend kernel for CPUs"
        )
    if not torch.cuda.is_available():
        raise UsageError(f"there is a GPU, but torch {torch.__version__} cannot use it; install a torch built for CUDA")


class TensorRTModule:
    """Inputs by position or by name -> dict of outputs by name, on the device of the first input."""

    def __init__(self, driver: Driver, plan: bytes, inputs: list[str], outputs: list[str]) -> None:
        import torch

        trt = driver.module()
        self._logger = trt.Logger(trt.Logger.ERROR)  # TensorRT does not keep it alive
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ArtifactError("TensorRT does not take the engine; it was built for another GPU: compile again here")
        self._context = self._engine.create_execution_context()
        self._stream = torch.cuda.Stream()
        self.inputs, self.outputs = inputs, outputs

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        given = bind(self.inputs, args, kwargs)
        found = self.bound(dict(zip(self.inputs, given, strict=True)))
        self.enqueue()
        self._stream.synchronize()
        return {name: value.to(given[0].device) for name, value in found.items()}

    def bound(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy inputs to the GPU and make room for the outputs there; `enqueue` then computes them."""
        import torch

        self._held = {name: value.detach().to("cuda", self._dtype(name)).contiguous() for name, value in inputs.items()}
        for name, value in self._held.items():
            if not self._context.set_input_shape(name, tuple(value.shape)):
                low, _, high = self._engine.get_tensor_profile_shape(name, 0)
                raise UsageError(f"{name}: the engine takes shapes {low} to {high}, found {tuple(value.shape)}")
        outputs = {
            name: torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=self._dtype(name), device="cuda")
            for name in self.outputs
        }
        self._held |= outputs  # TensorRT knows addresses only
        for name, value in self._held.items():
            self._context.set_tensor_address(name, value.data_ptr())
        torch.cuda.current_stream().synchronize()  # the inputs are there before another stream reads them
        return outputs

    def enqueue(self) -> None:
        """Compute what `bound` made ready; returns before it is done."""
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise UsageError("TensorRT did not run the engine; its reason is on stderr")

    def milliseconds(self, runs: int) -> float:
        """GPU time of one run, over `runs` of them in a row."""
        import torch

        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(self._stream)
        for _ in range(runs):
            self.enqueue()
        end.record(self._stream)
        end.synchronize()
        taken: float = start.elapsed_time(end)
        return taken / runs

    def _dtype(self, name: str) -> torch.dtype:
        import torch

        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _TYPES:
            raise UsageError(f"{name} is {kind} in the engine, which torch has no tensors of")
        dtype: torch.dtype = getattr(torch, _TYPES[kind])
        return dtype
