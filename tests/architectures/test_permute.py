"""Every architecture is permuted in graph mode: it computes what it did, by the pass's own proof, and keeps no less.

SPARSEC_UPDATE=1 renews the shares in expected.json; read the difference before you commit it.
"""

from __future__ import annotations

import json
import os

import pytest
from architectures.report import EXPECTED
from zoo import NOT_TRACEABLE, ZOO

from sparsec import PassManager, trace
from sparsec.permuting.proof import AGREES

pytestmark = pytest.mark.slow  # tests/passes/test_permute.py permutes small nets in every run
ROUNDING = 0.003  # what another version of a library may change of the relative gain


@pytest.mark.parametrize("name", [name for name in ZOO if name not in NOT_TRACEABLE])
def test_outputs_stay_and_more_is_kept(name: str) -> None:
    case = ZOO[name]()
    program = trace(case.model, case.inputs, case.dynamic, case.limits)
    gains = {}
    for pattern in ("2:4", "16:2:8"):
        _, (report,) = PassManager.parse(f"permute{{pattern={pattern}, rounds=1}}").run_reported(program)
        shares = report.data["retained"].values()
        before, after = (sum(share[i] for share in shares) for i in range(2))
        gains[pattern] = round(after / before - 1, 4)
        assert gains[pattern] >= 0
        if report.data["difference"] is None:
            assert 0 == gains[pattern]
        else:
            assert report.data["difference"] <= AGREES

    expected = json.loads(EXPECTED.read_text())
    if os.environ.get("SPARSEC_UPDATE"):
        expected[name]["kept more"] = gains
        lines = [f"  {json.dumps(key)}: {json.dumps(expected[key])}" for key in sorted(expected)]
        EXPECTED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for pattern, gain in expected[name]["kept more"].items():
        assert gains[pattern] >= gain - ROUNDING
