"""The lower pass packs weights into tables and keeps what the program computes."""

from __future__ import annotations

import pytest
import torch
from models import Classifier, Dropouts, Residual, Tied, made, random
from torch import nn

from sparsec import PassManager, Program, _fx, trace
from sparsec.errors import GraphError, SparsecError
from sparsec.layout import Values, compress, decompress, stored_as, table_bytes
from sparsec.ops import layout_of, nm_linear
from sparsec.passes.lower import Lower
from sparsec.pattern import Pattern
from sparsec.pipeline import CLOSE, Note, relative_difference

ROUNDED = 3e-2  # two small layers whose weights, and for int8 V:N:M activations, keep 7 bits and more
PATTERNS = ["2:4", "1:4", "2:5", "3:2:5", "64:2:8", "4:2:5@strip", "4:2:5+2:4", "unstructured:0.7"]


def frozen(net: type[nn.Module] = Residual, pattern: str = "2:4") -> Program:
    shape = {Tied: (2, 6), Dropouts: (2, 3, 4)}.get(net, (2, 5))
    return PassManager.parse(f"mask{{pattern={pattern}}} | freeze").run(trace(made(net), (random(*shape),)))


def lowered(program: Program) -> Program:
    return PassManager((Lower(),)).run(program)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparse_layers_call_the_operator_on_tables_that_hold_the_weight(pattern: str) -> None:
    before = frozen(pattern=pattern)
    after = lowered(before)

    assert [] == list(_fx.calls(after.module.graph, torch.ops.aten.linear.default))
    assert not any(name.endswith(".weight") for name, _ in after.module.named_parameters())
    for site, node in zip(before.sites, _fx.calls(after.module.graph, nm_linear), strict=True):
        tables = [None if arg is None else _fx.get_tensor(after.module, str(arg.target)) for arg in node.args[1:4]]
        layout = layout_of(*tables, *node.args[5:])  # type: ignore[arg-type]
        assert (Pattern.parse(pattern).executable, site.shape) == (layout.pattern, layout.shape)
        assert table_bytes(layout.pattern, site.shape) == layout.nbytes
        assert torch.equal(site.read(before.module), decompress(layout))


def test_the_new_nodes_are_typed_and_keep_their_scope() -> None:
    before = frozen()
    after = lowered(before)
    types = [node.meta["type"] for node in _fx.calls(before.module.graph, torch.ops.aten.linear.default)]
    scopes = [node.meta["scope"] for node in _fx.calls(before.module.graph, torch.ops.aten.linear.default)]

    assert types == [node.meta["type"] for node in _fx.calls(after.module.graph, nm_linear)]
    assert scopes == [node.meta["scope"] for node in _fx.calls(after.module.graph, nm_linear)] == ["up", "down"]


def test_a_tied_weight_has_one_set_of_tables_for_all_users() -> None:
    before = frozen(Tied)
    after, x = lowered(before), random(3, 6)

    assert {"first.weight_values", "first.weight_positions"} == dict(after.module.named_buffers()).keys()
    assert 2 == len(list(_fx.calls(after.module.graph, nm_linear)))
    assert 2 == len(after.sites["first.weight"].users)
    assert relative_difference(after(x)["output"], before(x)["output"]) <= CLOSE


def test_a_layer_without_bias_is_lowered() -> None:
    net = made(lambda: nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU()))
    program = PassManager.parse("mask{pattern=2:4} | freeze").run(trace(net, (random(2, 5),)))
    after = lowered(program)

    assert next(iter(_fx.calls(after.module.graph, nm_linear))).args[4] is None
    assert relative_difference(after(random(3, 5))["output"], program(random(3, 5))["output"]) <= CLOSE


def test_dropout_is_removed() -> None:
    before = frozen(Dropouts)
    before.set_mode("train")
    after, x = lowered(before), random(3, 3, 4)
    before.set_mode("eval")

    assert [] == list(_fx.calls(after.module.graph, torch.ops.aten.dropout.default))
    assert relative_difference(after(x)["output"], before(x)["output"]) <= CLOSE


