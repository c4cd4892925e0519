"""One real TensorRT-RTX build, shared by all tests that look at one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tensorrt_models import compiled

import sparsec
from sparsec.backend import Check


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> sparsec.Artifact:
    return compiled(tmp_path_factory.mktemp("rtx") / "wide.sparsec", "2:4", "tensorrt{driver=rtx}")


@pytest.fixture
def copy(artifact: sparsec.Artifact, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact.root, tmp_path / "copy.sparsec"))


@pytest.fixture(scope="session")
def proven(artifact: sparsec.Artifact) -> dict[str, Check]:
    return {check.name: check for check in artifact.verify()}
