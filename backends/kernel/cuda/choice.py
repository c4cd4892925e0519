"""What runs a weight on a GPU: the panel kernels, torch's 2:4 product, or the dense one.

1. A weight has one form there. It is chosen when it is loaded, for the tokens that were declared, else for 1 to 512:
   the form that is predicted fastest, as the geometric mean over the powers of two of that range.
2. A weight that no sparse form makes faster runs dense, with the reason; so does one that none takes.
3. torch's 2:4 product is a candidate where every weight of the pattern is 2:4, 64:2:8 alike, and this torch has it.
4. Without a table of the GPU nothing is predicted: what has panels runs on them.
5. The operators of an activation behind a layer count for the forms that do not apply it themselves: all but panels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from sparsec import semi_structured
from sparsec.backends.kernel.cuda import roofline
from sparsec.backends.kernel.cuda.ceilings import Ceilings
from sparsec.backends.kernel.cuda.panels import ROWS, Form, no_panels
from sparsec.cost import UNDECLARED, TokenRange, slow, speed
from sparsec.layout import Values
from sparsec.pattern import NM, Dense, Pattern, SharedColumns

Kernel = Literal["panels", "cuSPARSELt", "dense"]
DEFAULT = TokenRange.parse(UNDECLARED)


@dataclass(frozen=True)
class Chosen:
    """What runs a weight, and why: a reason where it is dense, a caveat where there is one."""

    kernel: Kernel
    reason: str = ""

    @property
    def sparse(self) -> bool:
        """Whether it is faster than dense, as far as is known."""
        return self.kernel != "dense"


def choose(
    pattern: Pattern,
    rows: int,
    cols: int,
    on: Ceilings | None,
    tokens: TokenRange | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    moved: bool = False,
    two_of_four: bool = True,
    operators: int = 0,
) -> Chosen:
    """Choose for a weight (rows, cols).

    `moved`: its strips' rows come from anywhere; `two_of_four`: torch has 2:4; `operators`: see rule 5.
    """
    forms = candidates(pattern, rows, cols, dtype, moved, two_of_four)
    if not forms:
        return Chosen("dense", no_panels(pattern) or "no sparse kernel takes it")
    if on is None:
        kernel: Kernel = "panels" if "panels" in forms else "cuSPARSELt"
        return Chosen(kernel, caveat(pattern) if kernel == "panels" else "")
    counts = (tokens or DEFAULT).counts
    speeds = {one: _speed(on, one, pattern, rows, cols, moved, operators, counts) for one in forms}
    best = max(speeds, key=lambda one: speeds[one])
    if speeds[best] < 1:
        undeclared = "" if tokens else "; if its layers see others, compile it with --tokens"
        return Chosen("dense", slow(speeds[best], tokens or DEFAULT, on.basis, on.gpu) + undeclared)
    return Chosen(best, caveat(pattern) if best == "panels" else "")


def candidates(
    pattern: Pattern,
    rows: int,
    cols: int,
    dtype: torch.dtype = torch.bfloat16,
    moved: bool = False,
    two_of_four: bool = True,
) -> tuple[Kernel, ...]:
    """The sparse forms that a weight can have; panels first. See `choose`."""
    found: list[Kernel] = [] if no_panels(pattern) else ["panels"]
    if two_of_four and not moved and pattern.implies(semi_structured.TWO_OF_FOUR):
        found += ["cuSPARSELt"] if semi_structured.takes("cuSPARSELt", dtype, rows, cols) else []
    return tuple(found)


def seconds(
    on: Ceilings,
    kernel: Kernel,
    pattern: Pattern,
    rows: int,
    cols: int,
    tokens: int,
    moved: bool = False,
    operators: int = 0,
) -> float:
    """Of one product in one of the forms, and of the activation behind it (rule 5)."""
    if kernel == "panels":
        assert isinstance(pattern, (NM, SharedColumns))
        return roofline.panels(on, Form(pattern, rows, cols, moved), tokens)
    product = roofline.dense if kernel == "dense" else roofline.two_of_four
    return product(on, rows, cols, tokens) + operators * roofline.elementwise(on, rows, tokens)


def caveat(pattern: Pattern) -> str:
    """Where the panel kernels do not run at full speed."""
    if isinstance(pattern, SharedColumns) and pattern.v % ROWS:
        apart = math.gcd(ROWS, pattern.v)
        return f"V = {pattern.v}: the GPU kernels gather for every {apart} rows anew; multiples of {ROWS} are faster"
    return ""


def _speed(
    on: Ceilings,
    kernel: Kernel,
    pattern: Pattern,
    rows: int,
    cols: int,
    moved: bool,
    operators: int,
    counts: tuple[int, ...],
) -> float:
    def cost(shape: tuple[int, int, int], pattern: Pattern, tokens: int, values: Values) -> float:
        one: Kernel = "dense" if isinstance(pattern, Dense) else kernel
        return seconds(on, one, pattern, rows, cols, tokens, moved, operators)

    return speed(cost, (1, rows, cols), pattern, counts)
