"""The TensorRT plugin, as far as it goes without TensorRT and a GPU: its kernel runs on the CPU, its file is real."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import tensorrt_stand_in
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from models import random
from onnx import TensorProto, helper, numpy_helper
from strategies import nm_patterns, vnm_patterns
from torch import Tensor

from sparsec.backends.onnx import packed
from sparsec.backends.onnx.functions import DOMAIN, LINEAR, functions
from sparsec.backends.tensorrt import plugin
from sparsec.errors import ArtifactError, PatternError, UsageError
from sparsec.layout import SparseLayout, compress, decompress
from sparsec.pattern import NM, VNM, Pattern

NATIVE = Path(__file__).parents[2] / "native"
TYPES = {"float": torch.float32, "Half": torch.float16, "Bfloat16": torch.bfloat16}
PAIRS = [("float", "float"), ("float", "Bfloat16"), ("Half", "Half"), ("Bfloat16", "Bfloat16")]  # x, values
TABLES = {"unsigned char": torch.uint8, "int": torch.int32}
ROUNDED = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # the output, after fp32 sums of < 300 terms

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Any]:
    """The kernel compiled for the CPU, by the types of x, values and tables."""
    folder, found = tmp_path_factory.mktemp("kernels"), {}
    for element, value in PAIRS:
        for table in TABLES:
            library = folder / f"{len(found)}.so"
            flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{plugin.SOURCE.parent}"]
            macros = [f"-DELEMENT={element}", f"-DVALUE={value}", f"-DTABLE={table}"]
            source = ["-x", "c++", str(NATIVE / "nm_linear_on_cpu.cpp")]
            subprocess.run(["g++", *flags, *macros, *source, "-o", str(library)], check=True)
            found[element, value, table] = ctypes.CDLL(str(library)).run
    return found


class Guarded:
    """A tensor's bytes right before memory that nobody may touch: one access beyond its end stops the process."""

    libc = ctypes.CDLL(None)

    def __init__(self, tensor: Tensor) -> None:
        self.like = tensor
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        pages = -(-len(data) // mmap.PAGESIZE)
        self.memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        self.offset = pages * mmap.PAGESIZE - len(data)
        self.memory[self.offset : self.offset + len(data)] = data
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + self.offset
        end = ctypes.c_void_p(self.address + len(data))
        assert not self.libc.mprotect(end, mmap.PAGESIZE, 0)

    def tensor(self) -> Tensor:
        raw = torch.frombuffer(bytearray(self.memory[self.offset : self.offset + self.like.nbytes]), dtype=torch.uint8)
        return raw.view(self.like.dtype).view(self.like.shape)


def run(
    kernel: Any, grid: Sequence[int], x: Tensor, layout: SparseLayout, table: str, bias: Tensor, integers: Sequence[int]
) -> Tensor:
    columns = layout.columns if layout.columns is not None else torch.zeros(0, dtype=torch.uint8)
    tables = [layout.positions.to(TABLES[table]), columns.to(TABLES[table])]
    given_, y = [x, layout.values, *tables, bias], torch.full((x.shape[0], layout.shape[1]), torch.nan, dtype=x.dtype)
    memory, out = [Guarded(one) for one in given_], Guarded(y)
    pointers = [ctypes.c_void_p(one.address) for one in memory]
    kernel(
        *map(ctypes.c_uint, (*grid, plugin.ROWS)), *pointers, *map(ctypes.c_int, integers), ctypes.c_void_p(out.address)
    )
    return out.tensor()


def layout_for(pattern: Pattern, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> SparseLayout:
    weight = random(1, rows, cols).to(dtype)
    return compress(weight, pattern, pattern.project(weight.float().abs()))


def attributes_of(pattern: Pattern, cols: int) -> tuple[int, int, int, int]:
    found = packed.linear_attributes(pattern, cols)
    return found["v"], found["n"], found["m"], found["in_features"]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# The kernel


@needs_compiler
@given(
    st.one_of(nm_patterns(), vnm_patterns()),
    st.integers(1, 40),
    st.integers(1, 45),
    st.integers(1, 20),
    st.sampled_from(PAIRS),
    st.sampled_from([*TABLES]),
)
@example(NM(2, 4), 130, 8, 9, ("float", "float"), "unsigned char")
@example(NM(3, 200), 5, 210, 3, ("Half", "Half"), "unsigned char")
@example(NM(7, 129), 3, 259, 17, ("Bfloat16", "Bfloat16"), "int")
@example(VNM(64, 2, 5), 257, 66, 8, ("Half", "Half"), "int")
@example(VNM(64, 2, 8), 129, 7, 1, ("Bfloat16", "Bfloat16"), "unsigned char")
@example(NM(1, 1), 2, 3, 2, ("float", "Bfloat16"), "int")
def test_the_kernel_multiplies_what_the_tables_unpack_to(
    kernels: dict[tuple[str, str, str], Any],
    pattern: Pattern,
    rows: int,
    cols: int,
    tokens: int,
    pair: tuple[str, str],
    table: str,
) -> None:
    dtype = TYPES[pair[0]]
    layout = layout_for(pattern, rows, cols, TYPES[pair[1]])
    x, bias = random(tokens, cols, seed=1).to(dtype), random(rows, seed=2).to(dtype)
    attributes = attributes_of(pattern, cols)
    grid, integers = plugin.launch((tokens, cols), rows, layout.values.shape[2], attributes, ceil_div)

    found = run(kernels[*pair, table], grid, x, layout, table, bias, integers).double()

    expected = x.double() @ decompress(layout, torch.float64)[0].T + bias.double()
    assert bool(((found - expected).abs() <= ROUNDED[dtype] * expected.abs().max().clamp(min=1)).all())


@needs_compiler
def test_nan_in_an_activation_that_no_row_keeps_reaches_no_output(kernels: dict[tuple[str, str, str], Any]) -> None:
    pattern = VNM(4, 2, 8)
    layout = layout_for(pattern, 4, 8)
    x = torch.ones(1, 8)
    x[0, (decompress(layout)[0] == 0).all(0)] = torch.nan
    grid, integers = plugin.launch((1, 8), 4, 1, attributes_of(pattern, 8), ceil_div)

    found = run(kernels["float", "float", "unsigned char"], grid, x, layout, "unsigned char", torch.zeros(4), integers)

    assert bool(x.isnan().any()) and bool(found.isfinite().all())


@needs_compiler
@pytest.mark.parametrize("element", ["Half", "Bfloat16"])
def test_the_kernel_rounds_to_nearest_even_and_keeps_infinities(
    kernels: dict[tuple[str, str, str], Any], element: str
) -> None:
    dtype, pattern = TYPES[element], NM(1, 1)
    layout = compress(torch.ones(1, 1, 1, dtype=dtype), pattern, pattern.project(torch.ones(1, 1, 1)))
    ties = [part * 2.0**-power for part in (1, 3) for power in (8, 11)]  # halfway between two numbers above 1
    numbers = torch.tensor([*ties, torch.inf, -torch.inf, torch.nan])[:, None].to(dtype)
    grid, integers = plugin.launch((7, 1), 1, 1, attributes_of(pattern, 1), ceil_div)

    kernel, bias = kernels[element, element, "int"], torch.ones(1, dtype=dtype)
    found = run(kernel, grid, numbers, layout, "int", bias, integers)

    torch.testing.assert_close(found, (numbers.float() + 1).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("nvcc") or plugin._nvrtc()), reason="neither nvcc nor NVRTC is installed")
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("table", TABLES)
def test_the_kernel_compiles_to_ptx_with_the_parameters_that_tensorrt_gives(pair: tuple[str, str], table: str) -> None:
    code = plugin.ptx(*pair, table)

    declaration = code[code.index(".entry nm_linear(") :].partition(")")[0]
    kinds = [line.split()[1] for line in declaration.splitlines()[1:] if ".param" in line]
    assert [".u64"] * 5 + [".u32"] * 8 + [".u64"] == kinds
    assert ".target sm_75" in code


# Shapes and attributes


@given(st.one_of(nm_patterns(), vnm_patterns()), st.integers(1, 40), st.integers(1, 45))
def test_table_shapes_are_those_of_the_layout(pattern: NM | VNM, rows: int, cols: int) -> None:
    layout = layout_for(pattern, rows, cols)

    shapes = plugin.table_shapes(*attributes_of(pattern, cols), rows)

    assert {name: tuple(t.shape) for name, t in layout.tensors().items()} == {n: shapes[n] for n in layout.tensors()}
    if isinstance(pattern, NM):
        assert (1, 1, 1, pattern.m) == shapes["columns"]


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ((0, 5, 4, 8), "would keep 5 of every 4"),
        ((64, 3, 8, 8), "defined for N = 2"),
        ((64, 2, 3, 8), "4 <= M"),
        ((0, 2, 300, 8), "largest supported group is 256"),
        ((-1, 2, 8, 8), "V >= 1"),
        ((0, 2, 4, 0), "at least 1 row and 1 column, found 7 x 0"),
    ],
)
def test_senseless_attributes_are_refused(attributes: tuple[int, int, int, int], words: str) -> None:
    with pytest.raises(PatternError, match=words):
        plugin.table_shapes(*attributes, 7)


