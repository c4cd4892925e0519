"""The graph as data: JSON that is parsed, and the text that people read.

Only operators of the allow-list, plain values and references between nodes can be expressed. Reading checks every
name, reference and type before a graph is built, so a stranger's file can neither run code nor reach outside itself.
"""

from __future__ import annotations

import hashlib
import keyword
import math
import re
from typing import TYPE_CHECKING, Any

from sparsec import _fx, operators
from sparsec.errors import ArtifactError, GraphError, SparsecError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Graph, GraphModule, Node

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TENSOR = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_TRAINED, _FIXED = "parameter", "fixed parameter"  # requires_grad or not; anything else is a buffer
_META = ("dropout_p",)  # facts about a node that the mode switch needs later


def to_json(module: GraphModule) -> dict[str, Any]:
    """The graph of a module: inputs, tensors by name and type, nodes in order, outputs by key."""
    nodes, inputs, outputs = [], [], {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            inputs.append({"name": node.name, "input": node.target, "type": node.meta[_fx.TYPE]})
        elif node.op == "get_attr":
            nodes.append({"name": node.name, "tensor": node.target, "type": node.meta[_fx.TYPE]})
        elif node.op == "output":
            outputs = {key: value.name for key, value in node.args[0].items()}
        else:
            nodes.append(_call_to_json(node))
    kinds = {
        name: _TRAINED if parameter.requires_grad else _FIXED
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }
    tensors = {node["tensor"]: kinds.get(node["tensor"], "buffer") for node in nodes if "tensor" in node}
    return {"inputs": inputs, "tensors": tensors, "nodes": nodes, "outputs": outputs}


def _call_to_json(node: Node) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": node.name,
        "op": operators.name_of(node.target),
        "args": _encode(node.args)["tuple"],
    }
    if node.kwargs:
        entry["kwargs"] = {key: _encode(value) for key, value in node.kwargs.items()}
    entry["type"] = node.meta[_fx.TYPE]
    if node.meta.get(_fx.SCOPE):
        entry["scope"] = node.meta[_fx.SCOPE]
    if meta := {key: node.meta[key] for key in _META if key in node.meta}:
        entry["meta"] = meta
    return entry


def from_json(data: dict[str, Any], tensors: dict[str, Tensor]) -> GraphModule:
    """Build the module of a graph from `to_json`'s data and its tensors.

    Raises ArtifactError naming a tensor that is missing, GraphError on anything else that is unexpected.
    """
    import torch
    from torch import nn

    try:
        root, graph, nodes = nn.Module(), torch.fx.Graph(), {}
        for name, kind in data["tensors"].items():
            tensor = _tensor(name, tensors)
            trained = kind == _TRAINED and tensor.is_floating_point()
            _fx.set_tensor(root, name, nn.Parameter(tensor, trained) if kind in (_TRAINED, _FIXED) else tensor)
        for entry in data["inputs"]:
            nodes[entry["name"]] = _typed(graph.placeholder(_identifier(entry["input"])), entry)
        for entry in data["nodes"]:
            nodes[entry["name"]] = _read_node(graph, entry, nodes, data["tensors"])
        output = graph.output({str(key): nodes[name] for key, name in data["outputs"].items()})
        output.meta[_fx.TYPE] = ""
        return torch.fx.GraphModule(root, graph, "SparsecGraph")
    except SparsecError:
        raise
    except Exception as error:  # whatever a hostile file provokes in torch.fx is the file's fault
        raise GraphError(f"graph.json cannot be read: {type(error).__name__}: {error}") from error


def _read_node(graph: Graph, entry: dict[str, Any], nodes: dict[str, Node], tensors: dict[str, str]) -> Node:
    name = _identifier(entry["name"])
    if name in nodes:
        raise GraphError(f"graph.json names two nodes {name}")
    if "tensor" in entry:
        if entry["tensor"] not in tensors:
            raise GraphError(f"graph.json: node {name} reads tensor {entry['tensor']!r}, which is not listed")
        return _typed(graph.create_node("get_attr", entry["tensor"], name=name), entry)
    args = tuple(_decode(arg, nodes) for arg in entry["args"])
    kwargs = {_identifier(key): _decode(value, nodes) for key, value in entry.get("kwargs", {}).items()}
    node = graph.create_node("call_function", operators.resolve(entry["op"]), args, kwargs, name=name)
    node.meta.update({key: float(value) for key, value in entry.get("meta", {}).items() if key in _META})
    return _typed(node, entry)


