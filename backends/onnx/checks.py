"""Proofs about a model.onnx on disk. Nothing the exporter said is believed: everything is read again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsec import ort, store
from sparsec.backend import FP32_TOLERANCE, Check, CheckData, compare
from sparsec.backends.onnx.backend import DATA, MODEL
from sparsec.backends.onnx.packed import DOMAIN, OPERATOR, attributes, function, table_names
from sparsec.backends.onnx.session import OnnxModule, first_line
from sparsec.errors import SparsecError
from sparsec.layout import SparseLayout, decompress, validate
from sparsec.pattern import NM, Pattern

if TYPE_CHECKING:
    from torch import Tensor

_PACKED = {"sparsec.nm_linear.default": (1, 5), "sparsec.nm_weight.default": (0, 3)}
"""Operators on packed tables -> where their arguments hold the values, and the pattern followed by the columns."""


def verify(folder: Path, manifest: dict[str, Any], check: CheckData) -> list[Check]:
    """One check for each fact; a fact about many sites names the first that breaks it."""
    path = folder / MODEL
    try:
        weights = Initializers(path)
    except Exception as error:  # protobuf, onnx's checker and the file system share no base class
        return [Check("onnx: well formed", False, first_line(error))]
    sites = [site for site in manifest["sites"] if site["pattern"]]
    checks = [
        Check("onnx: well formed", True, f"{path.name} passes the full ONNX checker"),
        _all("onnx: patterns", sites, lambda site: _pattern(site, weights), _proven(sites)),
        _all("onnx: layers", sites, weights.misuse, "are what the graph multiplies with"),
    ]
    if (folder / store.GRAPH).is_file():
        packed = PackedTables(folder)
        words = "equal the kernel backend's packed tables bit for bit"
        checks.append(_all("onnx: packed tables", sites, lambda site: packed.difference(site, weights), words))
    if weights.packed:
        fault = weights.foreign_function()
        checks.append(Check("onnx: operator", fault is None, fault or "is also a function in standard operators"))
    checks.append(_outputs("onnx: outputs in onnxruntime", path, "plain", check))
    if weights.packed and ort.unavailable_reason() is None:
        checks.append(_outputs("onnx: outputs with sparsec's kernels", path, "sparsec", check))
    return checks


class Initializers:
    """The weights of an ONNX file, read one at a time. Raises when the file is not well formed."""

    def __init__(self, path: Path) -> None:
        import onnx

        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(str(path), load_external_data=False)
        graph = model.graph
        self._folder = path.parent
        self._by_name = {tensor.name: tensor for tensor in graph.initializer}
        self._nodes = list(graph.node)
        self.functions = list(model.functions)
        self.opset = next(entry.version for entry in model.opset_import if not entry.domain)

    @property
    def packed(self) -> bool:
        """Whether some weights are tables."""
        return any(node.domain == DOMAIN for node in self._nodes)

    def foreign_function(self) -> str | None:
        """Why the file's own form of the operator is not the one this version of sparsec writes, or None."""
        found = [(entry.domain, entry.name) for entry in self.functions]
        if found != [(DOMAIN, OPERATOR)]:
            return f"expected one function, {DOMAIN}::{OPERATOR}, found {found or 'none'}"
        same = list(self.functions[0].node) == list(function(self.opset).node)
        return None if same else f"the function {DOMAIN}::{OPERATOR} does something else than sparsec's"

    def read(self, site: dict[str, Any]) -> Tensor | str:
        """The site's weight as (batch, rows, cols), or why there is none."""
        import onnx

        if site["name"] not in self._by_name and self._packed_users(site):
            return self._unpack(site)
        tensor = self._by_name.get(site["name"])
        if tensor is None:
            return "the file has no initializer of this name"
        if tensor.data_type != onnx.TensorProto.FLOAT:
            return f"expected float32, found {onnx.TensorProto.DataType.Name(tensor.data_type)}"
        view = site["view"]
        if list(tensor.dims) != list(view["parameter"]):
            return f"expected shape {view['parameter']}, found {list(tensor.dims)}"
        array = self._array(site["name"])
        return array if isinstance(array, str) else array.permute(*view["axes"]).reshape(site["shape"])

    def _array(self, name: str) -> Tensor | str:
        import onnx
        import torch

        tensor = self._by_name.get(name)
        if tensor is None:
            return f"the file has no initializer {name}"
        if any(entry.key == "location" and entry.value != DATA for entry in tensor.external_data):
            return f"its values are expected in {DATA}, found another file"
        # A copy: the array is read-only memory of the file.
        return torch.from_numpy(onnx.numpy_helper.to_array(tensor, base_dir=str(self._folder)).copy())

    def _packed_users(self, site: dict[str, Any]) -> list[Any]:
        values = f"{site['name']}_values"
        return [node for node in self._nodes if node.domain == DOMAIN and values in node.input]

    def _unpack(self, site: dict[str, Any]) -> Tensor | str:
        """The dense weight that the tables hold, which all nodes that read them must read alike."""
        name, pattern = site["name"], Pattern.parse(site["pattern"])
        names, expected = table_names(name, pattern), attributes(pattern, site["shape"][2])
        for node in self._packed_users(site):
            found = {attribute.name: attribute.i for attribute in node.attribute}
            if found != expected or list(node.input)[1:4] != names:
                return f"expected {expected} of {names}, found {found} of {list(node.input)[1:4]}"
        tables = []
        for table in names:
            array = self._array(table)
            if isinstance(array, str):
                return array
            tables.append(array)
        if isinstance(pattern, NM) and tables.pop().flatten().tolist() != list(range(pattern.m)):
            return f"{names[2]} must be the offsets 0 to {pattern.m - 1}"
        layout = SparseLayout(pattern, tuple(site["shape"]), *tables)
        try:
            validate(layout, name)
        except SparsecError as error:
            return str(error)
        return decompress(layout)

    def misuse(self, site: dict[str, Any]) -> str | None:
        """Why the weight is not what the graph multiplies with, or None."""
        if self._packed_users(site):
            return None  # the tables belong to the operator
        users = [node for node in self._nodes if site["name"] in node.input]
        if any(_multiplies(node, site["name"]) for node in users) or (users and site["kind"] != "linear"):
            return None
        return f"no Gemm with transB=1 reads it (its readers: {', '.join(node.op_type for node in users) or 'none'})"