def test_the_grid_covers_every_token_and_row() -> None:
    grid, integers = plugin.launch((2, 3, 5, 96), 300, 12, (64, 2, 8, 96), ceil_div)

    assert (4, 3) == grid  # 30 tokens by 8, 300 rows by 128
    assert [30, 300, 96, 12, 64, 2, 8, 2] == integers
    assert (1, 1) == plugin.launch((96,), 1, 12, (0, 2, 8, 96), ceil_div)[0]


def test_the_kernel_and_its_launch_agree_on_the_tile() -> None:
    text = plugin.SOURCE.read_text()

    assert f"constexpr int ROWS = {plugin.ROWS};" in text
    assert f"constexpr int TOKENS = {plugin.TOKENS};" in text


# Registration


def test_without_tensorrt_registration_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)

    with pytest.raises(UsageError, match=r"full TensorRT 10\.7 or newer .*tensorrt cannot be imported: pip install"):
        plugin.register()


def test_an_older_tensorrt_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, Any] = dict(tensorrt_stand_in.modules())
    modules["tensorrt"].__version__, modules["tensorrt.plugin"] = "10.6.0", object()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    with pytest.raises(UsageError, match=r"found 10\.6\.0; pip install --upgrade tensorrt"):
        plugin.register()


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> tensorrt_stand_in.Plugins:
    """What was registered with a stand-in that has TensorRT's documented rules."""
    modules: dict[str, Any] = tensorrt_stand_in.modules()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(plugin, "ptx", lambda *types: types)
    monkeypatch.setattr(plugin, "_nvrtc", lambda: object())
    plugin.register()
    found: tensorrt_stand_in.Plugins = modules["tensorrt.plugin"]
    return found


