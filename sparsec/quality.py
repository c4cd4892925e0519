"""How far a sparse model's outputs are from the dense original's, before anybody trusts it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.program import Program

FLOOR = 0.95
"""Below this cosine a model is said to need training: its outputs point elsewhere than the original's."""


@dataclass(frozen=True)
class Quality:
    """Distance to the dense original, over the first floating-point output on all samples."""

    output: str
    cosine: float
    """Mean over output vectors (the last dimension) of the cosine with the original's."""
    relative_error: float
    """||y - y0|| / ||y0||, Frobenius."""

    @property
    def words(self) -> str:
        """The verdict in plain words."""
        if self.cosine >= FLOOR:
            return f"close to the dense original (cosine {self.cosine:.3f} on {self.output})"
        return (
            f"needs training: outputs have cosine {self.cosine:.3f} with the dense original's ({self.output}; "
            f"below {FLOOR} a model is not usable as it is)"
        )


def measure(sparse: Callable[..., dict[str, Tensor]], dense: Program, samples: Iterable[dict[str, Tensor]]) -> Quality:
    """Run both programs on the samples and compare their first floating-point output."""
    import torch

    name, cosines, vectors, error, norm = "", 0.0, 0, 0.0, 0.0
    with torch.no_grad():
        for inputs in samples:
            expected, found = dense(**inputs), sparse(**inputs)
            name = next((key for key, value in expected.items() if value.is_floating_point()), "")
            if not name:
                continue
            y0, y = expected[name].double(), found[name].double()
            y0, y = (y0, y) if y0.dim() > 1 else (y0.reshape(1, -1), y.reshape(1, -1))  # single numbers have no angle
            cosine = torch.nn.functional.cosine_similarity(y, y0, dim=-1)
            cosine = cosine.masked_fill((y == y0).all(-1), 1.0)  # zero vectors have no angle, but may be equal
            cosines, vectors = cosines + float(cosine.sum()), vectors + cosine.numel()
            error, norm = error + float((y - y0).square().sum()), norm + float(y0.square().sum())
    return Quality(name, cosines / max(vectors, 1), (error / max(norm, 1e-300)) ** 0.5)
