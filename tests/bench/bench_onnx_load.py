"""How long onnxruntime takes to load one packed layer, by the form of NMWeight: python tests/bench/bench_onnx_load.py

A layer of 3072 x 768 as a file of its own; thread CPU seconds of making a session on one thread, which unpacks and
folds the weight; in turns of changing order, the fastest of each. `dense` is the same layer as a plain Gemm, `sparsec`
the packed file with sparsec's library, which packs the tables for its kernels instead. Exit 1 when another form is
clearly faster over all patterns than the one that functions.py has, or when that takes more than 0.05 s more than dense
for 64:2:5.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from sparsec import ort
from sparsec.backends.onnx.functions import LINEAR_TEXT, WEIGHT_TEXT, function
from sparsec.layout import SparseLayout, decompress
from sparsec.pattern import Pattern

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from onnx_models import OPSET, a_layout, packed_model

ROWS, COLS = 3072, 768
PATTERNS = ("2:4", "64:2:5", "64:2:8", "2:5")
SECONDS = 0.05  # more than dense
CLEAR = 1.1  # times faster that another form must be

_SCATTER = '    weight = ScatterElements <axis = 1, reduction = "add"> (zeros, column, kept_values)\n'
_SCATTER_ND = """
    row_range = Range (zero, row_count, one)
    row_column = Unsqueeze (row_range, axis_1)
    row_of_all = Expand (row_column, table_shape)
    wide_column = Cast <to = 7> (column)
    row_part = Unsqueeze (row_of_all, axis_2)
    column_part = Unsqueeze (wide_column, axis_2)
    places = Concat <axis = 2> (row_part, column_part)
    weight = ScatterND <reduction = "add"> (zeros, places, kept_values)
"""
_COMPARED = """
    starts_32 = Cast <to = 6> (group_starts)
    start_of_field = Gather <axis = 0> (starts_32, field_group)
    in_group = Sub (column, start_of_field)
    grouped = Concat <axis = 0> (all_rows, groups, kept, axis_1)
    offset = Reshape (in_group, grouped)
    value = Reshape (values, grouped)
    m_range = Range (zero, group_size, one)
    m_ids = Cast <to = 6> (m_range)
    hit = Equal (offset, m_ids)
    nothing = Constant <value_float = 0.0> ()
    at_place = Where (hit, value, nothing)
    summed = ReduceSum <keepdims = 0> (at_place, axis_2)
    one_row = Concat <axis = 0> (all_rows, flat)
    with_tail = Reshape (summed, one_row)
    weight = Slice (with_tail, axis_0, width_1, axis_1)
"""
_GEMM = "    y = Gemm <transB = 1> (x, weight, bias)\n"
_TURNED = """
    turned = Transpose <perm = [1, 0]> (weight)
    product = MatMul (x, turned)
    y = Add (product, bias)
"""


def replaced(text: str, old: str, new: str) -> str:
    """The text with a part replaced, which must be there."""
    assert old in text, old
    return text.replace(old, new)


FORMS: dict[str, tuple[str, str]] = {
    "ScatterElements": (WEIGHT_TEXT, LINEAR_TEXT),
    "ScatterND": (replaced(WEIGHT_TEXT, _SCATTER, _SCATTER_ND), LINEAR_TEXT),
    "Equal, ReduceSum": (replaced(WEIGHT_TEXT, _SCATTER, _COMPARED), LINEAR_TEXT),
    "indices in 64 bits": (replaced(WEIGHT_TEXT, "to = 6", "to = 7"), LINEAR_TEXT),
    "Transpose, MatMul": (WEIGHT_TEXT, replaced(LINEAR_TEXT, _GEMM, _TURNED)),
}  # fmt: skip
CHOSEN = "ScatterElements"


def with_functions(content: bytes, texts: tuple[str, str]) -> bytes:
    """A packed file with other functions."""
    model = onnx.load_from_string(content)
    del model.functions[:]
    model.functions.extend(function(text, OPSET) for text in texts)
    changed: bytes = model.SerializeToString()
    return changed


def dense_model(layout: SparseLayout) -> bytes:
    """The same layer as one Gemm on a dense weight."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", COLS])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", ROWS])
    tensors = [numpy_helper.from_array(decompress(layout)[0].numpy(), "w")]
    graph = helper.make_graph([helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)], "layer", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    content: bytes = model.SerializeToString()
    return content


def load(content: bytes, make: Callable[..., Any] = onnxruntime.InferenceSession) -> tuple[float, Any]:
    """Thread CPU seconds of making a session, and the session."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    start = time.thread_time()
    session = make(content, options)
    return time.thread_time() - start, session


def measured(pattern: str, rounds: int) -> dict[str, float]:
    """Seconds of every form; all must give the same numbers."""
    layout = a_layout(Pattern.parse(pattern), ROWS, COLS)
    content = packed_model(layout)
    files: dict[str, tuple[bytes, Any]] = {"dense": (dense_model(layout), onnxruntime.InferenceSession)}
    for name, texts in FORMS.items():
        files[name] = (with_functions(content, texts), onnxruntime.InferenceSession)
    if ort.unavailable_reason() is None:
        files["sparsec"] = (content, ort.session)
    x = np.eye(COLS, dtype=np.float32)[:4]
    found = [load(*files[name])[1].run(None, {"x": x})[0] for name in FORMS]
    assert all(np.array_equal(found[0], other) for other in found)
    seconds: dict[str, list[float]] = {name: [] for name in files}
    names = list(files)
    for turn in range(rounds):
        for name in random.Random(turn).sample(names, len(names)):  # what ran before leaves memory behind, or none
            seconds[name].append(load(*files[name])[0])
    return {name: min(all_) for name, all_ in seconds.items()}


def main() -> int:
    """Measure every pattern, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    table = {pattern: measured(pattern, asked.rounds) for pattern in PATTERNS}
    means = {name: statistics.geometric_mean([row[name] for row in table.values()]) for name in FORMS}
    missed = [
        f"{name} loads {means[CHOSEN] / mean:.2f} times as fast as {CHOSEN}, over all patterns"
        for name, mean in means.items()
        if mean * CLEAR < means[CHOSEN]
    ]
    over = table["64:2:5"][CHOSEN] - table["64:2:5"]["dense"]
    missed += [f"64:2:5: {over:.3f} s more than dense"] if over > SECONDS else []
    if asked.json:
        print(json.dumps({"seconds": table, "missed": missed}))
        return int(bool(missed))
    names = list(next(iter(table.values())))
    print(f"{ROWS} x {COLS}, onnxruntime {onnxruntime.__version__}, milliseconds of thread CPU time to load\n")
    print("| pattern | " + " | ".join(names) + " |\n" + "|---" * (1 + len(names)) + "|")
    for pattern, row in table.items():
        print(f"| {pattern} | " + " | ".join(f"{1e3 * row[name]:.1f}" for name in names) + " |")
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
