"""The kernel backend: graph.json with the portable sparse operator, packed weights, and CPU kernels put in at load."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from sparsec import _fx
from sparsec.backend import FP32_TOLERANCE, Backend, Check, CheckData, Emitted, Verdict, compare
from sparsec.backends.kernel.cpu import library
from sparsec.backends.kernel.cpu.linear import stream_linear
from sparsec.backends.kernel.cpu.stream import pack, unpack
from sparsec.errors import ArtifactError, PatternError
from sparsec.layout import SparseLayout, decompress, validate
from sparsec.ops import layout_of, nm_linear
from sparsec.pattern import NM, VNM
from sparsec.pipeline import PassManager, relative_difference
from sparsec.program import Program, bind, read_graph, write_graph

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

log = logging.getLogger("sparsec")
_KERNEL_TOKENS = (1, 3, 40)  # one size for each kernel, and one that leaves a tail in both


class KernelBackend(Backend):
    """Weights are always stored packed; what runs them is decided when the artifact is loaded."""

    name: ClassVar[str] = "kernel"
    describes: ClassVar[str] = "packed weights run by sparsec's own CPU kernels; loads without transformers"

    def plan(self, program: Program) -> tuple[Verdict, ...]:
        return tuple(self._verdict(site.name, site.pattern) for site in program.sites.sparse)

    def _verdict(self, name: str, pattern: Any) -> Verdict:
        if not isinstance(pattern, (NM, VNM)):
            return Verdict(name, False, "dense", f"{pattern} is stored small; no kernel makes it faster than dense")
        if library.level() is None:
            return Verdict(name, False, "reference", library.unavailable_reason() or "the kernels are switched off")
        return Verdict(name, True, f"{library.level()}", _caveat(pattern))

    def emit(self, program: Program, folder: Path) -> Emitted:
        lowered = PassManager.parse("lower").run(program)
        write_graph(folder, lowered.module)
        tables = (_layout(lowered.module, node).nbytes for node in _fx.calls(lowered.module.graph, nm_linear))
        files = [folder / "graph.json", folder / "weights.safetensors"]
        return Emitted(sum(tables), sum(path.stat().st_size for path in files), {})

    def verify(self, folder: Path, manifest: dict[str, Any], check: CheckData) -> list[Check]:
        module = read_graph(folder)
        declared = {site["name"]: site for site in manifest["sites"] if site["pattern"]}
        found = {_site(node): node for node in _fx.calls(module.graph, nm_linear)}
        if missing := sorted(declared.keys() ^ found.keys()):
            return [Check("kernel: sites", False, f"{missing[0]} is sparse in the manifest or the graph, not in both")]
        problems: dict[str, str] = {}
        for name, node in found.items():
            layout = _layout(module, node)
            if str(layout.pattern) != declared[name]["pattern"]:
                problems["pattern"] = f"{name}: declared {declared[name]['pattern']}, stored {layout.pattern}"
            elif violations := layout.pattern.violations(decompress(layout)).first:
                problems["pattern"] = f"{name}: {violations[0]}"
            _check_kernel(name, layout, problems)
        proven = {
            "pattern": f"{len(found)} sites satisfy their pattern bit for bit",
            "pack": f"the kernels' form of {len(found)} sites unpacks to the same bits",
            "kernel": f"{len(found)} sites give what the dense product gives, for {_KERNEL_TOKENS} tokens",
        }
        if library.level() is None:
            del proven["pack"], proven["kernel"]
        checks = [Check(f"kernel: {what}", what not in problems, problems.get(what, ok)) for what, ok in proven.items()]
        with torch.no_grad():
            reference = module(*(check.inputs[name] for name in _inputs(module)))
            outputs = Runnable(install_kernels(module), manifest)(**check.inputs)  # as `load`, without a second copy
        checks.append(compare("kernel: reference operator", reference, check.outputs, FP32_TOLERANCE))
        checks.append(compare("kernel: outputs", outputs, check.outputs, FP32_TOLERANCE))
        return checks

    def load(self, folder: Path, manifest: dict[str, Any]) -> Runnable:
        return Runnable(install_kernels(read_graph(folder)), manifest)

    def load_dense(self, folder: Path, manifest: dict[str, Any]) -> Runnable:
        return Runnable(install_kernels(read_graph(folder), dense=True), manifest)


class Runnable(torch.nn.Module):
    """A loaded artifact: call it with the model's inputs, by name or position; returns the outputs by name.

    For inference. `manifest` tells what it is: sites, patterns, quality, recipe.
    """

    def __init__(self, graph: GraphModule, manifest: dict[str, Any]) -> None:
        super().__init__()
        self.graph, self.manifest, self.input_names = graph.requires_grad_(False), manifest, _inputs(graph)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        """Run the model."""
        outputs: dict[str, Tensor] = self.graph(*bind(self.input_names, args, kwargs))
        return outputs


def install_kernels(module: GraphModule, dense: bool = False) -> GraphModule:
    """Replace every nm_linear by this machine's kernel for it on one packed stream, or by a dense linear."""
    for node in _fx.calls(module.graph, nm_linear):
        layout, name, bias = _layout(module, node), _site(node), node.args[4]
        x, kind = node.args[0], node.meta[_fx.TYPE]
        has_kernel = isinstance(layout.pattern, (NM, VNM)) and not dense
        if has_kernel and library.level() is not None:
            _fx.set_tensor(module, f"{name}_stream", pack(layout))
            weight = _fx.attribute(module, f"{name}_stream", node)
            new = _fx.call(node, stream_linear, (x, weight, bias, layout.shape[1]), kind, "stream_linear")
        else:
            if has_kernel:
                _say_once(library.unavailable_reason() or "the kernels are switched off")
            _fx.set_tensor(module, f"{name}_dense", decompress(layout)[0])
            weight = _fx.attribute(module, f"{name}_dense", node)
            new = _fx.call(node, torch.ops.aten.linear.default, (x, weight, bias), kind, "linear")
        _fx.replace(node, new)
    _fx.prune_unused(module)
    module.graph.lint()
    module.recompile()
    return module


