"""GPUs that are not there, too old, or whose driver is: one clear paragraph, or the dense path that is said once."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from models import Residual, made, random

import sparsec
from sparsec.backends.kernel import install as on_cpu
from sparsec.backends.kernel.cuda import build, driver
from sparsec.backends.kernel.cuda import destination as destinations
from sparsec.backends.kernel.cuda.destination import Destination, destination
from sparsec.errors import UsageError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def artifact(tmp_path: Path) -> sparsec.Artifact:
    x, options = random(3, 5).bfloat16(), sparsec.Options(measure_speed=False)
    return sparsec.compile(made(Residual).bfloat16(), [x], pattern="16:2:8", out=tmp_path / "x", options=options)


@pytest.fixture
def turing(artifact: sparsec.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one GPU before Ampere, as far as torch is asked; what shall go there goes to the CPU."""
    on_cpu.say_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(destinations, "Destination", lambda device, **known: Destination(CPU, **known))


@pytest.mark.usefixtures("turing")
def test_below_sm_80_an_artifact_runs_dense_and_says_so_once(artifact, caplog) -> None:
    x = random(4, 5, seed=1).bfloat16()
    (expected,) = artifact.load_dense()(x).values()
    with caplog.at_level(logging.WARNING, "sparsec"):
        loaded = sparsec.load(artifact.root, device="cuda")
        sparsec.load(artifact.root, device="cuda:0")
        parts = artifact.parts("cuda")
    said = [record.getMessage() for record in caplog.records]

    assert torch.equal(expected, *loaded(x).values())
    assert {("dense", False)} == {(one.kernel, one.sparse) for one in loaded.verdicts.values()}
    assert 2 == len(loaded.verdicts) == len(parts.dense) and not parts.layers
    for reason in (*parts.dense.values(), *(one.reason for one in loaded.verdicts.values())):
        assert "compute capability 7.5; sparse tensor cores come with 8.0" in reason
    assert 1 == len(said)
    assert "dense reference path, at dense speed: this GPU has compute capability 7.5" in said[0]


def test_a_machine_without_a_gpu_is_told_why_torch_finds_none(monkeypatch) -> None:
    def refuses(words: str) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for words, told in [
        ("The NVIDIA driver on your system is too old (found version 11040). Please\nupdate", "too old .found version"),
        ("Found no NVIDIA driver on your system. Please check that", "no NVIDIA driver on your system.: install"),
        ("No CUDA GPUs are available", "No CUDA GPUs are available.: .* load the artifact on the CPU"),
    ]:
        monkeypatch.setattr(torch.cuda, "init", partial(refuses, words))
        with pytest.raises(UsageError, match=rf"cuda:0: no CUDA GPU was found \(.*{told}") as error:
            destination(GPU, None)
        assert "\n" not in str(error.value)


class Driver:
    """cuda.bindings.driver of a version."""

    def __init__(self, version: int) -> None:
        self.version = version

    def cuDriverGetVersion(self) -> tuple[int, int]:
        return 0, self.version


def test_a_driver_older_than_the_compiler_is_told_when_an_artifact_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(driver, "unavailable", lambda: None)
    monkeypatch.setattr(driver, "cuda_version", lambda: (13, 5))
    try:
        for version, old in ((12080, True), (13000, False), (14020, False)):
            monkeypatch.setattr(driver, "_driver", lambda version=version: Driver(version))
            driver.unprepared.cache_clear()
            assert old == bool(driver.unprepared())
            if old:
                words = r"cuda:0: the NVIDIA driver is too old: it has CUDA 12.8, .* compiled for CUDA 13.5; update"
                with pytest.raises(UsageError, match=words):
                    destination(GPU, None)
    finally:
        driver.unprepared.cache_clear()


@pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
def test_the_compilers_version_is_known() -> None:
    assert 13 == build.cuda_version()[0]
