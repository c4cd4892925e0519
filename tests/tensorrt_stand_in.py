"""The part of `tensorrt.plugin` that a quick plugin with an ahead-of-time kernel meets, on a machine without TensorRT.

Written from the documented rules (TensorRT 10 Python API, tensorrt.plugin.register and aot_impl): it refuses what they
refuse. Symbols are integers here. It says nothing about what TensorRT then does.
"""

from __future__ import annotations

import copy
import inspect
import typing
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

SERIALIZABLE = (int, float, str, bool, bytes)


class Shape(list[int]):
    """Sizes; setting one out of range is an error, as it is there."""


class TensorDesc:
    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape_expr, self.dtype = Shape(shape), dtype

    def like(self) -> TensorDesc:
        return copy.deepcopy(self)


class KernelLaunchParams:
    grid_x = grid_y = grid_z = block_x = block_y = block_z = 1
    shared_mem = 0


class SymInt32(int):
    pass


class SymExprs(list[Any]):
    pass


class SymIntExprs(SymExprs):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class Plugins(ModuleType):
    """`tensorrt.plugin`; `registered` and `kernels` are what was given to it, by plugin id."""

    TensorDesc, KernelLaunchParams, SymInt32 = TensorDesc, KernelLaunchParams, SymInt32
    SymExprs, SymIntExprs = SymExprs, SymIntExprs

    def __init__(self) -> None:
        super().__init__("tensorrt.plugin")
        self.registered: dict[str, Callable[..., Any]] = {}
        self.kernels: dict[str, Callable[..., Any]] = {}
        self.op = SimpleNamespace()

    def cdiv(self, a: int, b: int) -> int:
        return -(-a // b)

    def register(self, plugin: str) -> Callable[..., None]:
        def add(describe: Callable[..., Any]) -> None:
            assert plugin not in self.registered, "registered twice"
            signature = inspect.signature(describe)
            tensors = [p.annotation is TensorDesc for p in signature.parameters.values()]
            assert tensors == sorted(tensors, reverse=True), "tensors come first"
            for parameter in signature.parameters.values():
                assert inspect.isclass(parameter.annotation), f"{parameter} has no class as its annotation"
                assert parameter.annotation is TensorDesc or parameter.annotation in SERIALIZABLE
                assert parameter.default is inspect.Parameter.empty
            assert signature.return_annotation is TensorDesc
            namespace, name = plugin.split("::")
            setattr(self.op, namespace, SimpleNamespace(**{name: describe}))
            self.registered[plugin] = describe

        return add

    def aot_impl(self, plugin: str) -> Callable[..., None]:
        def add(kernel: Callable[..., Any]) -> None:
            described = list(inspect.signature(self.registered[plugin]).parameters)
            signature = inspect.signature(kernel)
            assert [*described, "outputs", "tactic"] == list(signature.parameters)
            name, code, launch, extra = typing.get_args(signature.return_annotation)
            assert {str, bytes} == {*typing.get_args(name)} == {*typing.get_args(code)}
            assert launch is KernelLaunchParams and issubclass(extra, SymExprs)
            self.kernels[plugin] = kernel

        return add


def modules() -> dict[str, ModuleType]:
    """`tensorrt` and `tensorrt.plugin`, for sys.modules."""
    tensorrt: Any = ModuleType("tensorrt")
    tensorrt.__version__ = "10.7.0"
    for name in ("float32", "float16", "bfloat16", "uint8", "int32", "int8"):
        setattr(tensorrt, name, f"DataType.{name}")
    tensorrt.plugin = Plugins()
    return {"tensorrt": tensorrt, "tensorrt.plugin": tensorrt.plugin}
