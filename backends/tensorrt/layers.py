"""The layer table: for every site, whether TensorRT may run it sparse, whether it does, and why not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from sparsec.backends.tensorrt.log import BuildLog, EngineLayer
from sparsec.backends.tensorrt.network import Product

Built = Literal["tensorrt", "rtx", "none"]
WIDE = 256
"""NVIDIA's maintainers: sparse kernels beat dense ones where inputs and outputs are more (TensorRT issue 3849)."""
RTX_CANNOT_SAY = (
    "built with sparse weights allowed, but TensorRT-RTX picks its kernels when it runs on the user's GPU, so no "
    "sparse tactic can be proven here, and TensorRT-RTX has no kernels for SM90 (H100, H200)"
)
NOT_BUILT = "no engine was built here: tensorrt/build.sh builds one from model.onnx where TensorRT is installed"


@dataclass(frozen=True)
class Row:
    """One product with a site's weight, as TensorRT sees it."""

    site: str
    node: str | None
    """The ONNX node."""
    pattern: str | None
    inputs: int
    outputs: int
    eligible: bool
    chosen: bool | None
    """None where nothing that was seen decides it."""
    why: str
    """Why it does not run sparse, or what is not known; empty where it does."""
    engine_layer: str | None
    tactic: str | None


def table(products: Iterable[Product], log: BuildLog, built: Built, precision: str = "model") -> list[Row]:
    """One row for each product, in their order. `precision`: what TensorRT may compute in, beside the file's types."""
    rows = []
    for given in products:
        product = given if precision == "model" else dataclasses.replace(given, dtype=precision)
        layer = log.layer_of(product.node) if product.node else None
        eligible, chosen, why = _judge(product, log, layer, built)
        name, tactic = (layer.name, layer.tactic) if layer else (None, None)
        target, node = product.target, product.node
        sizes = product.inputs, product.outputs
        rows.append(Row(target.name, node, target.pattern, *sizes, eligible, chosen, why, name, tactic))
    return rows


def to_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """As written to layers.json."""
    return [dataclasses.asdict(row) for row in rows]


def summary(rows: Iterable[Row]) -> str:
    """`36 of 37 products are eligible, 30 chosen`."""
    found = list(rows)
    eligible, chosen = sum(row.eligible for row in found), [row.chosen for row in found if row.eligible]
    known = "not known how many run sparse" if None in chosen else f"{sum(map(bool, chosen))} of them run sparse"
    return f"{eligible} of {len(found)} products are eligible for 2:4, {known}"


def _judge(product: Product, log: BuildLog, layer: EngineLayer | None, built: Built) -> tuple[bool, bool | None, str]:
    """Eligible, chosen, and why not."""
    if reason := _ineligible(product):
        return False, False, reason
    if built == "none":
        return True, None, NOT_BUILT
    if built == "rtx":
        return True, None, RTX_CANNOT_SAY
    if layer and layer.sparse:
        return True, True, ""
    if log.eligible is None or log.chosen is None:
        return True, None, "the build log has no (Sparsity) line; build with a verbose log"
    assert product.node is not None  # else not eligible
    if log.eligible.named and not log.eligible.include(product.node):
        return False, False, _overlooked(product, layer)
    if log.chosen.named:
        chosen = log.chosen.include(product.node)
        return True, chosen, "" if chosen else _dense_tactic(product)
    return True, None, f"the build log counts {log.chosen.count} sparse layers and names none; build with a verbose log"


def _ineligible(product: Product) -> str | None:
    """What rules 2:4 out before TensorRT is asked."""
    target = product.target
    if target.pattern is None:
        return f"dense: {target.dense_because or 'no pattern was asked for'}"
    if product.node is None:
        return "no Gemm, MatMul or Conv of the ONNX file reads its weight"
    if not product.two_of_four:
        return (
            f"its weight is not 2:4 along its {product.inputs} inputs (it is {target.pattern} in sparsec's view of it)"
        )
    for what, size in (("inputs", product.inputs), ("outputs", product.outputs)):
        if size % 4:
            return f"its {size} {what} are not divisible by 4"
    return None


def _overlooked(product: Product, layer: EngineLayer | None) -> str:
    """Why TensorRT does not list a 2:4 weight among the eligible ones."""
    if layer and layer.plugin:
        return f"the plugin {layer.name} runs it, and TensorRT does not look into plugins"
    if reason := _quantized_or_wide(product):
        return reason
    where = f", fused into {layer.name}" if layer else ""
    return f"its weight is 2:4, but TensorRT did not list it as eligible{where}"


def _dense_tactic(product: Product) -> str:
    """Why TensorRT took a dense kernel for an eligible layer."""
    if reason := _quantized_or_wide(product):
        return reason
    if min(product.inputs, product.outputs) <= WIDE:
        return (
            f"its dense kernel was faster: {product.inputs} inputs and {product.outputs} outputs, and sparse kernels "
            f"win where both are more than {WIDE}"
        )
    return "its dense kernel was faster when TensorRT timed both"


def _quantized_or_wide(product: Product) -> str | None:
    """The types for which TensorRT has no sparse kernel."""
    if product.quantized and not product.int8_out:
        return "Q/DQ without an int8 epilogue: no QuantizeLinear follows, and sparse int8 kernels must leave int8"
    if not product.quantized and product.dtype == "float":
        return (
            "it is computed in float32, and TensorRT's sparse kernels are for fp16 and int8: compile with --dtype fp16"
        )
    return None
