"""Channel axes of every architecture: each variable found is proven, and none that was found before is lost.

SPARSEC_UPDATE=1 renews the counts of expected.json; read the difference before you commit it.
"""

from __future__ import annotations

import json
import os

import pytest
from architectures.report import EXPECTED
from core.axes_models import prove, summary
from zoo import NOT_TRACEABLE, ZOO

from sparsec import trace

pytestmark = pytest.mark.slow  # tests/core/test_axes.py proves the usual ones in every run


@pytest.mark.parametrize("name", [name for name in ZOO if name not in NOT_TRACEABLE])
def test_every_variable_is_proven_and_counted(name: str) -> None:
    case = ZOO[name]()

    found = summary(prove(trace(case.model, case.inputs, case.dynamic, case.limits)))

    expected = json.loads(EXPECTED.read_text())
    if os.environ.get("SPARSEC_UPDATE"):
        expected[name]["variables"] = found
        lines = [f"  {json.dumps(key)}: {json.dumps(expected[key])}" for key in sorted(expected)]
        EXPECTED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert expected[name]["variables"] == found
