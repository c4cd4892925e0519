"""Translate a program to an ONNX model in memory, through torch's own exporter.

1. Weights keep their names and their (rows, cols) layout: see `operators`.
2. The optimizer does not see the sites' values: it can neither fold, merge nor rename them.
3. Nothing of this machine is in the model: the same program gives the same bytes.
4. torch would trace the graph a second time to take operators apart that ONNX has no form for. It is asked to only
   where there are such operators left: `simplify` replaces the usual ones.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from sparsec import _fx
from sparsec.backends.onnx.operators import translations
from sparsec.backends.onnx.simplifying import simplify
from sparsec.errors import ArtifactError
from sparsec.program import Program
from sparsec.tracing import MAX_SIZE
from sparsec.version import __version__

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

    from sparsec.backends.onnx.backend import Form


_BFLOAT16_OPSET = 22  # the first in which all operators take it; what all others are written in is torch's choice


def translate(program: Program, form: Form = "gemm") -> Any:
    """The finished ONNX model, as onnx_ir's object. Edits the program's module."""
    _prepare(program)
    model = _translate(program, form)
    _finish(model, program)
    return model


def _prepare(program: Program) -> None:
    """Inference only; and +0.0 for the -0.0 that a kept weight may be, as in the packed tables."""
    program.set_mode("eval")
    simplify(program.module)
    _forget_strides(program.module)
    _separate_outputs(program)
    program.module.recompile()
    for site in program.sites.sparse:
        site.write(program.module, site.read(program.module) + 0.0)


def _forget_strides(module: GraphModule) -> None:
    """torch takes attention apart for ONNX, and its output then lies otherwise in memory: no view may rely on that."""
    for node in _fx.calls(module.graph, torch.ops.aten.scaled_dot_product_attention.default):
        copied = _fx.call(node.next, torch.ops.aten.clone.default, (node,), node.meta[_fx.TYPE], "attended")
        copied.update_kwarg("memory_format", torch.contiguous_format)
        for user in [user for user in node.users if user is not copied]:
            user.replace_input_with(node, copied)
    for node in _fx.calls(module.graph, torch.ops.aten.view.default):
        args = (node.args[0], node.args[1])
        _fx.replace(node, _fx.call(node, torch.ops.aten.reshape.default, args, node.meta[_fx.TYPE], "reshape"))


def _separate_outputs(program: Program) -> None:
    """A value has one name in ONNX: an output that is also an input, or is returned twice, becomes a copy."""
    (output,) = program.module.graph.find_nodes(op="output")
    results, taken = dict(output.args[0]), set(program.module.graph.find_nodes(op="placeholder"))
    if clash := sorted(program.inputs.keys() & results.keys()):
        raise ArtifactError(
            f"{clash[0]} names an input and an output of the model, and ONNX needs two names; "
            "rename the output, or leave onnx out of --backend"
        )
    for name, value in results.items():
        if value in taken:
            results[name] = _fx.call(output, torch.ops.aten.clone.default, (value,), value.meta[_fx.TYPE], name)
        taken.add(value)
    output.args = (results,)


def _translate(program: Program, form: Form) -> Any:
    """The ONNX model, as onnx_ir's object, optimized."""
    with _quiet():
        import torch.onnx
        from onnxscript.optimizer import optimize_ir

        try:
            model = _to_onnx(_kept_whole(_exported(program)), program, form)
        except torch.onnx.OnnxExporterError:
            model = _to_onnx(_exported(program), program, form)
        with _hidden(model, [site.name for site in program.sites]):
            optimize_ir(model, num_iterations=1)  # a second finds next to nothing
    return model


def _exported(program: Program) -> ExportedProgram:
    return torch.export.export(
        program.module.eval(),
        tuple(program.inputs.values()),
        dynamic_shapes=_dynamic_shapes(program),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,  # as when it was traced: a guard would fix a size
    )


