"""A backend whose speed is a formula, so that predictions can be checked to the digit."""

from __future__ import annotations

from sparsec.backend import Backend, Verdict
from sparsec.cost import DENSE


class Formula(Backend):
    """Dense products take 1 us for each weight and vector; sparse ones what they keep of it, and `fixed` more."""

    name = "formula"
    describes = "for tests"

    def __init__(self, fixed: float = 0.0, without: tuple[str, ...] = ()) -> None:
        self.fixed, self.without, self.calibrated, self.measured = fixed, without, [], []

    def cost(self, shape, pattern, tokens, values="fp32"):
        batch, rows, cols = shape
        dense = 1e-6 * batch * rows * cols * tokens
        return dense if pattern == DENSE else self.fixed + dense * pattern.density

    def cost_basis(self, pattern, values="fp32"):
        return "measured" if self.calibrated else "model"

    def calibrate(self, patterns, values="fp32", progress=None):
        self.calibrated += patterns

    def measure(self, shape, patterns, tokens, values="fp32"):
        self.measured.append((shape, tuple(tokens)))
        return [[self.cost(shape, pattern, count, values) for pattern in patterns] for count in tokens]

    def plan(self, program, values="fp32", tokens=None):
        return tuple(
            Verdict(site.name, site.name not in self.without, "fast", "no kernel" * (site.name in self.without))
            for site in program.sites.sparse
        )

    def emit(self, program, folder, values="fp32"):
        raise NotImplementedError

    def verify(self, folder, manifest, check):
        raise NotImplementedError

    def load(self, folder, manifest):
        raise NotImplementedError
