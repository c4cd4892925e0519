"""Turn a saved program into model.onnx, in a process of its own: `python -m ... PROGRAM OUT_FILE WEIGHTS FORM VALUES`.

It prints one line of JSON: figures, or an error and its kind.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, cast

from sparsec import _fx
from sparsec.backends.onnx.backend import DATA, Form, Weights, unpackable, why_not_linear
from sparsec.backends.onnx.describing import describe
from sparsec.backends.onnx.packed import PackedWeight, to_packed_onnx
from sparsec.backends.onnx.translation import translate
from sparsec.errors import ArtifactError, SparsecError, TraceError
from sparsec.layout import SparseLayout, Values, compress, decompress, stored_as
from sparsec.program import Program
from sparsec.sites import Site

INLINE_LIMIT = 1_500_000_000  # bytes of weights in one protobuf file, whose own limit is 2 GiB
_NO_TRANSLATION = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)', overload='([^']+)'\)>")


def export(
    program: Program,
    out: Path,
    weights: Weights = "packed",
    form: Form = "gemm",
    values: Values = "fp32",
    inline_limit: int = INLINE_LIMIT,
) -> dict[str, Any]:
    """Write `out`, and its weights beside it when they exceed `inline_limit` bytes. Edits the program's module.

    `values`: what the sparse weights are rounded to; dense ones stay in the program's type.
    """
    import onnx
    import onnx_ir

    start = time.perf_counter()
    packed = [site for site in program.sites.sparse if weights == "packed" and not unpackable(site)]
    linear = {site.name for site in packed if not why_not_linear(program, site)}
    facts = describe(program, {site.name: "NMLinear" if site.name in linear else "NMWeight" for site in packed}, values)
    if values != "fp32":
        for site in program.sites.sparse:
            site.write(program.module, decompress(_layout(program, site, values)).float())
    model = translate(program, form)
    layouts = {site.name: PackedWeight(_layout(program, site, values), site.view) for site in packed}
    if changed := sorted(linear ^ to_packed_onnx(model, layouts)):
        raise ArtifactError(
            f"{changed[0]}: the ONNX export took this layer apart, or made one where there was none; please report the "
            "model, or write dense weights (--onnx-weights dense)"
        )
    model.metadata_props.update(facts)
    external = sum(value.const_value.nbytes for value in model.graph.initializers.values()) > inline_limit
    onnx_ir.save(model, out, external_data=DATA if external else None)
    onnx.checker.check_model(str(out), full_check=True)
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "peak_rss": _peak_rss(),
        "opset": model.opset_imports[""],
        "weights": weights,
        "form": form,
    }


def _layout(program: Program, site: Site, values: Values) -> SparseLayout:
    weight = site.read(program.module)
    return stored_as(compress(weight, site.pattern, site.selection), values)  # type: ignore[arg-type]


def _explain(error: Exception, program: Program | None) -> tuple[str, str]:
    """Kind and one paragraph for an error, whatever raised it."""
    if isinstance(error, SparsecError):
        return type(error).__name__, str(error)
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for link in chain:
        if found := _NO_TRANSLATION.search(str(link)):
            return TraceError.__name__, _untranslated(".".join(found.groups()), program)
    root = chain[-1]
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return ArtifactError.__name__, f"the ONNX export failed: {type(root).__name__}: {text[:500]}"


def _untranslated(operator: str, program: Program | None) -> str:
    nodes = program.module.graph.nodes if program else ()
    scopes = [node.meta[_fx.SCOPE] for node in nodes if str(node.target) == operator and node.meta.get(_fx.SCOPE)]
    where = f" (used in {scopes[0]})" if scopes else ""
    return (
        f"operator {operator}{where} has no ONNX translation; leave onnx out of --backend (kernel runs it), "
        "or write that part of the model with other operators"
    )


def _peak_rss() -> int | None:
    """Most bytes this process has held; None where Linux does not tell. (ru_maxrss also counts the parent's.)"""
    status = Path("/proc/self/status")
    return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0]) if status.exists() else None


def main() -> int:
    """Export the program named on the command line; print one JSON line."""
    import torch

    program = None
    torch.set_num_threads(1)  # there is little to compute, and threads that wait for more take the processor's time
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the report alone
        try:
            program = Program.load(sys.argv[1])
            weights, form, values = sys.argv[3:]
            out = Path(sys.argv[2])
            report = export(program, out, cast(Weights, weights), cast(Form, form), cast(Values, values))
        except Exception as error:
            kind, message = _explain(error, program)
            report = {"error": message, "kind": kind}
    print(json.dumps(report))
    return int("error" in report)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking torch apart module by module takes a second and frees nothing that is not freed anyway
