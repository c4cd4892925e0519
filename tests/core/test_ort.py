"""sparsec.ort: the operator of the native library inside onnxruntime. Numbers against the layout's own reference."""

from __future__ import annotations

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from onnx_models import a_layout, expected, packed_model
from strategies import nm_patterns, vnm_patterns

from sparsec import ort
from sparsec.backend import FP32_TOLERANCE
from sparsec.backends.kernel.measuring import random_selection
from sparsec.errors import ArtifactError
from sparsec.layout import SparseLayout, compress
from sparsec.pattern import NM, VNM, Pattern, Strip
from sparsec.pipeline import relative_difference

needs_library = pytest.mark.skipif(ort.unavailable_reason() is not None, reason=str(ort.unavailable_reason()))


def options(threads: int = 1) -> onnxruntime.SessionOptions:
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads, made.log_severity_level = threads, 4
    return made


def plain_session(content: bytes) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(content, options(), providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def agrees(layout: SparseLayout, session: onnxruntime.InferenceSession, x: torch.Tensor) -> bool:
    found, wanted = run(session, x), expected(layout, x)
    return found.shape == wanted.shape and relative_difference(found, wanted) <= FP32_TOLERANCE


@needs_library
@hypothesis_settings(max_examples=40)
@given(
    pattern=st.one_of(nm_patterns(32), vnm_patterns(20, 32)),
    rows=st.integers(1, 40),
    cols=st.integers(1, 70),
    tokens=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_one_file_gives_the_same_numbers_with_and_without_the_library(
    pattern: Pattern, rows: int, cols: int, tokens: int, seed: int
) -> None:
    layout, x = a_layout(pattern, rows, cols, seed), torch.randn(tokens, cols)
    content = packed_model(layout)

    assert agrees(layout, plain_session(content), x)
    assert agrees(layout, ort.session(content, options()), x)


@needs_library
@pytest.mark.parametrize("lead", [(), (2, 3), (2, 0), (2, 1, 3)])
def test_the_library_takes_any_number_of_leading_axes(lead: tuple[int, ...]) -> None:
    layout, x = a_layout(NM(2, 4), 6, 9), torch.randn(*lead, 9)
    content = packed_model(layout, [f"size{i}" for i in range(len(lead))])

    assert agrees(layout, ort.session(content, options()), x)


@needs_library
@pytest.mark.parametrize("m", range(1, 33))
def test_every_group_size_and_its_tails(m: int) -> None:
    patterns = [NM(m // 2 + 1, m), *([VNM(16, 2, m), VNM(5, 2, m), Strip(16, 2, m)] if m >= 4 else [])]
    for pattern in patterns:
        for tail in sorted({1, m // 2, m - 1} - {0}) or [1]:
            layout, x = a_layout(pattern, 37, m + tail), torch.randn(3, m + tail)
            content = packed_model(layout)

            assert agrees(layout, plain_session(content), x), (pattern, tail)
            assert agrees(layout, ort.session(content, options()), x), (pattern, tail)


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
def test_every_token_count_on_every_thread_count(threads: int) -> None:
    layout = a_layout(VNM(16, 2, 5), 50, 33)
    session = ort.session(packed_model(layout), options(threads))

    assert all(agrees(layout, session, torch.randn(tokens, 33)) for tokens in [*range(70), 128, 200])


@needs_library
@pytest.mark.parametrize("pattern", [NM(2, 4), VNM(64, 2, 5), Strip(64, 2, 5)])
def test_a_large_layer_gives_the_same_bits_on_any_number_of_threads(pattern: Pattern) -> None:
    weight = torch.randn(1, 600, 520)
    layout = compress(
        weight, pattern, random_selection(pattern, weight.abs())
    )  # large enough for a second thread, even for one token
    sessions = [ort.session(packed_model(layout), options(threads)) for threads in (1, 2, 3)]

    for tokens in (1, 5, 40, 130):
        x = torch.randn(tokens, 520)
        one, *others = [run(session, x) for session in sessions]
        assert relative_difference(one, expected(layout, x)) <= FP32_TOLERANCE
        assert all(torch.equal(one, other) for other in others)


@needs_library
def test_the_registered_operator_runs_and_not_the_function(tmp_path: Path) -> None:
    content = packed_model(a_layout(NM(2, 4), 8, 8))
    for name in ("with", "without"):
        made = options()
        made.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        made.optimized_model_filepath = str(tmp_path / f"{name}.onnx")
        _ = ort.session(content, made) if name == "with" else onnxruntime.InferenceSession(content, made)

    kinds = {name: [n.op_type for n in onnx.load(tmp_path / f"{name}.onnx").graph.node] for name in ("with", "without")}
    assert kinds == {"with": ["NMLinear"], "without": ["Gemm"]}  # unpacked once, while loading


@needs_library
def test_two_threads_may_use_one_session() -> None:
    layout = a_layout(NM(2, 4), 64, 96)
    session = ort.session(packed_model(layout), options(2))
    inputs = [torch.randn(1 + 7 * i, 96) for i in range(24)]
    alone = [run(session, x) for x in inputs]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: run(session, x), inputs * 5))
    assert all(torch.equal(a, b) for a, b in zip(alone * 5, together, strict=True))


@needs_library
def test_options_may_be_used_again() -> None:
    layout, made = a_layout(NM(1, 4), 6, 9), options(2)
    first, second = (ort.session(packed_model(layout), made) for _ in range(2))

    x = torch.randn(2, 9)
    assert torch.equal(run(first, x), run(second, x))
    assert "2" == made.get_session_config_entry("sparsec.threads")


@needs_library
def test_columns_of_a_wide_strip_take_four_bytes() -> None:
    weight, pattern = torch.randn(1, 16, 32770), Strip(16, 2, 256)
    layout = compress(weight, pattern, random_selection(pattern, weight.abs()))

    assert layout.columns is not None and layout.columns.dtype == torch.int32
    assert agrees(layout, ort.session(packed_model(layout), options()), torch.randn(3, 32770))


def out_of_range(layout: SparseLayout) -> np.ndarray:
    columns = layout.columns.numpy().copy()  # type: ignore[union-attr]
    columns[0, 0, 0, 3] = 200
    return columns


def with_value(layout: SparseLayout, index: tuple[int, ...], value: float) -> np.ndarray:
    values = layout.values.numpy().copy()
    values[index] = value
    return values


VNM_LAYOUT = a_layout(VNM(4, 2, 5), 9, 13)  # 3 groups, the last of 3 columns
STRIP_LAYOUT = a_layout(Strip(16, 2, 5), 9, 13)
NM_LAYOUT = a_layout(NM(3, 5), 9, 12)  # the last group has 2 columns for 3 slots


@needs_library
@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        (VNM_LAYOUT, {"columns": out_of_range(VNM_LAYOUT)}, "up: a position or column is out of range"),
        (VNM_LAYOUT, {"in_features": 16}, r"up: values must have shape \(1, 9, 4, 2\), found \(1, 9, 3, 2\)"),
        (VNM_LAYOUT, {"in_features": 0}, "up: no kernel for n=2, m=5, v=4 of a weight 9 x 0"),
        (VNM_LAYOUT, {"in_features": 2**62}, "up: no kernel for n=2, m=5, v=4"),
        (VNM_LAYOUT, {"v": -1}, "up: no kernel for n=2, m=5, v=-1"),
        (VNM_LAYOUT, {"n": 3}, "up: no kernel for n=3, m=5, v=4"),
        (VNM_LAYOUT, {"in_features": 12}, "up: a position or column is out of range"),
        (VNM_LAYOUT, {"v": 2}, r"up: columns must have shape \(1, 5, 3, 4\), found \(1, 3, 3, 4\)"),
        (VNM_LAYOUT, {"values": with_value(VNM_LAYOUT, (0, 1, 1, 0), np.nan)}, "up: the values must be finite"),
        (STRIP_LAYOUT, {"columns": out_of_range(STRIP_LAYOUT)}, "up: a position or column is out of range"),
        (
            STRIP_LAYOUT,
            {"columns": np.zeros((1, 1, 3, 4), np.uint8)},
            "up: columns must be int16 or int32, found element",
        ),
        (STRIP_LAYOUT, {"v": 8}, "up: no kernel for n=2, m=5, v=8"),
        (STRIP_LAYOUT, {"in_features": 12}, "up: a position or column is out of range"),
        (VNM_LAYOUT, {"columns": np.zeros((1, 3, 3, 4), np.int16)}, "up: columns must be uint8, found element type 5"),
        (NM_LAYOUT, {"values": with_value(NM_LAYOUT, (0, 4, 2, 2), 1.0)}, "up: a padding slot holds a value other"),
        (NM_LAYOUT, {"positions": NM_LAYOUT.positions.numpy() | 255}, "up: a position or column is out of range"),
        (NM_LAYOUT, {"values": np.zeros((1, 9, 3, 3), np.int8)}, "up: values must be float or bfloat16, found element"),
        (NM_LAYOUT, {"columns": np.zeros((1, 1, 1, 5), np.uint8)}, "up: columns of an N:M weight must be the offsets"),
        (
            NM_LAYOUT,
            {"positions": NM_LAYOUT.positions.numpy()[0]},
            r"up: positions must be .* shape \(1, rows, bytes\)",
        ),
    ],
)
def test_a_damaged_node_is_refused_when_the_session_is_made(
    layout: SparseLayout, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        ort.session(packed_model(layout, change=change), options())


@needs_library
def test_a_table_that_is_no_constant_is_refused() -> None:
    with pytest.raises(ArtifactError, match="up: values must be a constant of the file"):
        ort.session(packed_model(NM_LAYOUT, inputs=["values"]), options())


@needs_library
def test_wrong_inputs_are_refused_in_words() -> None:
    session = ort.session(packed_model(NM_LAYOUT, inputs=["bias"]), options())
    x, bias = np.zeros((2, 12), np.float32), np.zeros(9, np.float32)

    with pytest.raises(Exception, match=r"up: x must have shape \(\.\.\., 12\), found \(2, 11\)"):
        session.run(None, {"x": x[:, :11], "bias": bias})
    with pytest.raises(Exception, match=r"up: bias must have shape \(9\), found \(8\)"):
        session.run(None, {"x": x, "bias": bias[:8]})
    assert np.array_equal(np.zeros((2, 9), np.float32), session.run(None, {"x": x, "bias": bias})[0])


@needs_library
@pytest.mark.parametrize(
    ("entry", "message"), [("0", "sparsec.threads must be 1 to 4096, found 0"), ("many", "found many")]
)
def test_a_wrong_pool_size_is_refused(entry: str, message: str) -> None:
    made = options()
    made.add_session_config_entry(ort.THREADS, entry)

    with pytest.raises(Exception, match=message):
        made.register_custom_ops_library(str(ort.library()))


@needs_library
def test_without_our_entry_the_library_finds_a_pool_size() -> None:
    made = options(2)
    made.register_custom_ops_library(str(ort.library()))
    session = onnxruntime.InferenceSession(packed_model(NM_LAYOUT), made, providers=["CPUExecutionProvider"])

    assert agrees(NM_LAYOUT, session, torch.randn(300, 12))


@needs_library
def test_the_level_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEC_ISA", "portable")
    assert agrees(NM_LAYOUT, ort.session(packed_model(NM_LAYOUT), options()), torch.randn(5, 12))

    monkeypatch.setenv("SPARSEC_ISA", "mmx")
    with pytest.raises(ArtifactError, match="up: SPARSEC_ISA=mmx is not known here; expected avx512, avx2 or portable"):
        ort.session(packed_model(NM_LAYOUT), options())


@pytest.mark.parametrize("cause", ["not built", "reference"])
def test_without_the_library_the_file_runs_and_a_warning_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cause: str
) -> None:
    if cause == "reference":
        monkeypatch.setenv("SPARSEC_ISA", "reference")
    else:
        monkeypatch.delenv("SPARSEC_ISA", raising=False)
        monkeypatch.setattr(ort, "_found", list)
    with caplog.at_level(logging.WARNING, "sparsec"):
        session = ort.session(packed_model(NM_LAYOUT), options())

    assert agrees(NM_LAYOUT, session, torch.randn(4, 12))
    assert cause in caplog.text
    assert "dense speed" in caplog.text


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nonsense")

    with pytest.raises(ArtifactError, match=r"model\.onnx: onnxruntime cannot load it"):
        ort.session(tmp_path / "model.onnx", options())


def test_a_session_needs_no_torch() -> None:
    code = "import sys, sparsec.ort, onnxruntime; sparsec.ort.unavailable_reason(); print('torch' in sys.modules)"

    assert (
        "False"
        == subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    )