def described(layout: SparseLayout, x: tuple[int, ...], element: str = "float32", table: str = "int32") -> list[Any]:
    columns = (1, 1, 1, 4) if layout.columns is None else tuple(layout.columns.shape)
    shapes = [x, layout.values.shape, layout.positions.shape, columns, (layout.shape[1],)]
    types = [element, element, table, table, element]
    return [tensorrt_stand_in.TensorDesc(tuple(s), f"DataType.{t}") for s, t in zip(shapes, types, strict=True)]


def test_it_registers_under_the_nodes_name_and_domain_once(registered: tensorrt_stand_in.Plugins) -> None:
    plugin.register()

    assert ["sparsec::NMLinear"] == [*registered.registered] == [*registered.kernels]


def test_the_output_has_the_weights_rows_and_leaves_the_input_alone(registered: tensorrt_stand_in.Plugins) -> None:
    tensors = described(layout_for(VNM(4, 2, 5), 12, 10), (2, 3, 10), "float16")

    y = registered.registered[plugin.PLUGIN](*tensors, 4, 2, 5, 10)

    assert ([2, 3, 12], "DataType.float16") == (y.shape_expr, y.dtype)
    assert [2, 3, 10] == tensors[0].shape_expr


@needs_compiler
@pytest.mark.parametrize("pattern", ["4:2:5", "2:4"])
def test_what_it_asks_tensorrt_to_launch_gives_the_layers_outputs(
    registered: tensorrt_stand_in.Plugins, kernels: dict[tuple[str, str, str], Any], pattern: str
) -> None:
    chosen = Pattern.parse(pattern)
    layout, x, bias = layout_for(chosen, 130, 11), random(2, 5, 11, seed=1), random(130, seed=2)
    tensors, attributes = described(layout, (2, 5, 11)), attributes_of(chosen, 11)

    name, code, params, extra = registered.kernels[plugin.PLUGIN](*tensors, *attributes, (), 0)

    assert ("nm_linear", ("float", "float", "int"), plugin.ROWS) == (name, code, params.block_x)
    kernel = kernels["float", "float", "int"]
    found = run(kernel, (params.grid_x, params.grid_y), x.flatten(0, 1), layout, "int", bias, extra)
    expected = torch.nn.functional.linear(x, decompress(layout)[0], bias)
    torch.testing.assert_close(found.view_as(expected), expected)