def _multiplies(node: Any, name: str) -> bool:
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    return bool(node.op_type == "Gemm" and node.input[1] == name and attributes.get("transB") == 1)


class PackedTables:
    """The kernel backend's tables in the same folder."""

    def __init__(self, folder: Path) -> None:
        graph = store.load_json(folder / store.GRAPH)
        self._tensors = store.load_tensors(folder / store.WEIGHTS)
        self._calls = {}
        reads = {node["name"]: node["tensor"] for node in graph["nodes"] if "tensor" in node}
        for node in graph["nodes"]:
            if node.get("op") in _PACKED:
                first, pattern = _PACKED[node["op"]]
                values = reads[node["args"][first]["node"]]
                self._calls[values.removesuffix("_values")] = node["args"][pattern : pattern + 2]

    def difference(self, site: dict[str, Any], weights: Initializers) -> str | None:
        """Where the ONNX weight differs from the packed one, or None."""
        import torch

        name, found = site["name"], weights.read(site)
        if isinstance(found, str):
            return found
        if self._calls.get(name) != [site["pattern"], site["shape"][2]]:
            return f"expected packed tables of {site['pattern']}, found {self._calls.get(name, 'none')}"
        tables = {
            table: self._tensors[f"{name}_{table}"]
            for table in ("values", "positions", "columns")
            if f"{name}_{table}" in self._tensors
        }
        try:
            layout = SparseLayout(Pattern.parse(site["pattern"]), tuple(site["shape"]), **tables)
            validate(layout, name)
        except (SparsecError, TypeError) as error:  # TypeError: a table is missing
            return str(error)
        packed = decompress(layout)
        if packed.shape == found.shape and torch.equal(packed.view(torch.int32), found.view(torch.int32)):
            return None
        return "the ONNX weight and the packed weight differ"


def _pattern(site: dict[str, Any], weights: Initializers) -> str | None:
    import torch

    found = weights.read(site)
    if isinstance(found, str):
        return found
    violations = Pattern.parse(site["pattern"]).violations(found)
    if violations.count:
        return f"breaks {site['pattern']}, first at {violations.first[0]} ({violations.count} in all)"
    negative = ((found == 0) & torch.signbit(found)).nonzero()
    if len(negative):
        _, row, column = negative[0].tolist()
        return f"{len(negative)} zeros are -0.0, expected +0.0 only; first: row {row}, column {column}"
    return None


def _proven(sites: list[dict[str, Any]]) -> str:
    if all(Pattern.parse(site["pattern"]).decidable for site in sites):
        return "satisfy their pattern bit for bit"
    return (
        "break no count of their pattern; the columns of a strip's groups are known to the kernel backend's tables only"
    )


def _all(name: str, sites: list[dict[str, Any]], fault: Callable[[dict[str, Any]], str | None], words: str) -> Check:
    """One check over all sites: the first fault, by site, or that there is none."""
    faults = [(site["name"], text) for site in sites if (text := fault(site)) is not None]
    if not faults:
        return Check(name, True, f"{len(sites)} weights {words}")
    more = f" (and {len(faults) - 1} more weights)" if len(faults) > 1 else ""
    return Check(name, False, f"{faults[0][0]}: {faults[0][1]}{more}")


def _outputs(name: str, path: Path, kernels: Literal["plain", "sparsec"], check: CheckData) -> Check:
    try:
        return compare(name, OnnxModule(path, kernels)(**check.inputs), check.outputs, FP32_TOLERANCE)
    except SparsecError as error:
        return Check(name, False, str(error))