def _kept_whole(exported: ExportedProgram) -> ExportedProgram:
    """The same, which the exporter takes apart only if it names an operator that the graph has (rule 4)."""
    take_apart = exported.run_decompositions

    def where_needed(table: Any = None) -> ExportedProgram:
        named = any(node.target in (table or {}) for node in exported.graph.nodes)
        return take_apart(table) if named else exported

    exported.run_decompositions = where_needed
    return exported


def _to_onnx(exported: ExportedProgram, program: Program, form: Form) -> Any:
    made = torch.onnx.export(
        exported,
        dynamo=True,
        verbose=False,
        optimize=False,
        opset_version=_BFLOAT16_OPSET if _has_bfloat16(program) else None,
        custom_translation_table=translations(form),
        input_names=list(program.inputs),
        output_names=_outputs(program),
    )
    assert made is not None
    return made.model


def _has_bfloat16(program: Program) -> bool:
    return any(tensor.dtype == torch.bfloat16 for tensor in program.module.parameters())


def _dynamic_shapes(program: Program) -> tuple[dict[int, Any], ...]:
    sizes = {name: torch.export.Dim(name, min=low, max=high or MAX_SIZE) for name, (low, high) in program.dims.items()}
    return tuple({i: sizes[size] for i, size in enumerate(axes) if size in sizes} for axes in _axes(program).values())


def _axes(program: Program) -> dict[str, list[str]]:
    """Sizes of every input, from its type: `int64[batch, length]` -> [batch, length]."""
    # By position: a node cannot be named `input`, and gets another name.
    types = [node.meta[_fx.TYPE] for node in program.module.graph.find_nodes(op="placeholder")]
    sizes = [kind.partition("[")[2].rstrip("]").split(", ") for kind in types]
    return dict(zip(program.inputs, sizes, strict=True))


def _outputs(program: Program) -> list[str]:
    (output,) = program.module.graph.find_nodes(op="output")
    return list(output.args[0])


@contextlib.contextmanager
def _hidden(model: Any, names: list[str]) -> Iterator[None]:
    """Take these initializers' values away for a while (rule 2)."""
    values = {name: model.graph.initializers[name] for name in names if name in model.graph.initializers}
    contents = {name: value.const_value for name, value in values.items()}
    for value in values.values():
        value.const_value = None
    yield
    for name, value in values.items():
        value.const_value = contents[name]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch and onnxscript warn about their own internals, and log what they skip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _finish(model: Any, program: Program) -> None:
    """Our names for sizes, no facts of torch's (rule 3), and the proof that every sparse weight is there."""
    from onnx_ir.passes import common

    common.ClearMetadataAndDocStringPass()(model)
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "sparsec", __version__
    names = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
    if names != [*program.inputs, *_outputs(program)]:
        raise ArtifactError(
            f"the ONNX export renamed inputs or outputs: found {', '.join(names)}; please report the model"
        )
    for site in program.sites.sparse:
        found = model.graph.initializers.get(site.name)
        if found is None or tuple(found.shape) != tuple(_fx.get_tensor(program.module, site.name).shape):
            raise ArtifactError(f"{site.name}: the ONNX export lost or reshaped this weight; please report the model")
    _name_sizes(model, _axes(program))


def _name_sizes(model: Any, axes: dict[str, list[str]]) -> None:
    """Replace torch's symbols, such as s72, by the program's names of sizes."""
    import onnx_ir

    names = {}
    for value in model.graph.inputs:
        for found, ours in zip(value.shape, axes[value.name], strict=False):
            if isinstance(found, onnx_ir.SymbolicDim):
                names[found.value] = ours
    graph = model.graph
    for value in [*graph.inputs, *(out for node in graph.all_nodes() for out in node.outputs)]:
        if value.shape is not None:  # a new one: some are shared, and frozen
            value.shape = onnx_ir.Shape([_named(size, names) for size in value.shape])


def _named(size: Any, names: dict[str, str]) -> Any:
    import onnx_ir

    if not isinstance(size, onnx_ir.SymbolicDim) or not size.value:
        return size
    return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), size.value)