@pytest.mark.parametrize(
    ("element", "table", "words"),
    [
        ("int8", "int32", "fp32, fp16 or bf16, x as bias; found DataType.int8"),
        ("float32", "int8", "uint8 or int32; found"),
    ],
)
def test_types_without_a_kernel_are_refused(
    registered: tensorrt_stand_in.Plugins, element: str, table: str, words: str
) -> None:
    tensors = described(layout_for(NM(2, 4), 4, 8), (1, 8), element, table)

    with pytest.raises(UsageError, match=words):
        registered.kernels[plugin.PLUGIN](*tensors, 0, 2, 4, 8, (), 0)


# The file


def packed_file(path: Path, pattern: str = "4:2:5", external: bool = False) -> SparseLayout:
    """One layer, 12 x 10, as onnx{weights=packed} writes it."""
    chosen = Pattern.parse(pattern)
    layout = layout_for(chosen, 12, 10)
    arrays = {f"w_{name}": table.numpy() for name, table in layout.tensors().items()} | {"b": numpy.ones(12, "float32")}
    if isinstance(chosen, NM):
        arrays["w_columns"] = numpy.arange(chosen.m, dtype="uint8").reshape(1, 1, 1, -1)
    names = ["x", "w_values", "w_positions", "w_columns", "b"]
    attributes = packed.linear_attributes(chosen, 10)
    node = helper.make_node(LINEAR, names, ["y"], "layer", domain=DOMAIN, **attributes)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", s]) for n, s in (("x", 10), ("y", 12))]
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("sparsec", 1)]
    model = helper.make_model(graph, functions=functions(20), opset_imports=opsets, ir_version=10)
    onnx.save(model, path, save_as_external_data=external, location="w.data", size_threshold=0)
    return layout


def edited(path: Path, change: Any) -> Path:
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("pattern", ["4:2:5", "2:4"])
def test_a_stripped_file_has_the_same_nodes_and_no_function(tmp_path: Path, pattern: str) -> None:
    packed_file(tmp_path / "in.onnx", pattern)

    assert (1, 0) == plugin.strip(tmp_path / "in.onnx", tmp_path / "out.onnx")

    before, after = onnx.load(tmp_path / "in.onnx"), onnx.load(tmp_path / "out.onnx")
    assert (["NMWeight", "NMLinear"], ["NMWeight"]) == tuple([f.name for f in m.functions] for m in (before, after))
    del before.functions[1]
    assert before == after


