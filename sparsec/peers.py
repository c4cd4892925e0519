"""What a user would run instead of the sparse kernels, on the same weights: dense torch and onnxruntime.

A peer is one line in two tables, of whole models and of single layers. It raises a SparsecError that says why it cannot
run here; whoever measures reports that.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec import _fx, registry, store
from sparsec.backend import CHECK_FILE, CheckData
from sparsec.errors import ArtifactError, UsageError
from sparsec.program import Program
from sparsec.sites import SiteTable

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

    from sparsec.artifact import Artifact

COLD_BYTES = 32 << 20  # of all copies of one weight: beyond what the last-level cache leaves to one side
MOST_COPIES = 256  # each is a session of its own in onnxruntime
_ONNX = "model.onnx"

Run = Callable[..., dict[str, "Tensor"]]
"""Inputs by name -> outputs by name, on as many threads as torch had when it was made."""
Layer = Callable[["Tensor"], Any]
"""x (tokens, cols) -> (tokens, rows). Every call takes the next copy of the weight, so that none stays in a cache."""


@dataclass
class DenseModel:
    """An artifact's model with its weights unpacked, in the forms that peers run, each made when it is first needed.

    `scratch`: an empty folder for ONNX files. Needs an artifact of the kernel backend.
    """

    artifact: Artifact
    scratch: Path
    _sessions: dict[tuple[Path, int], Run] = field(default_factory=dict)

    @cached_property
    def program(self) -> Program:
        """The dense graph, which runs as it is."""
        loaded = self.artifact.load_dense()
        stored = CheckData.from_tensors(store.load_tensors(self.artifact.root / CHECK_FILE)).inputs
        inputs = {name: stored[name] for name in loaded.input_names}  # a file keeps no order
        dims = {name: (low, high) for name, (low, high) in self.artifact.manifest["dims"].items()}
        return Program(loaded.graph, SiteTable(()), inputs, dims, facts=frozenset({"traced", "frozen"}))

    @cached_property
    def onnx(self) -> Path:
        """An ONNX file of dense weights: the artifact's own, or one exported for the purpose."""
        backend = registry.backend_class("onnx")(weights="dense")  # type: ignore[call-arg]
        if reason := backend.unavailable():
            raise UsageError(reason)
        own = self.artifact.manifest["backends"].get("onnx", {})
        if own.get("weights") == "dense":
            return self.artifact.root / _ONNX
        folder = self.scratch / "fp32"
        folder.mkdir()
        backend.emit(self.program.clone(), folder)
        return folder / _ONNX

    @cached_property
    def onnx_int8(self) -> Path:
        """The same, quantized."""
        out = self.scratch / "int8.onnx"
        quantize(self.onnx, out)
        return out

    def session(self, path: Path) -> Run:
        """onnxruntime on an ONNX file, made once for each thread count."""
        import torch

        key = (path, torch.get_num_threads())
        if key not in self._sessions:
            self._sessions[key] = _session(path)
        return self._sessions[key]


def _torch(dense: DenseModel, inputs: dict[str, Tensor]) -> Run:
    return dense.program


def _prepacked(dense: DenseModel, inputs: dict[str, Tensor]) -> Run:
    """Every linear layer as torch.compile's freezing emits it: oneDNN on a weight reordered for the rows it sees."""
    import torch

    _check_onednn()
    program = dense.program.clone()
    module = program.module
    linears = list(_fx.calls(module.graph, torch.ops.aten.linear.default))
    rows = _rows_seen(program, linears, inputs)
    for node in linears:
        _, weight, *rest = node.args
        if weight.op != "get_attr" or _fx.get_tensor(module, str(weight.target)).dtype != torch.float32:
            continue  # oneDNN's linear takes a constant fp32 weight
        reordered = f"{weight.target}_reordered_{rows[node]}"
        if not _fx.has_tensor(module, reordered):
            plain = _fx.get_tensor(module, str(weight.target)).detach()
            _fx.set_tensor(module, reordered, torch.ops.mkldnn._reorder_linear_weight(plain, rows[node]))
        args: tuple[Any, ...] = (
            node.args[0],
            _fx.attribute(module, reordered, node),
            rest[0] if rest else None,
            "none",
            [],
            "",
        )
        onednn = torch.ops.mkldnn._linear_pointwise.default
        _fx.replace(node, _fx.call(node, onednn, args, node.meta[_fx.TYPE], node.name))
    _fx.prune_unused(module)
    module.recompile()
    return program


def _rows_seen(program: Program, linears: list[Node], inputs: dict[str, Tensor]) -> dict[Node, int]:
    """How many rows each of these layers multiplies when the program runs on `inputs`."""
    from torch import fx

    seen: dict[Node, int] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: Node) -> Any:
            value = super().run_node(node)
            if node in wanted:
                seen[node] = value.numel() // value.shape[-1]
            return value

    wanted = set(linears)
    Recorder(program.module).run(*(inputs[name] for name in program.inputs))
    return seen


