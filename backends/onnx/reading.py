"""The weights of a model.onnx as it lies on disk, and those of the kernel backend beside it. Nothing is believed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec import store
from sparsec.backends.onnx.backend import DATA
from sparsec.backends.onnx.functions import DOMAIN, LINEAR, WEIGHT, functions
from sparsec.backends.onnx.packed import linear_attributes, table_names, weight_attributes
from sparsec.errors import ArtifactError, SparsecError
from sparsec.layout import TABLES, SparseLayout, decompress, validate
from sparsec.pattern import NM, Pattern

if TYPE_CHECKING:
    from torch import Tensor

_CALLS = {"sparsec.nm_linear.default": (1, 5), "sparsec.nm_weight.default": (0, 3)}
"""Operators on packed tables -> where their arguments hold the values, and the pattern followed by the columns."""
_LAYING_OUT = ("Reshape", "Transpose", "Cast", "Gather")  # what may stand between NMWeight and the weight it gives


class Weights:
    """The weights of an ONNX file, read one at a time. Raises when the file is not well formed.

    Its methods take a site of the manifest: a weight is looked up by its name, and seen through the site's view.
    """

    def __init__(self, path: Path) -> None:
        import onnx

        model = onnx.load(str(path), load_external_data=False)
        self._folder = path.parent
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._check_second_file(path)
        onnx.checker.check_model(str(path), full_check=True)
        self._nodes = list(model.graph.node)
        self._makers = {name: node for node in self._nodes for name in node.output}
        self._functions = list(model.functions)
        self._opset = next(entry.version for entry in model.opset_import if not entry.domain)

    def _check_second_file(self, path: Path) -> None:
        """Raise ArtifactError unless all weights that the file keeps elsewhere are there."""
        second = self._folder / DATA
        held = second.stat().st_size if second.is_file() else 0
        for tensor in self._tensors.values():
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if not entries:
                continue
            if entries.get("location") != DATA:
                where = entries.get("location")
                raise ArtifactError(f"{tensor.name}: its values are expected in {DATA}, found {where}")
            end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
            if end > held:
                found = f"{held} bytes" if second.is_file() else "no such file"
                raise ArtifactError(
                    f"{path.name} keeps {tensor.name} in bytes up to {end} of {DATA}, found {found}; copy both files"
                )

    @property
    def packed(self) -> bool:
        """Whether some weights are tables."""
        return any(node.domain == DOMAIN for node in self._nodes)

    def foreign_function(self) -> str | None:
        """Why the file's own form of the operators is not the one this version of sparsec writes, or None."""
        expected = functions(self._opset)
        names = [[f"{one.domain}::{one.name}" for one in found] for found in (self._functions, expected)]
        if names[0] != names[1]:
            return f"expected the functions {' and '.join(names[1])}, found {' and '.join(names[0]) or 'none'}"
        for found, own, name in zip(self._functions, expected, names[1], strict=True):
            if found != own:
                return f"the function {name} does something else than sparsec's"
        return None

    def read(self, site: dict[str, Any]) -> Tensor:
        """The site's weight as (batch, rows, cols). Raises ArtifactError saying why there is none."""
        name, view = site["name"], site["view"]
        if users := self._linear_users(name):
            return self._of_linear(site, users)
        weight = self._tensor(name) if name in self._tensors else self._of_weight(site)
        if not weight.is_floating_point():
            raise ArtifactError(f"expected floating-point values, found {weight.dtype}")
        if list(weight.shape) != list(view["parameter"]):
            raise ArtifactError(f"expected shape {view['parameter']}, found {list(weight.shape)}")
        return weight.permute(*view["axes"]).reshape(site["shape"])

    def misuse(self, site: dict[str, Any]) -> str | None:
        """Why the weight is not what the graph multiplies with, or None."""
        name = site["name"]
        if self._linear_users(name):
            return None  # the tables belong to the operator
        users = [node for node in self._nodes if name in node.input]
        if users and site["kind"] != "linear":
            return None
        read_as = [node for user in users for node in (self._readers(user.output[0]) if _turns(user) else [user])]
        if any(_multiplies(node, name) or node.op_type == "MatMul" for node in read_as):
            return None
        kinds = ", ".join(node.op_type for node in users) or "none"
        return f"no Gemm with transB=1 reads it, nor a MatMul what Transpose makes of it (its readers: {kinds})"

    def _readers(self, value: str) -> list[Any]:
        return [node for node in self._nodes if value in node.input]

    def _tensor(self, name: str) -> Tensor:
        import onnx
        import torch

        tensor = self._tensors.get(name)
        if tensor is None:
            raise ArtifactError(f"the file has no initializer {name}")
        array = onnx.numpy_helper.to_array(tensor, base_dir=str(self._folder))
        if tensor.data_type == onnx.TensorProto.BFLOAT16:  # numpy's type for it is not torch's
            return torch.from_numpy(array.view("uint16").copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())  # a copy: the array is read-only memory of the file

    def _linear_users(self, name: str) -> list[Any]:
        values = f"{name}_values"
        return [node for node in self._nodes if _is(node, LINEAR) and values in node.input]

    def _of_linear(self, site: dict[str, Any], users: list[Any]) -> Tensor:
        """The weight that the tables of NMLinear hold, which all nodes that read them must read alike."""
        pattern = Pattern.parse(site["pattern"]).executable
        for node in users:
            self._check(node, linear_attributes(pattern, site["shape"][2]), list(node.input)[1:4], site, pattern)
        return decompress(self._layout(site, pattern)).float()

    def _of_weight(self, site: dict[str, Any]) -> Tensor:
        """The weight that NMWeight gives, as the graph then lays it out."""
        node, steps = self._makers.get(site["name"]), list[Any]()
        while node is not None and not node.domain and node.op_type in _LAYING_OUT:
            steps.append(node)
            node = self._makers.get(node.input[0])
        if node is None or not _is(node, WEIGHT):
            raise ArtifactError("the file has no initializer of this name, and no tables")
        pattern = Pattern.parse(site["pattern"]).executable
        tables = list(node.input)
        cast = self._makers.get(tables[0])
        if cast is not None and cast.op_type == "Cast":
            tables[0] = cast.input[0]
        self._check(node, weight_attributes(pattern, site["shape"][2]), tables, site, pattern)
        layout = self._layout(site, pattern)
        weight = decompress(layout).float().reshape(math.prod(layout.shape[:2]), layout.shape[2])
        for step in reversed(steps):
            weight = self._laid_out(weight, step)
        return weight

    def _laid_out(self, weight: Tensor, step: Any) -> Tensor:
        import onnx
        import torch

        if step.op_type == "Reshape":
            shape = onnx.helper.get_attribute_value(self._makers[step.input[1]].attribute[0])
            return weight.reshape(list(shape))
        if step.op_type == "Gather":  # rows that moved
            return self._rows_in_place(weight, step)
        setting = onnx.helper.get_attribute_value(step.attribute[0])
        if step.op_type == "Transpose":
            return weight.permute(*setting)
        types = {
            onnx.TensorProto.FLOAT: torch.float32,
            onnx.TensorProto.FLOAT16: torch.float16,
            onnx.TensorProto.BFLOAT16: torch.bfloat16,
        }
        if setting not in types:
            raise ArtifactError(f"expected a floating-point weight, found a cast to type {setting}")
        return weight.to(types[setting])

    def _rows_in_place(self, weight: Tensor, step: Any) -> Tensor:
        places = self._tensor(step.input[1]).long()
        axes = [attribute.i for attribute in step.attribute]
        if axes != [0] or sorted(places.tolist()) != list(range(len(weight))):
            raise ArtifactError(f"{step.input[1]} must name each of 0 to {len(weight) - 1} once, along axis 0")
        return weight[places]

    def _check(
        self, node: Any, expected: dict[str, int], tables: list[str], site: dict[str, Any], pattern: Pattern
    ) -> None:
        names = table_names(site["name"], pattern)
        found = {attribute.name: attribute.i for attribute in node.attribute}
        if found != expected or tables != names:
            raise ArtifactError(f"expected {expected} of {names}, found {found} of {tables}")

    def _layout(self, site: dict[str, Any], pattern: Pattern) -> SparseLayout:
        names = table_names(site["name"], pattern)
        tables = [self._tensor(table) for table in names]
        if isinstance(pattern, NM) and tables.pop().flatten().tolist() != list(range(pattern.m)):
            raise ArtifactError(f"{names[2]} must be the offsets 0 to {pattern.m - 1}")
        layout = SparseLayout(pattern, tuple(site["shape"]), *tables)
        validate(layout, site["name"])
        return layout