def _typed(node: Node, entry: dict[str, Any]) -> Node:
    if node.name != entry["name"]:
        raise GraphError(f"graph.json: {entry['name']!r} cannot be a node name (it would become {node.name!r})")
    node.meta[_fx.TYPE] = str(entry["type"])
    node.meta[_fx.SCOPE] = str(entry.get("scope", ""))
    return node


def _identifier(name: Any) -> str:
    if isinstance(name, str) and _IDENTIFIER.fullmatch(name) and not keyword.iskeyword(name) and name != "self":
        return name
    raise GraphError(f"graph.json: {name!r} is not a plain name")


def _tensor(name: str, tensors: dict[str, Tensor]) -> Tensor:
    if not _TENSOR.fullmatch(name):
        raise GraphError(f"graph.json: {name!r} is not the name of a tensor")
    if name not in tensors:
        raise ArtifactError(
            f"weights.safetensors has no tensor {name!r}, which graph.json reads: the folder is incomplete; "
            "write it again"
        )
    return tensors[name]


def _encode(value: Any) -> Any:
    """An argument as JSON. Objects with one key stand for what JSON has no word for."""
    import torch
    from torch.fx import Node

    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, slice):
        return {"slice": [_encode(item) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": "input"}  # the graph runs where its inputs are
    for kind in ("dtype", "layout", "memory_format"):
        if isinstance(value, getattr(torch, kind)):
            return {kind: str(value).removeprefix("torch.")}
    raise GraphError(f"an argument of type {type(value).__name__} cannot be stored: {value!r}")


def _decode(value: Any, nodes: dict[str, Node]) -> Any:
    import torch

    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple(_decode(item, nodes) for item in content)
    if kind == "slice":
        return slice(*(_decode(item, nodes) for item in content))
    if kind == "float":
        return float(content)
    if kind == "device" and content == "input":
        return torch.device("cpu")
    if kind in ("dtype", "layout", "memory_format"):
        found = getattr(torch, content, None)
        if isinstance(found, getattr(torch, kind)):
            return found
    raise GraphError(f"graph.json: an argument {value!r} cannot be read")


def dump(module: GraphModule, hashes: bool = False) -> str:
    """The graph as text, one line a node, for people; it is never parsed.

    Equal graphs give equal text. `hashes` adds the start of each tensor's SHA-256, so that equal text also means equal
    weights; it reads every byte (1.9 GB/s on one core), so it is asked for.
    """
    return "\n".join(f"  {_line(node)}{_mark(module, node) if hashes else ''}" for node in module.graph.nodes)


def _mark(module: GraphModule, node: Node) -> str:
    if node.op != "get_attr":
        return ""
    tensor = _fx.get_tensor(module, str(node.target))
    return "" if tensor.is_meta else f" #{content_hash(tensor)}"


def content_hash(tensor: Tensor) -> str:
    """The first 8 hex digits of the SHA-256 of a tensor's values, bit for bit; strides and device do not count."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()[:8]


def _line(node: Node) -> str:
    if node.op == "output":
        return "return {" + ", ".join(f"{key}: %{value.name}" for key, value in node.args[0].items()) + "}"
    if node.op == "placeholder":
        return f"%{node.name} = input {node.target} : {node.meta[_fx.TYPE]}"
    if node.op == "get_attr":
        return f"%{node.name} = tensor @{node.target} : {node.meta[_fx.TYPE]}"
    arguments = [_text(arg) for arg in node.args] + [f"{key}={_text(arg)}" for key, arg in node.kwargs.items()]
    target = getattr(node.target, "sparsec_name", None) or operators.name_of(node.target).removesuffix(".default")
    return f"%{node.name} = {target}({', '.join(arguments)}) : {node.meta[_fx.TYPE]}"


def _text(value: Any) -> str:
    import torch

    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_text(item) for item in value) + "]"
    if isinstance(value, slice):
        return ":".join("" if item is None else _text(item) for item in (value.start, value.stop, value.step))
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, torch.device):
        return "input.device"  # as it is stored: the graph runs where its inputs are
    return f"%{value.name}" if hasattr(value, "op") else str(value).removeprefix("torch.")
