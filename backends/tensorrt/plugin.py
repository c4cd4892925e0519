"""The packed layer `sparsec::NMLinear` as a plugin of full TensorRT 10.7 or newer. Experimental (docs/tensorrt.md).

    python -m sparsec.backends.tensorrt.plugin model.onnx plugin.onnx    # a file of onnx{weights=packed}: rule 1

    from sparsec.backends.tensorrt import plugin

    plugin.register()                                                    # before the parser reads the file: rule 2

1. The packed file holds the layer as a function in standard operators too, and TensorRT takes a function before a
   plugin: it would unpack the weights in every run. `strip` takes the function out, after it checked every node.
   Weights of `sparsec::NMWeight` (convolutions, half precision) have no plugin: TensorRT unpacks them in every run.
2. TensorRT looks for a plugin of the operator's name in the namespace of its domain, version 1: `register` gives it.
3. The kernel is `nm_linear.cu`, compiled to PTX for the types that a network holds, by nvcc or NVRTC; the
   engine embeds it, so Python is not needed to run it. It is plain and slow; what it takes is what faster ones will.
4. Shapes are checked by `strip`, where they are numbers; TensorRT shows a plugin only symbols.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import operator
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsec.errors import ArtifactError, PatternError, SparsecError, UsageError
from sparsec.pattern import NM, VNM

DOMAIN, OPERATOR, UNPACKED = "sparsec", "NMLinear", "NMWeight"
PLUGIN = f"{DOMAIN}::{OPERATOR}"
TENSORS, ATTRIBUTES = ("x", "values", "positions", "columns", "bias"), ("v", "n", "m", "in_features")
KERNEL = "nm_linear"
ROWS, TOKENS = 128, 8  # what a block of the kernel computes
SOURCE = Path(__file__).with_name("nm_linear.cu")
ELEMENTS = {"float32": "float", "float16": "Half", "bfloat16": "Bfloat16"}  # TensorRT's names -> the kernel's
TABLES = {"uint8": "unsigned char", "int32": "int"}
_ARCHITECTURE = "compute_75"  # PTX runs on this and every later one; TensorRT 10 and 11 start there
_NO_COMPILER = (
    "the plugin's kernel must be compiled to PTX, and there is neither nvcc nor NVRTC; install the CUDA toolkit, or "
    "pip install cuda-bindings nvidia-cuda-nvrtc"
)


def pattern_of(v: int, n: int, m: int) -> NM | VNM:
    """The pattern that a node's attributes say; v is 0 for N:M. Raises PatternError where there is none.

    m is 0 for strips, which have a kernel on CPUs only.
    """
    if v and not m:
        raise PatternError(f"the plugin runs windows of columns, and this is a strip of {v} rows; compile to {v}:2:8")
    return VNM(v, n, m) if v else NM(n, m)


def table_shapes(v: int, n: int, m: int, in_features: int, rows: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a node's constant inputs, all but x, by name. Raises PatternError on senseless attributes."""
    pattern = pattern_of(v, n, m)
    if in_features < 1 or rows < 1:
        raise PatternError(f"{pattern}: expected at least 1 row and 1 column, found {rows} x {in_features}")
    groups = pattern.groups(in_features)
    columns = (1, pattern.strips(rows), groups, 4) if isinstance(pattern, VNM) else (1, 1, 1, m)
    return {
        "values": (1, rows, groups, n),
        "positions": (1, rows, (groups * n * position_bits(v, m) + 7) // 8),
        "columns": columns,
        "bias": (rows,),
    }


def position_bits(v: int, m: int) -> int:
    """Bits of one packed position: which of the 4 shared columns, or which of the M of a group."""
    return 2 if v else (m - 1).bit_length()


def launch(
    shape: Sequence[Any], rows: Any, groups: Any, attributes: Sequence[int], ceil_div: Callable[[Any, int], Any]
) -> tuple[tuple[Any, Any], list[Any]]:
    """The kernel's grid (x, y), and its integers in order. Sizes are numbers, or TensorRT's symbols with its `cdiv`.

    shape: x's, (..., in_features); rows, groups: of the weight; attributes: those of the node, as in ATTRIBUTES.
    """
    v, n, m, in_features = attributes
    tokens = functools.reduce(operator.mul, shape[:-1]) if len(shape) > 1 else 1
    grid = (ceil_div(tokens, TOKENS), ceil_div(rows, ROWS))
    return grid, [tokens, rows, in_features, groups, v, n, m, position_bits(v, m)]


def register() -> None:
    """Make the plugin known to TensorRT, once in a process; engines are built and parsed as always after it.

    Raises UsageError without TensorRT 10.7 and when neither nvcc nor NVRTC is there to compile the kernel.
    """
    trt, trtp = _tensorrt()
    if not (shutil.which("nvcc") or _nvrtc()):
        raise UsageError(_NO_COMPILER)
    if hasattr(getattr(trtp.op, DOMAIN, None), OPERATOR):
        return
    elements = {getattr(trt, name): own for name, own in ELEMENTS.items()}
    tables = {getattr(trt, name): own for name, own in TABLES.items()}

    def describe(x: Any, values: Any, positions: Any, columns: Any, bias: Any, v, n, m, in_features):  # type: ignore[no-untyped-def]
        pattern_of(v, n, m)
        y = x.like()
        y.shape_expr[len(x.shape_expr) - 1] = values.shape_expr[1]
        return y

    def compile_kernel(x, values, positions, columns, bias, v, n, m, in_features, outputs, tactic):  # type: ignore[no-untyped-def]
        if not {x.dtype, values.dtype} <= elements.keys() or bias.dtype != x.dtype:
            found = f"{x.dtype}, {values.dtype} and {bias.dtype}"
            raise UsageError(f"{PLUGIN}: expected x, values and bias in fp32, fp16 or bf16, x as bias; found {found}")
        if positions.dtype not in tables or columns.dtype != positions.dtype:
            found = f"{positions.dtype} and {columns.dtype}"
            raise UsageError(f"{PLUGIN}: expected positions and columns of one type, uint8 or int32; found {found}")
        rows, groups = values.shape_expr[1], values.shape_expr[2]
        grid, integers = launch(list(x.shape_expr), rows, groups, (v, n, m, in_features), trtp.cdiv)
        params, extra = trtp.KernelLaunchParams(), trtp.SymIntExprs(len(integers))
        params.grid_x, params.grid_y, params.block_x = *grid, ROWS
        for i, integer in enumerate(integers):
            extra[i] = trtp.SymInt32(integer)
        code = ptx(elements[x.dtype], elements[values.dtype], tables[positions.dtype])
        return KERNEL, code, params, extra

    # TensorRT reads annotations as classes; this file's are text.
    describe.__annotations__ = dict.fromkeys(TENSORS, trtp.TensorDesc) | dict.fromkeys(ATTRIBUTES, int)
    describe.__annotations__["return"] = trtp.TensorDesc
    result = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]  # type: ignore[name-defined]
    compile_kernel.__annotations__ = {"return": result}
    trtp.register(PLUGIN)(describe)
    trtp.aot_impl(PLUGIN)(compile_kernel)


