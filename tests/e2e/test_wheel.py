"""The wheel that users install: built from the source distribution, in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from sparsec import __version__

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"
COMPILE = """
import torch, sparsec
net = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 8), torch.nn.Linear(8, 3))
made = sparsec.compile(net, [torch.randn(2, 24)], pattern="8:2:5", out="n.sparsec")
print(sparsec.__file__, made.manifest["sites"][0]["verdicts"]["kernel"]["kernel"])
"""


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SPARSEC_ISA")}
    done = subprocess.run(command, cwd=cwd, env={**kept, **env}, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From the files that git knows: what lies about in a working folder cannot help."""
    folder = tmp_path_factory.mktemp("build")
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the project is not known")
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    present = [name for name in names if name and (ROOT / name).is_file() and not name.startswith("tests/")]
    with tarfile.open(folder / "tree.tar", "w") as tree:
        for name in present:
            tree.add(ROOT / name, f"tree/{name}")
    with tarfile.open(folder / "tree.tar") as tree:
        tree.extractall(folder, filter="data")
    source = run(sys.executable, "-c", BUILD, "sdist", folder, cwd=folder / "tree").splitlines()[-1]
    with tarfile.open(folder / source) as packed:
        packed.extractall(folder, filter="data")
    unpacked = folder / source.removesuffix(".tar.gz")
    return folder / run(sys.executable, "-c", BUILD, "wheel", folder, cwd=unpacked).splitlines()[-1]


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; its dependencies are read from where the tests run, which is not where it is."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder / "bin" / "python",
        "install",
        "-q",
        "--no-deps",
        wheel,
        cwd=folder,
    )
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_the_wheel_holds_the_package_its_data_and_its_kernels_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}

    assert f"sparsec-{__version__}-" in wheel.name
    assert {"sparsec", f"sparsec-{__version__}.dist-info"} == tops
    for part in ("py.typed", "report/report.css", "backends/kernel/cuda/gemm.cu", "passes/mask.py"):
        assert f"sparsec/{part}" in names
    assert 3 == sum(name.endswith(".so") for name in names)
    assert not [name for name in names if "test" in name or name.endswith(".cpp")]


def test_a_clean_environment_compiles_verifies_and_says_its_version(environment: Path, tmp_path: Path) -> None:
    command, python = environment / "bin" / "sparsec", environment / "bin" / "python"

    assert f"sparsec {__version__}" == run(command, "--version", cwd=tmp_path)
    where, kernel = run(python, "-c", COMPILE, cwd=tmp_path).splitlines()[-1].split()
    assert Path(where).is_relative_to(environment)
    assert kernel in ("avx512", "avx2", "portable")
    assert "holds" in run(command, "verify", "n.sparsec", cwd=tmp_path)
    assert "keep 2 of 5" in run(command, "patterns", cwd=tmp_path)
