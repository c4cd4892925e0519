"""proof.json: what `prove` measured on a user's GPU, beside the engine. It came later, so it is not hashed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsec import store
from sparsec.backend import Check
from sparsec.errors import ArtifactError

PROOF, FORMAT = "proof.json", "sparsec-tensorrt-proof"
_MODEL = "model.onnx"


def write(folder: Path, proof: dict[str, Any]) -> Path:
    """Put the proof of this folder's ONNX file in place, whole."""
    data = {"format": FORMAT, "version": 1, "onnx_sha256": store.sha256(folder / _MODEL), **proof}
    store.replace_file(folder / PROOF, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())
    return folder / PROOF


def read(folder: Path) -> dict[str, Any] | None:
    """The proof, or None where there is none. Raises ArtifactError where it is damaged or of another ONNX file."""
    if not (folder / PROOF).exists():
        return None
    proof = store.load_json(folder / PROOF)
    if not isinstance(proof, dict) or proof.get("format") != FORMAT or proof.get("version") != 1:
        raise ArtifactError(f"{folder / PROOF} is no proof that this sparsec wrote; prove again, or delete it")
    if proof.get("onnx_sha256") != store.sha256(folder / _MODEL):
        raise ArtifactError(f"{folder / PROOF} is of another {_MODEL}; prove again, or delete it")
    return proof


def words(folder: Path) -> list[str]:
    """The proof in one line, for people; none where nothing was proven."""
    try:
        proof = read(folder)
        return [_sentence(proof)] if proof else []
    except ArtifactError as error:
        return [str(error)]


def check(folder: Path) -> list[Check]:
    """One check where there is a proof."""
    try:
        proof = read(folder)
        return [Check("tensorrt: proof", True, _sentence(proof))] if proof else []
    except ArtifactError as error:
        return [Check("tensorrt: proof", False, str(error))]


def _sentence(proof: dict[str, Any]) -> str:
    try:
        times = ", ".join(
            f"{case['dense_ms'] / case['sparse_ms']:.2f}x as fast as dense at {case['sizes']}"
            for case in proof["times"]
        )
        return f"proof.json (not hashed): TensorRT {proof['tensorrt']} on {proof['gpu']}: {proof['layers']}; {times}"
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ArtifactError(
            f"{PROOF} is damaged: {type(error).__name__}: {error}; prove again, or delete it"
        ) from error
