"""What other tools store is decoded bit for bit, and damage is named."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from legacy_files import packed, packed24, pruned24
from safetensors.torch import save_file
from torch import Tensor

from sparsec.errors import ArtifactError, UsageError
from sparsec.migrating.decoding import decoded, is_encoded, unpack
from sparsec.migrating.stored import of_safetensors, opened

KINDS = (torch.float32, torch.bfloat16, torch.float16)


def stored(**tensors: Tensor) -> dict[str, Any]:
    return {name.replace("__", "."): partial(lambda one: one, tensor) for name, tensor in tensors.items()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_a_weight_by_hand() -> None:
    """Columns 1 and 9 of row 0 and column 8 of row 1: bytes 0b10, 0b10 and 0, 0b1."""
    made = unpack(
        "w", torch.tensor([5.0, 6.0, -0.0]), torch.tensor([[2, 2], [0, 1]], dtype=torch.uint8), torch.tensor([2, 10])
    )
    expected = torch.zeros(2, 10)
    expected[0, 1], expected[0, 9], expected[1, 8] = 5.0, 6.0, -0.0

    assert torch.equal(bits(expected), bits(made))


@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 6),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
    odd=st.sampled_from([float("nan"), float("inf"), 1.0]),
)
def test_both_codecs_give_back_the_bits(rows: int, groups: int, kind: torch.dtype, seed: int, odd: float) -> None:
    dense = pruned24(torch.randn(rows, 4 * groups, generator=torch.Generator().manual_seed(seed))).to(kind)
    dense[0, :2] = odd
    dense[0, 2:4] = 0
    for encoded in (packed24(dense), packed(dense)):
        parts = stored(**{f"fc__{key}": part for key, part in encoded.items()})

        assert is_encoded(parts)
        (name, found), *others = decoded(parts)
        assert ("fc.weight", []) == (name, others)
        assert torch.equal(bits(dense), bits(found))


def test_a_kept_zero_keeps_its_sign() -> None:
    made = unpack(
        "w", torch.tensor([[-0.0, 0.0]]), torch.tensor([[0b0011]], dtype=torch.uint8), torch.tensor([[1], [4]])
    )

    assert [True, False, False, False] == torch.signbit(made)[0].tolist()


def test_a_vector_and_names_of_parameters_are_decoded_too() -> None:
    norm = {f"norm__weight__{key}": part for key, part in packed(torch.tensor([1.0, 0.0, 2.0])).items()}
    bias = {f"fc__bias__{key}": part for key, part in packed(torch.tensor([0.0, 3.0])).items()}
    found = dict(decoded(stored(**norm, **bias, other=torch.ones(2))))

    assert {"norm.weight": [1.0, 0.0, 2.0], "fc.bias": [0.0, 3.0], "other": [1.0, 1.0]} == {
        name: tensor.tolist() for name, tensor in found.items()
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"compressed": torch.ones(3)}, "fc: 3 values are stored, but 2 bits are set"),
        ({"compressed": torch.ones(2, dtype=torch.complex128)}, "fc: its values are torch.complex128; expected real"),
        ({"shape": torch.tensor([2, 4])}, r"fc.bitmask is .* for a weight \[2, 4\] expected 2 rows of 1 bytes"),
        ({"shape": torch.tensor([-1, 4])}, "the file is damaged"),
        ({"shape": torch.tensor([], dtype=torch.int64)}, "the file is damaged"),
        ({"bitmask": torch.ones(1, 1)}, "fc.bitmask is torch.float32"),
        ({"compressed": None}, "fc.bitmask is stored, fc.compressed is not"),
    ],
)
def test_parts_that_do_not_fit_are_named(change: dict[str, Tensor | None], said: str) -> None:
    parts = {**packed(torch.tensor([[0.0, 1.0, 2.0, 0.0]])), **change}
    with pytest.raises(ArtifactError, match=said):
        list(decoded(stored(**{f"fc__{key}": part for key, part in parts.items() if part is not None})))


@pytest.mark.parametrize(
    ("weight", "mask"),
    [
        ("fc.weight", "fc._weight_mask"),  # modelopt
        ("fc.weight", "fc.__weight_mma_mask"),  # Apex ASP
        ("fc.weight_orig", "fc.weight_mask"),  # torch.nn.utils.prune
        ("fc.parametrizations.weight.original", "fc.parametrizations.weight.0.mask"),  # torch.ao.pruning
    ],
)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_mask_beside_a_weight_is_multiplied(weight: str, mask: str, kind: torch.dtype, tmp_path: Path) -> None:
    dense, kept = torch.tensor([[1.0, -2.0, float("nan"), 4.0]]), torch.tensor([[1, 0, 0, 1]])
    save_file({weight: dense, mask: kept.to(kind), "fc.bias": torch.ones(1)}, tmp_path / "m.safetensors")
    found = dict(decoded(opened(tmp_path / "m.safetensors")))

    assert {"fc.weight", "fc.bias"} == found.keys()
    assert torch.equal(bits(torch.tensor([[1.0, 0.0, 0.0, 4.0]])), bits(found["fc.weight"]))


def test_what_asp_keeps_of_pruned_weights_is_dropped() -> None:
    parts = {
        "__weight_mma_mask": torch.tensor([[True]]),
        "__weight_mma_pruned_p": torch.ones(1, 1),
        "weight": torch.ones(1, 1),
    }
    held = {f"fc.{name}": partial(lambda one: one, tensor) for name, tensor in parts.items()}

    assert ["fc.weight"] == [name for name, _ in decoded(held)]


@pytest.mark.parametrize("mask", [torch.tensor([[0.5, 1.0]]), torch.ones(2, 2)])
def test_a_mask_that_is_none_is_refused(mask: Tensor) -> None:
    with pytest.raises(ArtifactError, match=r"fc.weight has the shape \[1, 2\], its mask .* 0 and 1 only"):
        list(decoded(stored(fc__weight=torch.ones(1, 2), fc___weight_mask=mask)))


def test_a_buffer_that_only_sounds_like_a_mask_is_left_alone() -> None:
    held = stored(attention__bias_weight_mask=torch.ones(2), fc__weight=torch.ones(1, 2))

    assert not is_encoded(held)
    assert held.keys() == dict(decoded(held)).keys()


# What torch.save wrote ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("within", [None, "model_state_dict", "state_dict"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_dict_is_read_alone_or_within_a_checkpoint(within: str | None, legacy: bool, tmp_path: Path) -> None:
    state = {"module.fc.weight": torch.ones(2, 4), "module.fc._weight_mask": torch.eye(2, 4, dtype=torch.bool)}
    data: Any = {within: state, "modelopt_state": {"modelopt_version": "0.47.0"}, "epoch": 3} if within else state
    torch.save(data, tmp_path / "m.pth", _use_new_zipfile_serialization=not legacy)
    found = dict(decoded(opened(tmp_path / "m.pth")))

    assert ["fc.weight"] == list(found)
    assert torch.equal(torch.eye(2, 4), found["fc.weight"])


class Marker:
    """Unpickled, it would write a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def test_a_file_that_could_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.ones(2), "x": Marker(str(tmp_path / "written"))}, tmp_path / "m.pth")
    with pytest.raises(UsageError, match=r"holds more than tensors and plain data \(.*open\).*; it was not read"):
        opened(tmp_path / "m.pth")
    assert not (tmp_path / "written").exists()
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(
        UsageError, match=r"\(torch.nn.modules.linear.Linear\).*torch.save\(model.state_dict\(\), FILE\)"
    ):
        opened(tmp_path / "module.pth")


def test_a_file_without_state_dict_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UsageError, match="holds no state dict"):
        opened(tmp_path / "list.pth")
    (tmp_path / "junk.pth").write_bytes(b"abc" * 100)
    with pytest.raises(ArtifactError, match=r"junk.pth cannot be read: .*; save it again"):
        opened(tmp_path / "junk.pth")


def test_the_same_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ArtifactError, match="w stands in another file"):
        of_safetensors(sorted(tmp_path.iterdir()))
