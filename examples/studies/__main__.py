"""`python -m examples.studies NAME`: run what has no result yet, within a budget; `--report`: write the table.

Several of them may write to one file at a time when --only gives each its own arms.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from examples.studies import study

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "docs" / "results"
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("__init__", "__main__", "study", "minilm"))


def studies_of(name: str) -> Sequence[study.Study]:
    """The studies of a file here: one, or several that are run and told of together."""
    module = importlib.import_module(f"examples.studies.{name}")
    return module.STUDIES if hasattr(module, "STUDIES") else (module.STUDY,)


def chosen(found: study.Study, text: str) -> study.Study:
    """With the arms alone of which the text, spaces around it aside, is a part, as in --only.

    It begins and ends where a word does: `2:4` is neither in `64:2:4` nor in `2:4@strip`, `mask` not in `fixed-mask`.
    """
    part = re.compile(rf"(?<![\w:.@+-]){re.escape(text.strip())}(?![\w:.@+-])" if text.strip() else "")
    told = {arm: " ".join(f"{found.name} {arm.arm} {arm.pattern} seed {arm.seed}".split()) for arm in found.arms}
    arms = [arm for arm, words in told.items() if part.search(words)]
    return replace(found, arms=arms)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.studies", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--budget-minutes", type=float, default=60.0, help="CPU minutes of this call")
    parser.add_argument("--only", default="", metavar="WORDS", help="arms with them in `STUDY ARM PATTERN seed SEED`")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("SPARSEC_DATA", "../shared/data")))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "sparsec-studies")
    parser.add_argument("--out", type=Path, help="results, a line each; default docs/results/data/NAME.jsonl")
    parser.add_argument("--report", type=Path, nargs="?", const=Path(), help="only write this page; default: its own")
    asked = parser.parse_args()
    found = studies_of(asked.name)
    out = asked.out or RESULTS / "data" / f"{asked.name}.jsonl"
    if asked.report:
        for one in found:
            page = RESULTS / one.page if asked.report == Path() else asked.report
            study.write_report(one, study.read(out), page)
            if one.plot:
                one.plot(study.read(out), page.parent)
        return 0
    some = [part for part in (chosen(one, asked.only) for one in found) if part.arms]
    if not some:
        parser.error(f"--only {asked.only}: no arm of {asked.name} has this, as whole words")
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {asked.device}: torch finds no CUDA GPU here; leave --device out")
    place = study.Place(asked.data, asked.work, asked.device)
    return 1 if study.run_all(some, out, place, asked.budget_minutes) else 0


if __name__ == "__main__":
    sys.exit(main())