def _onnxruntime(dense: DenseModel, inputs: dict[str, Tensor]) -> Run:
    return dense.session(dense.onnx)


def _onnxruntime_int8(dense: DenseModel, inputs: dict[str, Tensor]) -> Run:
    return dense.session(dense.onnx_int8)


MODELS: dict[str, Callable[[DenseModel, dict[str, Tensor]], Run]] = {
    "dense": _torch,
    "mkldnn": _prepacked,
    "onnxruntime": _onnxruntime,
    "onnxruntime-int8": _onnxruntime_int8,
}
"""Peer -> the whole model, for inputs of these sizes."""


def _torch_layer(weight: Tensor, tokens: int, scratch: Path) -> Layer:
    import torch

    linear = torch.nn.functional.linear
    return in_rotation([partial(linear, weight=weight.clone()) for _ in range(copies_of(weight.nbytes))])


def _prepacked_layer(weight: Tensor, tokens: int, scratch: Path) -> Layer:
    import torch

    _check_onednn()
    linear, reorder = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight

    def one() -> Layer:
        reordered = reorder(weight, tokens)
        return lambda x: linear(x, reordered, None, "none", [], "")

    return in_rotation([one() for _ in range(copies_of(weight.nbytes))])


def _onnxruntime_layer(weight: Tensor, tokens: int, scratch: Path) -> Layer:
    return _sessions_of(_matmul(weight, scratch), weight.nbytes)


def _onnxruntime_int8_layer(weight: Tensor, tokens: int, scratch: Path) -> Layer:
    quantized = scratch / "matmul-int8.onnx"
    quantize(_matmul(weight, scratch), quantized)
    return _sessions_of(quantized, weight.nbytes // 4)


LAYERS: dict[str, Callable[[Tensor, int, Path], Layer]] = {
    "dense": _torch_layer,
    "mkldnn": _prepacked_layer,
    "onnxruntime": _onnxruntime_layer,
    "onnxruntime-int8": _onnxruntime_int8_layer,
}
"""Peer -> one product with a weight (rows, cols), for a token count; the folder is for files while it is made."""


def copies_of(nbytes: int) -> int:
    """How many copies of a weight one side rotates through: enough to fill `COLD_BYTES`, at most `MOST_COPIES`."""
    return min(-(-COLD_BYTES // nbytes), MOST_COPIES)


def in_rotation(copies: list[Layer]) -> Layer:
    """A layer whose every call takes the next copy."""
    turns = itertools.cycle(copies)
    return lambda x: next(turns)(x)


def quantize(source: Path, out: Path) -> None:
    """onnxruntime's dynamic quantization as it is by default: int8 weights, activations scaled at every call."""
    import onnx

    try:
        with _quiet():
            from onnxruntime.quantization import quantize_dynamic

            model = onnx.load(source)
            # It transposes the weights of Gemm and then finds our shapes of them wrong: it shall infer its own.
            del model.graph.value_info[:]
            large = model.ByteSize() > 1_500_000_000
            quantize_dynamic(model, out, use_external_data_format=large)
    except Exception as error:  # onnx, protobuf and onnxruntime share no base class
        raise ArtifactError(f"onnxruntime cannot quantize this model: {_one_line(error)}") from error


def _matmul(weight: Tensor, scratch: Path) -> Path:
    """An ONNX file of one MatMul: x (tokens, cols) @ weight.T."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rows, cols = weight.shape
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["tokens", s]) for n, s in (("x", cols), ("y", rows)))
    constant = numpy_helper.from_array(weight.T.contiguous().numpy(), "weight")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "weight"], ["y"])], "layer", [x], [y], [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, scratch / "matmul.onnx")
    return scratch / "matmul.onnx"


def _sessions_of(path: Path, nbytes: int) -> Layer:
    def one() -> Layer:
        session = _session(path)
        return lambda x: session(x=x)

    return in_rotation([one() for _ in range(copies_of(nbytes))])


def _session(path: Path) -> Run:
    """onnxruntime as it is by default, on torch's thread count."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 4  # fatal: it also prints the errors it raises
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class
        raise ArtifactError(f"onnxruntime cannot load its model: {_one_line(error)}") from error
    outputs = [output.name for output in session.get_outputs()]

    def run(**inputs: Tensor) -> dict[str, Tensor]:
        found = session.run(outputs, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(outputs, found, strict=True)}

    return run


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _check_onednn() -> None:
    import torch

    if not torch.backends.mkldnn.is_available():
        raise UsageError("this build of torch has no oneDNN (mkldnn)")


@contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's quantizer advises on standard error, whatever is asked of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
