"""Every architecture of `zoo`: traced, pruned, lowered, stored, loaded elsewhere, and equal to the model all the way.

SPARSEC_UPDATE=1 renews the counts of expected.json; read the difference before you commit it. A run over all of the
architectures writes docs/architectures.md.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from architectures import report, steps
from zoo import NOT_TRACEABLE, ZOO

from sparsec import trace
from sparsec.backends.onnx.backend import Weights
from sparsec.errors import TraceError

FAST = frozenset(
    {"bert", "albert", "deberta-v3like", "squeezebert", "gpt2", "mixtral", "mamba", "t5", "levit", "llama"}
)  # fmt: skip
BF16 = (
    "bert",
    "deberta-v3like",
    "gpt2",
    "llama",
    "mixtral",
    "t5",
    "vit",
    "levit",
    "convnext",
    "clip",
    "whisper",
    "opt",
)
TRACING = 1.5  # times torch.export alone
TRACEABLE = [name for name in ZOO if name not in NOT_TRACEABLE]
UPDATE = bool(os.environ.get("SPARSEC_UPDATE"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file an architecture; test processes share the folder."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "architectures"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def fresh() -> Iterator[steps.FreshProcess]:
    process = steps.FreshProcess()
    yield process
    process.close()


@pytest.fixture(scope="session", autouse=True)
def _warm() -> None:
    """The first export of a process imports what all share."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    trace(torch.nn.Linear(2, 2), (torch.ones(2, 2),))


def marked(names: Any) -> list[Any]:
    return [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", marked(TRACEABLE))
def test_architecture(
    name: str, tmp_path: Path, rows: Path, fresh: steps.FreshProcess, request: pytest.FixtureRequest
) -> None:
    case = ZOO[name]()
    row: dict[str, Any] = {
        "class": type(case.model).__name__, "parameters": sum(p.numel() for p in case.model.parameters()),
    }  # fmt: skip
    orders = [("trace",)] if len(selected(request)) < len(TRACEABLE) else [("trace", "bare"), ("bare", "trace")]
    program = steps.traced(case, row, orders[TRACEABLE.index(name) % len(orders)])
    row |= {"sizes": list(program.dims), "set_to_zero": program.origin.get("set_to_zero", [])}
    row["eval"] = steps.check_eval(case, program)
    row["operators"] = steps.used_operators(program)
    steps.check_training(case, program)
    row["dense"] = dict(steps.check_every_matrix(case, program))
    row["sites"] = dict(Counter(site.kind for site in program.sites))
    for pattern in ("2:4", "16:2:8"):
        frozen, expected = steps.pruned(case, program, pattern)
        folder = tmp_path / pattern.replace(":", "-")
        row[pattern] = fresh.difference(folder, steps.lowered(frozen), case.other_inputs(), expected)
        assert row[pattern] <= steps.LOWERED
    if not UPDATE:
        known = json.loads(report.EXPECTED.read_text())[name]
        assert (known["sites"], known["dense"]) == (row["sites"], row["dense"])
    (rows / f"{name}.json").write_text(json.dumps(row))
    finish(rows, request)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "bert" else [pytest.mark.slow]) for n in BF16])
def test_architecture_in_bfloat16(
    name: str, tmp_path: Path, rows: Path, fresh: steps.FreshProcess, request: pytest.FixtureRequest
) -> None:
    case = ZOO[name]().in_dtype(torch.bfloat16)
    program = trace(case.model, case.inputs, case.dynamic, case.limits)
    frozen, expected = steps.pruned(case, program, "2:4", steps.BF16)
    found = fresh.difference(tmp_path / "p", steps.lowered(frozen), case.other_inputs(), expected)

    assert found <= steps.BF16
    (rows / f"{name}.bf16").write_text(json.dumps(found))
    finish(rows, request)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACEABLE)
def test_architecture_in_onnxruntime(name: str, tmp_path: Path, rows: Path, request: pytest.FixtureRequest) -> None:
    case = ZOO[name]()
    program = trace(case.model, case.inputs, case.dynamic, case.limits)
    frozen, _ = steps.pruned(case, program, "16:2:8")
    found = {weights: steps.as_onnx(case, frozen, weights, tmp_path / weights) for weights in get_args(Weights)}

    assert max(found.values()) <= steps.ONNX
    (rows / f"{name}.onnx").write_text(json.dumps(found))
    finish(rows, request)


@pytest.mark.parametrize("name", sorted(NOT_TRACEABLE))
def test_what_cannot_be_traced_is_refused_with_the_module_and_the_line(name: str) -> None:
    assert "longformer.encoder.layer.0.attention.self" in refusal(name)
    assert "modeling_longformer.py:" in refusal(name)


def refusal(name: str) -> str:
    case = ZOO[name]()
    with pytest.raises(TraceError) as caught:
        trace(case.model, case.inputs, case.dynamic, case.limits)
    return str(caught.value)


def selected(request: pytest.FixtureRequest) -> list[str]:
    items = {item.name for item in request.session.items}
    return [name for name in TRACEABLE if f"test_architecture[{name}]" in items]


def finish(folder: Path, request: pytest.FixtureRequest) -> None:
    """After the last architecture of a run the counts; after the last of all the documents and the bound on tracing."""
    rows, names = report.load(folder), selected(request)
    if set(names) != rows.keys():
        return
    if UPDATE:
        report.write_expected(rows)
    others = [*((name, "bf16") for name in BF16), *((name, "onnx") for name in TRACEABLE)]
    if len(names) < len(TRACEABLE) or not all((folder / f"{name}.{what}").exists() for name, what in others):
        return
    for name, what in others:
        rows[name][what] = json.loads((folder / f"{name}.{what}").read_text())
    report.write_docs({name: rows[name] for name in names}, {name: refusal(name) for name in sorted(NOT_TRACEABLE)})
    ratio = report.tracing_ratio(rows)
    assert ratio <= TRACING, f"tracing took {ratio:.2f} times torch.export alone"
