"""How masks act: in the graph while they change, on gradients once they are final."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from training_models import engine, loop

from sparsec.training import masks
from sparsec.training.engine import Engine
from sparsec.training.parts import Method
from sparsec.training.schedules import Cubic, Once, Repeated
from sparsec.training.updates import Hard, Penalty, StraightThrough

WEIGHT = [[4.0, -3.0, 2.0, 1.0], [1.0, 5.0, -8.0, 6.0]]
FIXED = Method(Once(), Hard())
FREE = {
    "admm": Method(Repeated(2, 1), Penalty(0.01)),
    "sr-ste": Method(Repeated(2, 1), StraightThrough(2e-4)),
    "gradual": Method(Cubic(0.0, 0.6, 2), Hard()),
}


class Drifting(torch.optim.SGD):
    """Moves every weight, whatever its gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(0.5)


def masked_nodes(made: Engine) -> list[str]:
    return [
        node.name for node in made.program.module.graph.nodes if node.target in (masks.hard, masks.straight_through)
    ]


def test_factors_are_the_mask_itself() -> None:
    mask = torch.tensor([True, False])

    assert [1, 0] == masks.factors(mask).tolist()
    assert mask.data_ptr() == masks.factors(mask).data_ptr()


def test_the_gradient_of_a_final_mask_is_masked_before_it_is_clipped_and_no_more_after_the_end() -> None:
    made, parameter = engine(WEIGHT, "2:4", FIXED)
    made.begin(2, 2)
    mask = made.sites[0].tensors["mask"]
    x = torch.ones(1, 4)
    for _ in range(2):  # accumulated
        made.program(x)["output"].sum().backward()
    assert [] == masked_nodes(made)
    assert parameter.grad is not None
    assert torch.equal(2 * mask.float(), parameter.grad)

    made.end()
    parameter.grad = None
    made.program(x)["output"].sum().backward()
    assert bool((parameter.grad == 1).all())


@pytest.mark.parametrize("kind", [Drifting, torch.optim.RMSprop, torch.optim.SGD, torch.optim.Adam])
def test_weights_stay_zero_whatever_the_optimizer_does(kind: type[torch.optim.Optimizer]) -> None:
    made, parameter = engine(WEIGHT, "2:4", FIXED)
    optimizer = kind([parameter], lr=0.1, **({"momentum": 0.9} if issubclass(kind, torch.optim.SGD) else {}))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # moments everywhere, before the engine knows of the optimizer
    made.begin(3, 3)
    mask = made.sites[0].tensors["mask"]
    for _ in range(3):
        parameter.grad = None
        made.program(torch.ones(1, 4))["output"].sum().backward()
        optimizer.step()
        made.post_step(optimizer)
        assert not parameter[~mask].any()
        assert bool((parameter[mask] != 0).all())
    for value in optimizer.state[parameter].values():
        assert not (torch.is_tensor(value) and value.shape == mask.shape and value[~mask].any())


@pytest.mark.parametrize("method", FREE.values(), ids=FREE)
def test_masks_leave_the_graph_when_they_become_final_and_come_back_with_an_earlier_state(method: Method) -> None:
    made = loop(method)
    made.run(3)
    free = 0 if isinstance(method.update, Penalty) else 2
    assert free == len(masked_nodes(made.engine))
    tensors, plain = copy.deepcopy(made.state_dict())
    made.run(9)
    assert made.engine.frozen and [] == masked_nodes(made.engine)
    ended = {name: value.clone() for name, value in made.tensors().items()}

    made.load_state(tensors, plain)
    assert free == len(masked_nodes(made.engine))
    made.run(9)
    assert all(torch.equal(ended[name], value) for name, value in made.tensors().items())
    assert not any(name.endswith("_mask") for name, _ in made.engine.program.module.named_buffers())
