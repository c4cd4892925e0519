"""Every architecture is pruned in one shot: sites in their pattern, outputs finite and nearer than magnitude gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from zoo import NOT_TRACEABLE, ZOO

from sparsec import Context, PassManager, Program, trace
from sparsec.data import given

pytestmark = pytest.mark.slow  # tests/core/oneshot covers every kind of site in every run
METHODS = {"2:4": "oneshot{solver=sparsegpt, unreached=dense}", "4:2:5": "oneshot{unreached=dense}"}


@pytest.mark.parametrize("pattern", METHODS)
@pytest.mark.parametrize("name", [name for name in ZOO if name not in NOT_TRACEABLE])
def test_every_site_is_pruned(name: str, pattern: str) -> None:
    case = ZOO[name]()
    program = trace(case.model, case.inputs, case.dynamic, case.limits)
    wanted = program.replace(sites=program.sites.with_targets({"*": pattern}))
    context = Context(resources={"calibration": given([program.inputs, case.other_inputs()])})

    pruned = PassManager.parse(METHODS[pattern]).run(wanted, context)

    reached = [site for site in wanted.sites.sparse if pruned.sites[site.name].pattern is not None]
    assert len(reached) >= 0.8 * len(wanted.sites.sparse)
    for site in pruned.sites.sparse:
        assert site.pattern is not None
        assert 0 == site.pattern.violations(site.read(pruned.module)).count, site.name
    assert all(bool(torch.isfinite(value).all()) for value in run(pruned).values())
    masked = PassManager.parse("mask | freeze").run(wanted)
    assert distance(pruned, program) <= 1.1 * distance(masked, program) + 1e-5  # a random head may see nothing of it


def run(program: Program) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: value for name, value in program(**program.inputs).items() if value.is_floating_point()}


def distance(found: Program, dense: Program) -> float:
    """Relative error of the first output on the example inputs, on which it was calibrated too."""
    y, y0 = next(iter(run(found).values())), next(iter(run(dense).values()))
    return float((y - y0).norm() / y0.norm())
