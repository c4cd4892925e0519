"""The torch24 backend: a graph whose 2:4 layers run on torch's semi-structured kernels, on CUDA GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from sparsec import semi_structured
from sparsec.backend import Backend, Check, CheckData, Emitted, Verdict
from sparsec.errors import PatternError, UsageError
from sparsec.intersection import towards_2_4
from sparsec.lowered import packed_calls
from sparsec.pipeline import PassManager
from sparsec.program import Program, read_graph, write_graph
from sparsec.uses import lowers_to_linear

if TYPE_CHECKING:
    from sparsec.backends.torch24.runtime import CudaModule
    from sparsec.cost import TokenRange
    from sparsec.layout import Values
    from sparsec.sites import Site

FOLDER = "torch24"


class Torch24Backend(Backend):
    """`torch24/`: graph.json and the canonical tables, fp16 or bf16; torch compresses the weights when it is loaded.

    1. The tables are sparsec's own. torch's compressed form belongs to a torch version and, with cuSPARSELt, to a
       library version; made at load, from 2:4 and 64:2:8 alike, it is always the right one, and no native data is
       stored. It costs one compression a layer.
    2. Only patterns of which every weight is 2:4; the others are refused, not run dense.
    3. A layer whose type or shape torch's kernels do not take is stored packed and runs dense, with the reason.
    4. Without a GPU it can be written and proven, with a dense run on the CPU, not loaded.
    """

    name: ClassVar[str] = "torch24"
    describes: ClassVar[str] = "2:4 layers on torch's semi-structured CUDA kernels, fp16 or bf16; loads on a GPU only"

    def refuses(self, program: Program) -> str | None:
        """Models of float32 alone, and patterns that are not 2:4 (rule 2)."""
        weights = [site.read(program.module) for site in program.sites if site.eligible]
        if not any(weight.dtype in semi_structured.DTYPES for weight in weights):
            found = ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})) or "no"
            return (
                f"torch's 2:4 kernels take float16 and bfloat16, found {found} weights; add --dtype bf16 or "
                "--dtype fp16, or leave torch24 out of --backend"
            )
        for site in program.sites.sparse:
            if site.pattern and not site.pattern.implies(semi_structured.TWO_OF_FOUR):
                return f"{site.name}: torch runs only 2:4 sparse, found {site.pattern}; {towards_2_4(site.pattern)}"
        return None

    def plan(self, program: Program, values: Values = "fp32", tokens: TokenRange | None = None) -> tuple[Verdict, ...]:
        """Which of torch's kernels can run every site."""
        return tuple(self._verdict(program, site) for site in program.sites.sparse)

    def _verdict(self, program: Program, site: Site) -> Verdict:
        _, rows, cols = site.shape
        dtype = site.read(program.module).dtype
        if not lowers_to_linear(program.module, site):
            return _dense(site, "it is no plain linear layer, and torch's 2:4 kernels have no other")
        if dtype not in semi_structured.DTYPES:
            return _dense(site, f"torch's 2:4 kernels take float16 and bfloat16; its weight is {dtype}")
        if not semi_structured.takes("cuSPARSELt", dtype, rows, cols):
            of_rows, of_cols = semi_structured.multiples("cuSPARSELt", dtype)
            return _dense(
                site,
                f"its weight is {rows} x {cols}; torch's 2:4 kernels take multiples of {of_rows} rows and "
                f"{of_cols} columns",
            )
        if semi_structured.takes("CUTLASS", dtype, rows, cols):
            return Verdict(site.name, True, "cuSPARSELt or CUTLASS", "")
        of_rows, of_cols = semi_structured.multiples("CUTLASS", dtype)
        caveat = f"dense where torch has no cuSPARSELt: CUTLASS takes multiples of {of_rows} rows and {of_cols} columns"
        return Verdict(site.name, True, "cuSPARSELt", caveat)

    def emit(self, program: Program, folder: Path, values: Values = "fp32") -> Emitted:
        """Write `torch24/` of a frozen program. Raises UsageError or PatternError for what `refuses` says."""
        if reason := self.refuses(program):
            raise (PatternError if program.sites.sparse else UsageError)(reason)
        part = folder / FOLDER
        part.mkdir()
        lowered = PassManager.parse("lower").run(program)
        write_graph(part, lowered.module)
        tables = {call.site: call.layout.nbytes for call in packed_calls(lowered.module)}
        return Emitted(sum(tables.values()), sum(path.stat().st_size for path in part.iterdir()), {})

    def verify(self, folder: Path, manifest: dict[str, Any], check: CheckData) -> list[Check]:
        """Patterns, tables and torch's conversion; outputs dense on the CPU, and on the GPU where there is one."""
        from sparsec.backends.torch24.checks import verify, verify_cuda

        checks = verify(read_graph(folder / FOLDER), manifest, check)
        if torch.cuda.is_available():
            checks.append(verify_cuda(self.load(folder, manifest), manifest, check))
        return checks

    def load(self, folder: Path, manifest: dict[str, Any]) -> CudaModule:
        """The model on the current GPU. Raises UsageError on a machine that cannot run it."""
        from sparsec.backends.torch24.runtime import CudaModule, install

        name = semi_structured.of_this_machine()
        device = torch.device("cuda", torch.cuda.current_device())
        module = read_graph(folder / FOLDER).requires_grad_(False)
        install(module, device, name, lambda weight: semi_structured.compressed(name, weight))
        return CudaModule(module, manifest, device)


def _dense(site: Site, reason: str) -> Verdict:
    return Verdict(site.name, False, "dense", reason)