def _is(node: Any, operator: str) -> bool:
    return bool(node.domain == DOMAIN and node.op_type == operator)


def _turns(node: Any) -> bool:
    """A Transpose of a matrix."""
    return bool(node.op_type == "Transpose" and list(node.attribute[0].ints) == [1, 0])


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
            if node.get("op") in _CALLS:
                first, pattern = _CALLS[node["op"]]
                values = reads[node["args"][first]["node"]]
                self._calls[values.removesuffix("_values")] = node["args"][pattern : pattern + 2]

    def read(self, site: dict[str, Any]) -> Tensor:
        """The site's weight as (batch, rows, cols). Raises ArtifactError saying why there is none."""
        name = site["name"]
        pattern = Pattern.parse(site["pattern"]).executable
        if self._calls.get(name) != [str(pattern), site["shape"][2]]:
            raise ArtifactError(f"expected packed tables of {pattern}, found {self._calls.get(name, 'none')}")
        tables = {table: self._tensors[f"{name}_{table}"] for table in TABLES if f"{name}_{table}" in self._tensors}
        try:
            layout = SparseLayout(pattern, tuple(site["shape"]), **tables)
            validate(layout, name)
        except (SparsecError, TypeError) as error:  # TypeError: a table is missing
            raise ArtifactError(str(error)) from error
        return decompress(layout)