def _caveat(pattern: NM | VNM) -> str:
    """Where the sparse kernel is not faster than dense (tests/bench/bench_cpu_linear.py and its notes)."""
    if library.level() == "portable":
        return "the plain x86-64 kernels are slower than dense from about 8 tokens"
    in_panel = pattern.m <= 16 or (isinstance(pattern, VNM) and pattern.v % 16 == 0)
    return "" if in_panel else f"{pattern} has groups wider than 16: slower than dense from about 8 tokens"


@cache
def _say_once(reason: str) -> None:
    log.warning("sparse weights run on the dense reference path, at dense speed: %s", reason)


def _check_kernel(name: str, layout: SparseLayout, problems: dict[str, str]) -> None:
    """Pack and unpack give the same bytes; the kernel gives what the reference gives."""
    if not isinstance(layout.pattern, (NM, VNM)) or library.level() is None:
        return
    stream = pack(layout)
    again = unpack(stream).tensors()
    if any(not torch.equal(again[table], tensor) for table, tensor in layout.tensors().items()):
        problems["pack"] = f"{name}: packing for the kernel and unpacking again changes the tables"
    weight = decompress(layout)[0]
    generator = torch.Generator().manual_seed(0)
    for tokens in _KERNEL_TOKENS:
        x = torch.randn(tokens, layout.shape[2], generator=generator)
        difference = relative_difference(stream_linear(x, stream, None, layout.shape[1]), x @ weight.T)
        if difference > FP32_TOLERANCE:
            problems["kernel"] = f"{name}: {tokens} tokens differ by {difference:.1e}, allowed {FP32_TOLERANCE:.0e}"


def _layout(module: GraphModule, node: Node) -> SparseLayout:
    """The checked layout of an nm_linear node; raises ArtifactError naming the site."""
    _, values, positions, columns, _, pattern, in_features = node.args
    tables = [
        _fx.get_tensor(module, str(arg.target)) if arg is not None else None for arg in (values, positions, columns)
    ]
    try:
        layout = layout_of(tables[0], tables[1], tables[2], str(pattern), int(in_features))  # type: ignore[arg-type]
    except PatternError as error:
        raise ArtifactError(f"{_site(node)}: {error}") from error
    validate(layout, _site(node))
    return layout


def _site(node: Node) -> str:
    return str(node.args[1].target).removesuffix("_values")


def _inputs(module: GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]
