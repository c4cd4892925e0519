"""Open an .onnx file without its external data, which is mapped one tensor at a time. Everything is checked first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.errors import ArtifactError, UsageError
from sparsec.onnxfile.scopes import scopes_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SUFFIX = ".onnx"
_PROTOBUF_LIMIT = 1 << 31
_OLDEST = 7  # opsets before it broadcast otherwise, and no runtime of today reads them
DOMAINS = frozenset(
    """
    ai.onnx ai.onnx.ml ai.onnx.training ai.onnx.preview ai.onnx.preview.training com.microsoft com.microsoft.nchwc
    com.microsoft.experimental com.ms.internal.nhwc org.pytorch.aten sparsec
    """.split()
)
TORCH = {"float": "float32", "double": "float64", "float16": "float16", "int8": "int8", "uint8": "uint8"}
"""ONNX's names of the types that weights are read in -> torch's; bfloat16 is read by itself."""


class OnnxFile:
    """An opened .onnx file: `model` is its protobuf object, `main` its graph as a Scope.

    Raises UsageError where there is no such file, and ArtifactError naming what is damaged, missing or unknown.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UsageError(f"{path} does not exist; expected an {SUFFIX} file")
        self.path, self.folder = path, path.parent
        self.model = _parsed(path)
        _check_versions(path, self.model)
        self.main, self.others = scopes_of(self.model)
        for _, tensor in tensors_of(self.model):
            if is_external(tensor):
                self.span(tensor)

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators that it asks for."""
        return int(next(entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")))

    def span(self, tensor: Any) -> tuple[Path, int, int]:
        """Where an external tensor lies: file, offset, bytes. Raises ArtifactError where it cannot lie there."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = Path(entries.get("location", ""))
        file = self.folder / location
        inside = file.resolve().is_relative_to(self.folder.resolve())
        if not location.name or location.is_absolute() or ".." in location.parts or not inside:
            raise ArtifactError(
                f"{self.path}: the data of {tensor.name} is said to lie in {str(location)!r}, which is outside the "
                "model's folder; expected a file beside the model (put a copy there if it is a link)"
            )
        if not file.is_file():
            raise ArtifactError(
                f"{self.path}: {location} is missing, which holds the data of {tensor.name}; put it beside the model"
            )
        try:
            offset = int(entries.get("offset") or 0)
            nbytes = int(entries.get("length") or file.stat().st_size - offset)
        except ValueError as error:
            raise ArtifactError(f"{self.path}: {tensor.name}: its place in {location} is damaged: {error}") from error
        if min(offset, nbytes) < 0 or offset + nbytes > file.stat().st_size:
            raise ArtifactError(
                f"{self.path}: {tensor.name} lies at bytes {offset} to {offset + nbytes} of {location}, which has "
                f"{file.stat().st_size}: one of the two files was cut off, or is another model's"
            )
        return file, offset, nbytes

    def array(self, tensor: Any) -> np.ndarray[Any, Any]:
        """A tensor's values in its own type, external data mapped read-only."""
        import numpy as np
        import onnx

        if not is_external(tensor):
            try:
                return np.asarray(onnx.numpy_helper.to_array(tensor))
            except Exception as error:  # onnx's helpers share no base class
                raise ArtifactError(f"{self.path}: {tensor.name} is damaged: {first_line(error)}") from error
        file, offset, nbytes = self.span(tensor)
        dtype, shape = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)), tuple(tensor.dims)
        if nbytes != math.prod(shape) * dtype.itemsize:
            raise ArtifactError(
                f"{self.path}: {tensor.name} of shape {list(shape)} needs {math.prod(shape) * dtype.itemsize} bytes, "
                f"found {nbytes} in {file.name}"
            )
        return np.memmap(file, dtype, "r", offset, shape) if nbytes else np.empty(shape, dtype)

    def tensor(self, tensor: Any) -> Tensor:
        """A copy of a tensor's values, in torch's type of the same name. Types that torch lacks are not asked for."""
        import numpy as np
        import torch

        array = np.array(self.array(tensor))  # the mapped one cannot be written, and may not be aligned
        if dtype_of(tensor) == "bfloat16":
            return torch.from_numpy(array.view(np.uint16).view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def first_line(error: Exception) -> str:
    """What an exception of another library says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def is_external(tensor: Any) -> bool:
    """Whether a tensor's values lie in another file."""
    return bool(tensor.data_location == 1)  # TensorProto.EXTERNAL


def dtype_of(tensor: Any) -> str:
    """ONNX's name of a tensor's type, such as float, bfloat16 or int4."""
    import onnx

    return str(onnx.TensorProto.DataType.Name(tensor.data_type)).lower()


def nbytes_of(tensor: Any) -> int:
    """Bytes of a tensor's values."""
    import onnx

    small = {"int4": 4, "uint4": 4, "float4e2m1": 4, "int2": 2, "uint2": 2}.get(dtype_of(tensor))
    bits: int = small or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return (math.prod(map(int, tensor.dims)) * bits + 7) // 8


def tensors_of(model: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor of a model with its name, where it belongs to the main graph, else with an empty one."""
    yield from ((tensor.name, tensor) for tensor in model.graph.initializer)
    for node in model.graph.node:
        constant = node.output[0] if node.op_type == "Constant" and node.output else ""
        yield from ((constant, tensor) for tensor in _of_node(node))
    for function in model.functions:
        yield from (("", tensor) for node in function.node for tensor in _of_node(node))


def _of_node(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        yield from ([attribute.t] if attribute.HasField("t") else []) + list(attribute.tensors)
        for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            yield from graph.initializer
            for inner in graph.node:
                yield from _of_node(inner)


def _parsed(path: Path) -> Any:
    import onnx

    if path.stat().st_size >= _PROTOBUF_LIMIT:
        raise ArtifactError(
            f"{path} has {path.stat().st_size / 1e9:.1f} GB in one file, and protobuf reads at most 2 GB; save it "
            "again with its weights as external data: onnx.save(model, path, save_as_external_data=True)"
        )
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises its own types
        raise ArtifactError(
            f"{path} cannot be read as ONNX: {first_line(error)}; it is damaged, or of another format"
        ) from error
    if not model.graph.node or not model.opset_import:
        raise ArtifactError(f"{path} cannot be read as ONNX: it holds no graph of operators; it is damaged")
    return model


def _check_versions(path: Path, model: Any) -> None:
    import onnx

    newest, advice = onnx.defs.onnx_opset_version(), f"the installed onnx {onnx.__version__} knows; pip install -U onnx"
    if model.ir_version > onnx.IR_VERSION:
        raise ArtifactError(
            f"{path} has IR version {model.ir_version}, expected at most {onnx.IR_VERSION}, which {advice}"
        )
    own = {function.domain for function in model.functions}
    versions = {entry.domain: entry.version for entry in model.opset_import}
    version = versions.get("", versions.get("ai.onnx"))
    if version is None or not _OLDEST <= version <= newest:
        found = f"opset {version}" if version is not None else "no opset of ONNX's own operators"
        raise ArtifactError(f"{path} asks for {found}, expected {_OLDEST} to {newest}, which {advice}")
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        if node.domain and node.domain not in DOMAINS | own:
            raise ArtifactError(
                f"{path} holds the operator {node.domain}::{node.op_type}, which nobody but its maker can run; "
                f"expected operators of {', '.join(sorted({'ai.onnx', 'com.microsoft', *own}))}"
            )
