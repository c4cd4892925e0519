"""What the TensorRT backend refuses before any work, and what it says then."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from models import random
from tensorrt_models import DYNAMIC, compiled, needs_rtx, targeted, wide

from sparsec.backends.tensorrt import driver
from sparsec.backends.tensorrt.backend import TensorRTBackend
from sparsec.backends.tensorrt.layers import NOT_BUILT
from sparsec.errors import RecipeError, UsageError
from sparsec.recipe import make_backend
from sparsec.tracing import trace


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [("64:2:5", "add --also"), ("4:8", "add --also"), ("unstructured:0.7", "choose"), ("64:2:8@strip", "choose")],
)
def test_a_pattern_without_a_kernel_is_refused_by_name_with_advice(pattern: str, advice: str) -> None:
    reason = TensorRTBackend(driver="none").refuses(targeted(pattern))

    assert reason is not None
    assert f"up.weight: TensorRT accelerates only 2:4, found {pattern}; {advice} 2:4" in reason


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8", "64:2:8", "16:2:4", "1:3"])
def test_a_pattern_that_is_also_2_of_4_is_taken(pattern: str) -> None:
    assert TensorRTBackend(driver="none").refuses(targeted(pattern)) is None


def test_a_refusal_comes_before_any_pass_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"up\.weight: TensorRT accelerates only 2:4"):
        compiled(tmp_path / "no.sparsec", "64:2:5", "tensorrt{driver=none}")

    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('tensorrt{sizes="batch=8:4:2"}', "does not ascend"),
        ("tensorrt{workspace_mb=-1}", "expected 0"),
        ("tensorrt{timing_cache=notes.txt}", "expected a name on .cache"),
        ("tensorrt{driver=cuda}", "driver"),
        ("tensorrt{precision=int4}", "precision"),
    ],
)
def test_options_that_cannot_be_are_refused(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        make_backend(text)


def test_sizes_that_the_model_does_not_take_are_refused_before_any_pass() -> None:
    program = trace(wide(), [random(2, 3, 320)], DYNAMIC, limits={"length": 16})
    backend = make_backend('tensorrt{driver=none, sizes="length=1:8:99"}')

    assert "length of 1 to 99, and the model takes 1 to 16" in (backend.refuses(program) or "")


def test_without_tensorrt_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.importlib.util, "find_spec", lambda name: None)

    reason = TensorRTBackend().unavailable() or ""

    assert "pip install 'sparsec[rtx]'" in reason
    assert "pip install 'sparsec[tensorrt]'" in reason
    assert "'tensorrt{driver=none}'" in reason


@needs_rtx
@pytest.mark.skipif(driver.gpus() > 0, reason="there is a GPU")
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tensorrt{driver=rtx, precision=fp16}", "use --dtype fp16"),
        ("tensorrt{driver=rtx, timing_cache=my.cache}", "times nothing"),
        ("tensorrt{driver=rtx, refit=true}", "needs a GPU"),
        ("tensorrt{driver=rtx, strip=true}", "needs a GPU"),
    ],
)
def test_what_rtx_cannot_do_is_said_before_the_model_is_loaded(text: str, says: str) -> None:
    assert says in (make_backend(text).unavailable() or "")


def test_full_tensorrt_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(driver, "gpus", lambda: 0)

    assert "there is none here" in (TensorRTBackend(driver="tensorrt").unavailable() or "")
    assert TensorRTBackend(driver="none").unavailable() is None


def test_verification_needs_no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(driver.importlib.util, "find_spec", lambda name: None if "tensorrt" in name else found(name))

    assert TensorRTBackend().unavailable() is not None
    assert TensorRTBackend().cannot_verify() is None


@pytest.mark.slow
def test_without_a_driver_the_onnx_file_and_the_script_are_written_and_the_reports_say_so(tmp_path: Path) -> None:
    artifact = compiled(tmp_path / "none.sparsec", "64:2:8", "tensorrt{driver=none}")

    assert {"model.onnx", "layers.json", "build.sh"} == {path.name for path in (artifact.root / "tensorrt").iterdir()}
    assert all(check.ok for check in artifact.verify())
    assert NOT_BUILT in (artifact.root / "README.md").read_text()
    assert {NOT_BUILT} == {site["verdicts"]["tensorrt"]["reason"] for site in artifact.manifest["sites"]}
