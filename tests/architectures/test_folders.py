"""A folder that save_pretrained wrote is a MODEL: its inputs and the sizes that vary come from its configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import steps
from zoo import ZOO

from sparsec import trace
from sparsec.errors import TraceError
from sparsec.models import load_model

SIZES = {
    "roberta": {"batch": (1, None), "length": (1, 65)},
    "clip": {"batch": (1, None), "length": (1, 64)},
    "t5": {"batch": (1, None), "length": (1, None), "decoder_length": (1, None)},
    "whisper": {"batch": (1, None), "decoder_length": (1, 64)},
    "llama": {"batch": (1, None), "length": (1, 64)},
    "yolos": {"batch": (1, None)},
    "audio-spectrogram-transformer": {"batch": (1, None)},
    "wav2vec2": {"batch": (1, None)},
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "clip" else [pytest.mark.slow]) for n in SIZES])
def test_a_saved_model_is_traced_with_inputs_of_its_kind(name: str, tmp_path: Path) -> None:
    model = ZOO[name]().model
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))

    assert SIZES[name] == loaded.program.dims
    with torch.no_grad():
        assert 0.0 == steps.difference(
            steps.reference(model, loaded.program.inputs), loaded.program(**loaded.program.inputs)
        )


@pytest.mark.slow
def test_a_model_of_fixed_length_says_how_to_give_it(tmp_path: Path) -> None:
    ZOO["mamba"]().model.save_pretrained(tmp_path)

    with pytest.raises(TraceError, match=r"as package\.module:function only the batch varies"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("t5", "mixtral", "levit"))]
)
def test_pruned_weights_go_back_into_the_model_and_through_save_pretrained(name: str, tmp_path: Path) -> None:
    case = ZOO[name]()
    program = trace(case.model, case.inputs, case.dynamic, case.limits)
    frozen, expected = steps.pruned(case, program, "2:4")
    ties = {entry: id(weight) for entry, weight in case.model.named_parameters(remove_duplicate=False)}
    frozen.write_back(case.model)
    case.model.save_pretrained(tmp_path)
    again = type(case.model).from_pretrained(tmp_path)

    assert 0.0 == steps.difference(expected, steps.reference(again, case.other_inputs()))
    assert ties == {entry: id(weight) for entry, weight in case.model.named_parameters(remove_duplicate=False)}
    tied = {entry: id(weight) for entry, weight in again.named_parameters(remove_duplicate=False)}
    assert len(set(ties.values())) == len(set(tied.values()))
