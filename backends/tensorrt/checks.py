"""Proofs about the folder `tensorrt/` on disk. The engine is not run: that needs a GPU, and trust in its maker."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sparsec import store
from sparsec.backend import Check, CheckData
from sparsec.backends.tensorrt import judge, proof
from sparsec.backends.tensorrt.backend import ENGINE, LOG, MODEL, TABLE
from sparsec.backends.tensorrt.held import count
from sparsec.backends.tensorrt.layers import summary, table, to_json
from sparsec.backends.tensorrt.log import parse
from sparsec.backends.tensorrt.network import CONVOLUTIONS, Network, Target, targets_in
from sparsec.errors import ArtifactError
from sparsec.recipe import make_backend

JUDGED = 500_000  # sparse weights that the slow judge is asked about without being told to: a second or two


def verify(folder: Path, manifest: dict[str, Any], check: CheckData) -> list[Check]:
    """One check for each fact."""
    facts = manifest["backends"]["tensorrt"]
    onnx = make_backend("onnx{weights=dense}").verify(folder, _as_onnx(manifest, facts), check)
    checks = [Check(f"tensorrt: {one.name.removeprefix('onnx: ')}", one.ok, one.detail) for one in onnx]
    if not all(one.ok for one in checks):
        return checks  # the file cannot be relied on
    network, targets = Network(folder / MODEL), targets_in(manifest)
    sparse = [target for target in targets if target.pattern]
    checks += [
        pattern_check(network, sparse),
        table_check(folder, network, targets, facts),
        engine_check(folder, network, sparse, facts),
    ]
    return [*checks, *_judged(folder, network, sparse), *proof.check(folder)]


def _as_onnx(manifest: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The manifest that an artifact with this ONNX file alone would have."""
    return {**manifest, "backends": {"onnx": facts["onnx"]}}


def pattern_check(network: Network, sparse: list[Target]) -> Check:
    """Whether TensorRT finds the weights 2:4, in the layout in which it reads them."""
    name = "tensorrt: 2:4"
    products = network.products(sparse)
    able = [product for product in products if product.two_of_four and product.node]
    bad = [product for product in products if not product.two_of_four and product.target.kind not in CONVOLUTIONS]
    if bad:
        return Check(name, False, f"{bad[0].target.name}: its weight is not 2:4 along its inputs")
    rest = f"; {len(products) - len(able)} are not, see {TABLE}" if len(able) < len(products) else ""
    return Check(name, True, f"{len(able)} products have weights that are 2:4 along their inputs{rest}")


def table_check(folder: Path, network: Network, targets: list[Target], facts: dict[str, Any]) -> Check:
    """Made again from the ONNX file and the build log."""
    name, log = "tensorrt: layer table", folder / LOG
    rows = table(
        network.products(targets),
        parse(log.read_text(errors="replace") if log.is_file() else ""),
        facts["driver"],
        facts["precision"],
    )
    if store.load_json(folder / TABLE) != to_json(rows):
        return Check(name, False, f"{TABLE} does not follow from {MODEL} and {LOG}; compile again")
    return Check(name, True, f"{TABLE} follows from {MODEL}{' and ' + LOG if log.is_file() else ''}: {summary(rows)}")


def engine_check(folder: Path, network: Network, sparse: list[Target], facts: dict[str, Any]) -> Check:
    """Whether the engine is there, and holds the weights where that can be seen."""
    name, path = "tensorrt: engine", folder / ENGINE
    if facts["driver"] == "none":
        return Check(name, not path.exists(), facts["note"] if not path.exists() else f"{ENGINE} was not built here")
    if not path.is_file() or path.stat().st_size != facts["nbytes_engine"]:
        return Check(name, False, f"expected {ENGINE} with {facts['nbytes_engine']} bytes, as it was built")
    built = f"{path.stat().st_size / 1e6:.1f} MB, built by {facts['driver']} {facts['version']}"
    if facts["held"] is not None:
        held = count(path, network.weights(sparse))
        built += f", holds {held} of {len(sparse)} sparse weights bit for bit"
        if held != facts["held"]:
            return Check(name, False, f"{built}; it held {facts['held']} when it was built")
    if facts["read_back"] is None:
        return Check(name, True, f"{built}; {facts['note']}; it was not loaded, for there was no GPU")
    if facts["read_back"]:
        return Check(name, True, f"{built}; {facts['note']}; loaded again where it was built")
    elsewhere = facts["driver"] == "rtx"  # it builds for other GPUs than the one at hand
    return Check(name, elsewhere, f"{built}; {facts['note']}; the GPU where it was built does not take it")


def _judged(folder: Path, network: Network, sparse: list[Target]) -> list[Check]:
    """A second opinion, where it is to be had in seconds."""
    if not judge.installed() or sum(math.prod(target.shape) for target in sparse) > JUDGED:
        return []
    asked = sorted({product.target.name for product in network.products(sparse) if judge.can_judge(product)})
    if not asked:
        return []
    try:
        fault = judge.fault(judge.judge(folder / MODEL), asked)
    except OSError as error:
        raise ArtifactError(f"polygraphy cannot be run: {error}") from error
    words = f"polygraphy inspect sparsity finds {len(asked)} weights 2:4 too"
    return [Check("tensorrt: polygraphy", fault is None, fault or words)]
