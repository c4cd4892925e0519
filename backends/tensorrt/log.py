"""What a TensorRT build log says about sparsity, as a table. Pure text: nothing here needs TensorRT.

TensorRT words the same two facts in two ways:

    8 to 10    (Sparsity) Layers eligible for sparse math: conv1, conv2 + relu2
               (Sparsity) TRT inference plan picked sparse implementation for layers: conv2 + relu2
    10 and 11  (Sparsity) Found 2 layer(s) eligible to use sparse tactics: conv1, conv2 + relu2
               (Sparsity) Chose 1 layer(s) using sparse tactics: conv2 + relu2

1. Each pass of the builder writes its own lines; the last ones are about the engine.
2. A log that is not verbose has the counts without the names.
3. The names are those of engine layers, which are fused from ONNX nodes: `a + b`, `a+b_myl0_2`, `PWN(a, b)`.
4. A verbose log with detailed profiling lists the engine's layers, each with its ONNX nodes and its tactic.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_SPARSITY = "(Sparsity)"
_WORDINGS = {
    "eligible": (
        re.compile(r"Layers eligible for sparse math:()(.*)"),
        re.compile(r"Found (\d+) layer\(s\) eligible to use sparse tactics(?::(.*))?"),
    ),
    "chosen": (
        re.compile(r"TRT inference plan picked sparse implementation for layers:()(.*)"),
        re.compile(r"Chose (\d+) layer\(s\) using sparse tactics(?::(.*))?"),
    ),
}
_LAYER = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: .*TacticName: (?P<tactic>[^,]*),")
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_FUSED = re.compile(r"\s*\+\s*|\.\.\.|[(){}\[\],\s]+")
_MYELIN = re.compile(r"_myl\d+_\d+$")


@dataclass(frozen=True)
class Layers:
    """The layers of one line: how many, and which, where the log names them (rule 2)."""

    count: int
    names: tuple[str, ...]

    @property
    def named(self) -> bool:
        """Whether the names say it all."""
        return self.count == len(self.names)

    def include(self, node: str) -> bool:
        """Whether one of the named layers was fused from this ONNX node."""
        return any(node in nodes_of(name) for name in self.names)


@dataclass(frozen=True)
class EngineLayer:
    """One layer of the finished engine (rule 4)."""

    name: str
    kind: str
    """TensorRT's word for it: gemm, kgen, runtime_fusion, MatrixMultiply, PluginV3, ..."""
    tactic: str
    nodes: tuple[str, ...]
    """The ONNX nodes it was fused from."""

    @property
    def sparse(self) -> bool:
        """Whether its kernel is named as a sparse one."""
        return re.search(r"sparse|sptensor|spgemm|spmma", self.tactic, re.IGNORECASE) is not None

    @property
    def plugin(self) -> bool:
        """Whether a plugin runs it, into which TensorRT does not look."""
        return "plugin" in self.kind.lower()


@dataclass(frozen=True)
class BuildLog:
    """What a build log says; None where it has no such line."""

    eligible: Layers | None
    chosen: Layers | None
    layers: tuple[EngineLayer, ...]

    def layer_of(self, node: str) -> EngineLayer | None:
        """The engine layer that multiplies for an ONNX node: a `kgen` beside it only adds the bias."""
        found = [layer for layer in self.layers if node in layer.nodes]
        return min(found, key=lambda layer: layer.kind == "kgen", default=None)


def parse(text: str) -> BuildLog:
    """Read a build log, whatever stands before each message."""
    lines = text.split("\n")  # a layer names its nodes with separators that splitlines takes for line ends
    return BuildLog(_last(lines, "eligible"), _last(lines, "chosen"), tuple(_engine_layers(lines)))


def nodes_of(layer: str) -> set[str]:
    """The ONNX nodes that an engine layer's name mentions (rule 3).

    >>> sorted(nodes_of("node_Gemm_7+node_Gemm_4_myl0_2")), sorted(nodes_of("PWN(Sigmoid_1, Mul_2)"))
    (['node_Gemm_4', 'node_Gemm_7'], ['Mul_2', 'PWN', 'Sigmoid_1'])
    """
    return {part for part in _FUSED.split(_MYELIN.sub("", layer)) if part}


def _last(lines: Iterable[str], what: str) -> Layers | None:
    found = None
    for line in lines:
        _, mark, message = line.partition(_SPARSITY)
        for wording in _WORDINGS[what]:
            if mark and (match := wording.search(message)):
                names = tuple(_names(match[2] or ""))
                found = Layers(int(match[1]) if match[1] else len(names), names)  # rule 1
    return found


def _names(text: str) -> Iterable[str]:
    """Split at commas outside of brackets."""
    depth, start = 0, 0
    for i, letter in enumerate(f"{text},"):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth <= 0:
            if name := text[start:i].strip():
                yield name
            start = i + 1


def _engine_layers(lines: list[str]) -> Iterable[EngineLayer]:
    for line in lines:
        if match := _LAYER.search(line):
            nodes = tuple(_ONNX_NODE.findall(line.rpartition("Metadata:")[2]))
            yield EngineLayer(match["name"], match["kind"], match["tactic"].strip(), nodes)
