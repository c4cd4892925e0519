"""The level is the processor's best unless SPARSEC_ISA says otherwise; so is the library and SPARSEC_LIBRARY."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsec.backends.kernel.cpu import library
from sparsec.errors import UsageError


def test_best_level_is_chosen_and_others_can_be_forced() -> None:
    assert library.supported()[-1] == library._choose("")[0]
    for level in library.supported():
        assert (level, "") == library._choose(level)
    assert library._choose("reference") == (None, "SPARSEC_ISA=reference turns the CPU kernels off")


def test_unknown_level_is_refused() -> None:
    with pytest.raises(UsageError, match="sse is not known; expected one of portable, avx2, avx512, reference"):
        library._choose("sse")


def test_level_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "supported", lambda: ("portable",))
    library._choose.cache_clear()
    with pytest.raises(UsageError, match="runs only portable"):
        library._choose("avx512")


def test_another_library_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    monkeypatch.setenv("SPARSEC_LIBRARY", str(other))
    with pytest.raises(UsageError, match="is not a file"):
        library._load.__wrapped__()
    other.write_bytes(Path(library.library()._name).read_bytes())

    loaded, reason = library._load.__wrapped__()
    assert (str(other), "") == (loaded._name, reason)
