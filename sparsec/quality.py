"""How far a sparse model's outputs are from the dense original's, before anybody trusts it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsec.errors import VerificationError

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 0.95
"""Below this cosine a model is said to need training: its outputs point elsewhere than the original's."""
EMBEDDING_FLOOR = 0.80
"""The same for the mean of an encoder's output vectors, in which what is wrong with single tokens partly cancels."""
_HIDDEN = "last_hidden_state"  # what encoders of transformers call the vectors that embeddings are means of


@dataclass(frozen=True)
class Quality:
    """Distance to the dense original, over the first floating-point output on all samples."""

    output: str
    cosine: float
    """Mean over output vectors (the last dimension) of the cosine with the original's."""
    relative_error: float
    """||y - y0|| / ||y0||, Frobenius."""
    embedding: float | None = None
    """Mean over samples of the cosine of mean output vectors (sentence embeddings), for encoders of text."""

    @property
    def words(self) -> str:
        """The verdict in plain words."""
        if self.cosine >= FLOOR:
            return f"close to the dense original (cosine {self.cosine:.3f} on {self.output})"
        if self.embedding is not None:
            verdict = "needs training" if self.embedding < EMBEDDING_FLOOR else "changed; test it on your task"
            return (
                f"{verdict}: sentence embeddings have cosine {self.embedding:.3f} with the dense original's, single "
                f"vectors {self.cosine:.3f} ({self.output}; below {EMBEDDING_FLOOR} embeddings are not usable as they "
                "are)"
            )
        return (
            f"needs training: outputs have cosine {self.cosine:.3f} with the dense original's ({self.output}; "
            f"below {FLOOR} a model is not usable as it is)"
        )


def check_least(measured: Quality, least: float | None) -> None:
    """Raise VerificationError where the cosine is below what --min-quality asked for."""
    if least is not None and not measured.cosine >= least:
        raise VerificationError(f"the model {measured.words}; --min-quality {least} was asked for; nothing written")


def measure(
    sparse: Callable[..., dict[str, Tensor]],
    dense: Callable[..., dict[str, Tensor]],
    samples: Iterable[dict[str, Tensor]],
) -> Quality:
    """Run both models on the samples and compare their first floating-point output."""
    import torch

    name, cosines, vectors, error, norm = "", 0.0, 0, 0.0, 0.0
    embeddings: list[Tensor] = []
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
            if name == _HIDDEN and y.dim() == 3 and "input_ids" in inputs:
                mask = inputs.get("attention_mask")
                pooled, pooled0 = _pooled(y, mask), _pooled(y0, mask)
                embeddings.append(torch.nn.functional.cosine_similarity(pooled, pooled0, dim=-1))
            error, norm = error + float((y - y0).square().sum()), norm + float(y0.square().sum())
    embedding = float(torch.cat(embeddings).mean()) if embeddings else None
    return Quality(name, cosines / max(vectors, 1), (error / max(norm, 1e-300)) ** 0.5, embedding)


def _pooled(vectors: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, length, size) -> the mean over the tokens that are not masked, (batch, size)."""
    weights = vectors.new_ones(vectors.shape[:2]) if mask is None else mask.to(vectors.dtype)
    summed: Tensor = (vectors * weights[..., None]).sum(1)
    return summed / weights.sum(1, keepdim=True).clamp(min=1)