def _tensorrt() -> tuple[Any, Any]:
    advice = "the plugin needs full TensorRT 10.7 or newer and an NVIDIA GPU (TensorRT-RTX runs no such plugins)"
    try:
        trt, trtp = importlib.import_module("tensorrt"), importlib.import_module("tensorrt.plugin")
    except ImportError as error:
        raise UsageError(f"{advice}; {error.name} cannot be imported: pip install tensorrt") from error
    if not hasattr(trtp, "aot_impl"):
        raise UsageError(f"{advice}, found {trt.__version__}; pip install --upgrade tensorrt")
    return trt, trtp


@functools.cache
def ptx(element: str, value: str, table: str) -> str:
    """The kernel for x and y, values, and tables of these types. Raises UsageError with what the compiler says."""
    macros = [f"-DELEMENT={element}", f"-DVALUE={value}", f"-DTABLE={table}"]
    if nvcc := shutil.which("nvcc"):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "kernel.ptx"
            command = [nvcc, "-ptx", "-std=c++17", f"-arch={_ARCHITECTURE}", *macros, str(SOURCE), "-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UsageError(f"{SOURCE.name}: nvcc failed: {done.stderr.strip()}; is a host compiler installed?")
            return out.read_text()
    return _compile(_nvrtc(), [f"--gpu-architecture={_ARCHITECTURE}", "--std=c++17", *macros])


def _nvrtc() -> Any:
    """NVRTC's functions, or None where the bindings or the library behind them are missing."""
    try:
        found: Any = importlib.import_module("cuda.bindings.nvrtc")
        found.nvrtcVersion()
    except (ImportError, RuntimeError):
        return None
    return found


def _compile(nvrtc: Any, options: list[str]) -> str:
    if nvrtc is None:
        raise UsageError(_NO_COMPILER)
    _, program = nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), SOURCE.name.encode(), 0, [], [])
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        nvrtc.nvrtcGetProgramLog(program, log := bytearray(size))
        raise UsageError(f"{SOURCE.name}: NVRTC failed: {log.decode().strip()}")
    _, size = nvrtc.nvrtcGetPTXSize(program)
    nvrtc.nvrtcGetPTX(program, found := bytearray(size))
    return found.decode().rstrip("\0")


