"""Jobs in a process of their own: what they report, and what becomes of their death."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsec import child
from sparsec.errors import ArtifactError, UsageError


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run this text as a job."""
    monkeypatch.syspath_prepend(tmp_path)

    def run(text: str, cwd: Path | None = None) -> dict:
        (tmp_path / "a_job.py").write_text(text)
        return child.run("a_job", ["7"], "the job", "leave it", cwd)

    return run


def test_the_last_line_is_the_report(job) -> None:
    assert {"found": "7"} == job("import sys; print('noise'); print('{\"found\": \"%s\"}' % sys.argv[1])")


def test_a_reported_error_is_raised_as_its_kind(job) -> None:
    with pytest.raises(UsageError, match="no such thing"):
        job('print(\'{"error": "no such thing", "kind": "UsageError"}\')')


def test_a_crash_ends_the_job_only(job) -> None:
    with pytest.raises(ArtifactError, match=r"the job was ended by signal 6.*; leave it"):
        job("import os; os.abort()")


def test_an_unreported_error_is_told_in_its_last_line(job) -> None:
    with pytest.raises(ArtifactError, match="the job ended with status 1: ValueError: odd; leave it"):
        job("raise ValueError('odd')")


def test_a_file_in_the_working_folder_is_not_taken_for_a_package(job, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "json.py").write_text("raise ImportError")

    assert {"found": 1} == job("import json; print('{\"found\": 1}')", here)
