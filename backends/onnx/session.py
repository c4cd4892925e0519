"""model.onnx as a callable, through onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsec import ort
from sparsec.errors import ArtifactError, UsageError
from sparsec.program import bind

if TYPE_CHECKING:
    from torch import Tensor

NO_KERNEL = "has no kernel"  # what the error about a type says
_NOT_IMPLEMENTED = "NOT_IMPLEMENTED"  # onnxruntime's own word
_FATAL = 4  # onnxruntime's severity: it also prints the errors it raises, and warns about harmless things


class OnnxModule:
    """Inputs by position or by name -> dict of outputs by name, all tensors on the CPU, on torch's thread count.

    `kernels`: onnxruntime's own only, or with sparsec's for packed weights.
    """

    def __init__(self, path: Path, kernels: Literal["plain", "sparsec"] = "plain") -> None:
        import onnxruntime
        import torch

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL
        try:
            self._session = ort.session(path, options) if kernels == "sparsec" else _plain_session(path, options)
        except ArtifactError as error:
            raise _explained(error, path) from error
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        import torch

        given = bind(self.inputs, args, kwargs)
        arrays = {name: value.detach().cpu().numpy() for name, value in zip(self.inputs, given, strict=True)}
        try:
            found = self._session.run(None, arrays)
        except Exception as error:  # onnxruntime's errors share no base class
            raise UsageError(f"onnxruntime refused these inputs: {first_line(error)}") from error
        return {name: torch.from_numpy(value) for name, value in zip(self.outputs, found, strict=True)}


def _plain_session(path: Path, options: Any) -> Any:
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class
        raise ArtifactError(f"{path.name}: onnxruntime cannot load it: {first_line(error)}") from error


def _explained(error: ArtifactError, path: Path) -> ArtifactError:
    """The error of a file whose types onnxruntime has no kernels for says so in its own words."""
    import onnx
    import onnxruntime

    if _NOT_IMPLEMENTED not in str(error):
        return error
    model = onnx.load(str(path), load_external_data=False)
    if not any(tensor.data_type == onnx.TensorProto.BFLOAT16 for tensor in model.graph.initializer):
        return error
    operator = str(error).partition("implementation for ")[2].partition("(")[0]
    return ArtifactError(
        f"{path.name}: onnxruntime {onnxruntime.__version__} {NO_KERNEL} for {operator or 'an operator'} in bfloat16 "
        "on this CPU; run it on a device that has, or compile with --dtype fp16"
    )


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