def test_only_the_plugin_runs_a_stripped_file(tmp_path: Path) -> None:
    packed_file(tmp_path / "in.onnx")
    onnxruntime.InferenceSession(tmp_path / "in.onnx")
    plugin.strip(tmp_path / "in.onnx", tmp_path / "out.onnx")

    with pytest.raises(Exception, match="NMLinear"):
        onnxruntime.InferenceSession(tmp_path / "out.onnx")


def test_external_weights_go_with_the_file(tmp_path: Path) -> None:
    packed_file(tmp_path / "in.onnx", external=True)
    (tmp_path / "there").mkdir()

    plugin.strip(tmp_path / "in.onnx", tmp_path / "there/out.onnx")

    assert onnx.load(tmp_path / "in.onnx").graph == onnx.load(tmp_path / "there/out.onnx").graph


def test_missing_external_weights_are_named(tmp_path: Path) -> None:
    packed_file(tmp_path / "in.onnx", external=True)
    (tmp_path / "w.data").unlink()

    with pytest.raises(ArtifactError, match=r"w\.data, which holds weights of the model, is missing"):
        plugin.strip(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def cut_positions(model: Any) -> None:
    table = next(one for one in model.graph.initializer if one.name == "w_positions")
    table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table)[:, :, :-1], "w_positions"))


def widened_columns(model: Any) -> None:
    table = next(one for one in model.graph.initializer if one.name == "w_columns")
    table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table).astype("int64"), "w_columns"))


def computed_values(model: Any) -> None:
    model.graph.node.insert(0, helper.make_node("Abs", ["w_values"], ["abs"]))
    model.graph.node[1].input[1] = "abs"


def as_strip(model: Any) -> None:
    next(one for one in model.graph.node[0].attribute if one.name == "m").i = 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: model.graph.node[0].attribute.pop(), "has no attribute"),
        (lambda model: model.graph.node[0].input.pop(), "has 4 inputs, expected 5"),
        (cut_positions, r"positions is UINT8 \(1, 12, 0\), expected \(1, 12, 1\)"),
        (widened_columns, r"columns is INT64 \(1, 3, 2, 4\), expected \(1, 3, 2, 4\)"),
        (computed_values, "values is no initializer"),
        (as_strip, "the plugin runs windows of columns, and this is a strip of 4 rows; compile to 4:2:8"),
    ],
)
def test_nodes_that_the_plugin_could_not_run_are_named(tmp_path: Path, change: Any, words: str) -> None:
    packed_file(tmp_path / "in.onnx")
    edited(tmp_path / "in.onnx", change)

    with pytest.raises(ArtifactError, match=f"sparsec::NMLinear node 'layer'.*{words}"):
        plugin.strip(tmp_path / "in.onnx", tmp_path / "out.onnx")


def test_the_command_says_how_many_layers_it_left_to_the_plugin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed_file(tmp_path / "in.onnx")

    assert 0 == plugin.main([str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx")])
    assert "out.onnx: 1 layers for the plugin sparsec::NMLinear, 0 other weights" in capsys.readouterr().out


def test_the_command_refuses_files_without_packed_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed_file(tmp_path / "in.onnx")
    plugin.strip(tmp_path / "in.onnx", tmp_path / "out.onnx")
    edited(tmp_path / "out.onnx", lambda model: model.graph.node.pop())
    (tmp_path / "text.onnx").write_text("no model")

    assert 2 == plugin.main([str(tmp_path / "out.onnx"), str(tmp_path / "x.onnx")])
    assert 1 == plugin.main([str(tmp_path / "text.onnx"), str(tmp_path / "x.onnx")])
    errors = capsys.readouterr().err
    assert "has no sparsec::NMLinear node; compile with --backend onnx{weights=packed}" in errors
    assert "cannot be read as an ONNX file" in errors