def strip(source: Path, target: Path) -> tuple[int, int]:
    """Write `source`, a packed ONNX file, without the operator's function.

    Returns how many layers the plugin gets, and how many weights TensorRT unpacks in every run (rule 1).
    Raises ArtifactError on nodes that the plugin could not run, naming them, UsageError where there are none.
    """
    import onnx

    try:
        model = onnx.load(source, load_external_data=False)
    except Exception as error:  # protobuf has its own, by version
        raise ArtifactError(f"{source} cannot be read as an ONNX file: {error}") from error
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, OPERATOR)]
    if not nodes:
        raise UsageError(f"{source} has no {PLUGIN} node; compile with --backend onnx{{weights=packed}}")
    for node in nodes:
        _check_node(node, constants)
    others = [one for one in model.functions if (one.domain, one.name) != (DOMAIN, OPERATOR)]
    del model.functions[:]
    model.functions.extend(others)
    _copy_external(model, source.parent, target.parent)
    onnx.save(model, target)
    unpacked = [node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, UNPACKED)]
    return len(nodes), len(unpacked)


def _check_node(node: Any, constants: dict[str, Any]) -> None:
    import onnx

    where = f"{PLUGIN} node {node.name!r}"
    found = {one.name: one.i for one in node.attribute}
    missing = [name for name in ATTRIBUTES if name not in found]
    if missing or len(node.input) != len(TENSORS):
        what = f"no attribute {missing[0]}" if missing else f"{len(node.input)} inputs, expected {len(TENSORS)}"
        raise ArtifactError(f"{where} has {what}; write the file again")
    tensors = dict(zip(TENSORS, node.input, strict=True))
    tables = {name: constants.get(value) for name, value in tensors.items() if name != "x"}
    if absent := [name for name, table in tables.items() if table is None]:
        raise ArtifactError(f"{where}: {absent[0]} is no initializer; the plugin takes constant weights only")
    bias: Any = tables["bias"]
    try:
        v, n, m, in_features = (found[name] for name in ATTRIBUTES)
        expected = table_shapes(v, n, m, in_features, bias.dims[0] if bias.dims else 0)
    except PatternError as error:
        raise ArtifactError(f"{where}: {error}") from error
    types = {"positions": ("UINT8",), "columns": ("UINT8",)}
    for name, table in tables.items():
        shape, kind = tuple(table.dims), onnx.TensorProto.DataType.Name(table.data_type)
        if shape != expected[name] or kind not in types.get(name, ("FLOAT", "FLOAT16", "BFLOAT16")):
            raise ArtifactError(f"{where}: {name} is {kind} {shape}, expected {expected[name]}; write the file again")


def _copy_external(model: Any, source: Path, target: Path) -> None:
    """The files that hold the weights of a large model go where the new file goes."""
    files = {entry.value for one in model.graph.initializer for entry in one.external_data if entry.key == "location"}
    for name in sorted(files):
        if Path(name).name != name or not (source / name).is_file():
            raise ArtifactError(f"{source / name}, which holds weights of the model, is missing or lies elsewhere")
        if source.resolve() != target.resolve():
            shutil.copyfile(source / name, target / name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Strip a file from the command line."""
    parser = argparse.ArgumentParser(prog="python -m sparsec.backends.tensorrt.plugin", description=strip.__doc__)
    parser.add_argument("source", type=Path, help="model.onnx of an artifact compiled with onnx{weights=packed}")
    parser.add_argument("target", type=Path, help="the file to write")
    chosen = parser.parse_args(arguments)
    try:
        layers, unpacked = strip(chosen.source, chosen.target)
    except SparsecError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(
        f"{chosen.target}: {layers} layers for the plugin {PLUGIN}, {unpacked} other weights that TensorRT unpacks in "
        "every run; other runtimes cannot run this file"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