def test_a_site_without_selection_keeps_its_linear_and_is_reported() -> None:
    before = frozen(Classifier)
    after, (report,) = PassManager((Lower(),)).run_reported(before)

    assert ({"lowered": 1}, (Note("head.weight", before.sites["head.weight"].excluded or ""),)) == (
        report.data, report.notes
    )  # fmt: skip
    assert 1 == len(list(_fx.calls(after.module.graph, torch.ops.aten.linear.default)))
    assert torch.equal(made(Classifier).head.weight, after.sites["head.weight"].read(after.module)[0])


def test_a_weight_that_is_not_zero_outside_its_selection_is_refused() -> None:
    program = frozen().clone()
    program.sites["up.weight"].write(program.module, torch.ones(1, 8, 5))

    with pytest.raises(GraphError, match=r"up\.weight: the weight is not zero outside its selection"):
        lowered(program)


@pytest.mark.parametrize("text", ["lower", "mask{pattern=2:4}", "mask{pattern=2:4} | freeze"])
def test_a_lowered_program_is_not_worked_on_again(text: str) -> None:
    program = lowered(frozen())
    before = program.dump()

    with pytest.raises(SparsecError):
        PassManager.parse(text).run(program)
    assert before == program.dump()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_outputs_are_close_as_declared(pattern: str) -> None:
    before = frozen(pattern=pattern)
    after = PassManager((Lower(),)).run(before, check="outputs")

    assert "close" == Lower.equivalence
    for batch in (1, 5):
        x = random(batch, 5, seed=batch)
        assert relative_difference(after(x)["output"], before(x)["output"]) <= CLOSE


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5), (0, 5)])
def test_the_operator_takes_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    program = lowered(frozen(pattern="3:2:5"))
    node = next(iter(_fx.calls(program.module.graph, nm_linear)))
    tables = [_fx.get_tensor(program.module, str(arg.target)) for arg in node.args[1:5]]

    assert (*shape[:-1], 8) == tuple(nm_linear(random(*shape), *tables, *node.args[5:]).shape)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_operator_keeps_torchs_contract(pattern: str) -> None:
    program = lowered(frozen(pattern=pattern))
    node = next(iter(_fx.calls(program.module.graph, nm_linear)))
    tables = [
        None if arg is None else _fx.get_tensor(program.module, str(arg.target)).detach() for arg in node.args[1:5]
    ]

    torch.library.opcheck(
        nm_linear, (random(2, 5), *tables, *node.args[5:]), test_utils=["test_schema", "test_faketensor"]
    )


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_rounded_values_are_stored_and_declared_lossy(pattern: str, values: Values) -> None:
    before = frozen(pattern=pattern)
    after = PassManager((Lower(values),)).run(before, check="outputs")

    assert ("lossy", "close") == (Lower(values).equivalence, Lower().equivalence)
    assert f"lower{{values={values}}}" == str(Lower(values))
    for site, node in zip(before.sites, _fx.calls(after.module.graph, nm_linear), strict=True):
        tables = [None if arg is None else _fx.get_tensor(after.module, str(arg.target)) for arg in node.args[1:4]]
        scales = _fx.get_tensor(after.module, f"{site.name}_scales") if values == "int8" else None
        layout = layout_of(*tables, *node.args[5:7], scales)  # type: ignore[arg-type]
        exact = compress(site.read(before.module), site.pattern, site.selection)  # type: ignore[arg-type]
        assert values == layout.stored
        assert torch.equal(decompress(stored_as(exact, values)), decompress(layout))
    x = random(3, 5, seed=1)
    assert relative_difference(after(x)["output"], before(x)["output"]) <= ROUNDED


@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_a_convolution_reads_rounded_weights_in_its_own_type(values: Values) -> None:
    net = made(lambda: nn.Sequential(nn.Conv1d(4, 6, 3)))
    traced = trace(net, (random(2, 4, 9),))
    traced = traced.replace(sites=traced.sites.with_targets({"0.weight": "2:4"}))
    program = PassManager.parse("mask | freeze").run(traced)
    after = PassManager((Lower(values),)).run(program)
    x = random(2, 4, 9, seed=1)

    assert torch.float32 == after(x)["output"].dtype
    assert 0.0 < relative_difference(after(x)["output"], program(x)["output"]) <= ROUNDED
