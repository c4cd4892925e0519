"""The kernel backend as it predicts for a GPU that need not be here: roofline in place of measured kernels.

Models count as if they were bfloat16, whatever they are: that is what the GPU kernels run (compile with --dtype bf16).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from sparsec.backend import Verdict
from sparsec.backends.kernel.backend import KernelBackend
from sparsec.backends.kernel.cuda import ceilings, choice, roofline
from sparsec.backends.kernel.cuda.ceilings import Ceilings
from sparsec.cost import TokenRange
from sparsec.errors import UsageError
from sparsec.imagined import imagine
from sparsec.layout import Values
from sparsec.pattern import Dense, Pattern
from sparsec.pipeline import Progress, no_progress
from sparsec.uses import lowers_to_linear

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.cost import Basis
    from sparsec.profiling import Profile
    from sparsec.program import Program
    from sparsec.sites import Site

_INT8 = "its values are int8; the GPU kernels take fp16 and bf16"


class OnGpu(KernelBackend):
    """Predicts; what it writes and loads is the kernel backend's. `device`: as `ceilings.named` takes it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._table: Ceilings | None = None

    @property
    def table(self) -> Ceilings:
        """The GPU's ceilings. Raises UsageError where they are not known."""
        self._table = self._table or ceilings.named(self.device)
        return self._table

    def instruction_set(self) -> str:
        return self.table.device.arch

    def runs_on(self) -> str:
        return f"{self.table.gpu}, in bf16"

    def plan(self, program: Program, values: Values = "fp32", tokens: TokenRange | None = None) -> tuple[Verdict, ...]:
        """Without `tokens` every site that a sparse kernel takes runs sparse: a table shows where it is slower."""
        operators = Counter(self.absorbed(program).values() if tokens else ())
        return tuple(
            self._on(program, site, values, tokens, operators[site.name] // len(site.users))
            for site in program.sites.sparse
        )

    def _on(self, program: Program, site: Site, values: Values, tokens: TokenRange | None, operators: int) -> Verdict:
        assert site.pattern is not None
        pattern, (_, rows, cols) = site.pattern.executable, site.shape
        if values == "int8":
            return Verdict(site.name, False, "dense", _INT8)
        if not lowers_to_linear(program.module, site):
            return Verdict(site.name, False, "dense", "it is no plain linear layer; there is no GPU kernel for it")
        chosen = choice.choose(pattern, rows, cols, self.table if tokens else None, tokens, operators=operators)
        return Verdict(site.name, chosen.sparse, chosen.kernel, chosen.reason)

    def cost(self, shape: tuple[int, int, int], pattern: Pattern, tokens: int, values: Values = "fp32") -> float:
        """Of the form that would be chosen for this number of tokens alone; see `choice`."""
        return self.cost_activated(shape, pattern, tokens, 0, values)

    def cost_activated(
        self, shape: tuple[int, int, int], pattern: Pattern, tokens: int, operators: int, values: Values = "fp32"
    ) -> float:
        """The activation counts in every form but panels, which apply it."""
        batch, rows, cols = shape
        if isinstance(pattern, Dense):
            return batch * roofline.dense(self.table, rows, cols, tokens)
        runs = pattern.executable
        forms: tuple[choice.Kernel, ...] = choice.candidates(runs, rows, cols) or ("dense",)
        return batch * min(
            choice.seconds(self.table, one, runs, rows, cols, tokens, operators=operators) for one in forms
        )

    def cost_basis(self, pattern: Pattern, values: Values = "fp32") -> Basis:
        return self.table.basis

    def calibrate(self, patterns: Iterable[Pattern], values: Values = "fp32", progress: Progress = no_progress) -> None:
        """Measures nothing: a GPU that is here is measured when that is asked for, see `calibrate_device`."""

    def measure(
        self, shape: tuple[int, int, int], patterns: Sequence[Pattern], tokens: Sequence[int], values: Values = "fp32"
    ) -> list[list[float]]:
        raise UsageError("--measure times the CPU kernels; for a GPU run: sparsec bench --calibrate, and leave it out")

    def profile(self, program: Program, without: Collection[str], inputs: dict[str, Tensor], tokens: int) -> Profile:
        """Imagined, not run: see `sparsec.imagined`."""
        on = self.table
        return imagine(
            program, without, inputs, tokens,
            lambda operations, moved: max(on.launch_seconds, operations / on.dense_flops, moved / on.memory_bytes),
        )  # fmt: skip
