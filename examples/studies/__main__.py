"""`python -m examples.studies NAME`: run what has no result yet, within a budget; `--report`: write the table.

Several of them may write to one file at a time when --only gives each its own arms.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from examples.studies import study

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "docs" / "results"
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("__init__", "__main__", "study", "minilm"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.studies", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--budget-minutes", type=float, default=60.0, help="CPU minutes of this call")
    parser.add_argument("--only", default="", metavar="TEXT", help="arms with this in `ARM PATTERN seed SEED`")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("SPARSEC_DATA", "../shared/data")))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "sparsec-studies")
    parser.add_argument("--out", type=Path, help="results, a line each; default docs/results/data/NAME.jsonl")
    parser.add_argument("--report", type=Path, nargs="?", const=Path(), help="only write this page; default: its own")
    asked = parser.parse_args()
    found: study.Study = importlib.import_module(f"examples.studies.{asked.name}").STUDY
    out = asked.out or RESULTS / "data" / f"{asked.name}.jsonl"
    if asked.report:
        page = RESULTS / found.page if asked.report == Path() else asked.report
        study.write_report(found, study.read(out), page)
        if found.plot:
            found.plot(study.read(out), page.parent)
        return 0
    arms = [arm for arm in found.arms if asked.only in f"{arm.arm} {arm.pattern} seed {arm.seed}"]
    place = study.Place(asked.data, asked.work, asked.device)
    return 1 if study.run(replace(found, arms=arms), out, place, asked.budget_minutes) else 0


if __name__ == "__main__":
    sys.exit(main())
