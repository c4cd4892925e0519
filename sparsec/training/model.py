"""The model that is trained: the program's own graph, as a module that returns its loss beside its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from sparsec import _fx
from sparsec.program import Program, bind
from sparsec.training.losses import BESIDE, LABELS, Objective

LOSS = "loss"


def own(program: Program) -> None:
    """Give a clone its own parameters and buffers, in place: training writes both. Tied ones stay tied.

    Batch norm writes its statistics while it trains. Nothing is put back: the origin never sees the copies.
    """
    module, copies = program.module, dict[int, nn.Parameter]()
    for name, old in [*module.named_parameters(remove_duplicate=False)]:
        new = copies.setdefault(id(old), nn.Parameter(old.detach().clone(), old.requires_grad))
        _fx.set_tensor(module, name, new)
    buffers = dict[int, Tensor]()
    for name, buffer in [*module.named_buffers(remove_duplicate=False)]:
        _fx.set_tensor(module, name, buffers.setdefault(id(buffer), buffer.clone()))


def statistics(module: GraphModule) -> list[Tensor]:
    """The buffers that a graph writes while it trains: batch norm's running mean and variance."""
    norms = _fx.calls(module.graph, torch.ops.aten.batch_norm.default)
    names = dict.fromkeys(str(node.target) for norm in norms for node in norm.args[3:5] if isinstance(node, Node))
    return [_fx.get_tensor(module, name) for name in names]


class GraphModel(nn.Module):
    """A program as a module for any training loop; `train` and `eval` switch the graph's own mode.

    Called with inputs, and what is `losses.BESIDE` them, by name. With an objective the outputs have `loss`, the mean
    over this batch; but not in eval mode where no labels are given.
    """

    def __init__(self, program: Program, objective: Objective | None = None, teacher: Program | None = None) -> None:
        super().__init__()
        self.graph, self.names = program.module, list(program.inputs)
        self.objective = objective
        self._teacher = [teacher] if teacher is not None and objective and objective.needs_teacher else []
        self._program = [program]  # in lists: neither is a part of the module
        self.train(False)

    def train(self, mode: bool = True) -> GraphModel:
        """Switch dropout and batch norm of the graph; free where the mode stays, as loops ask for it in every step."""
        if mode != self.training:
            self.training = mode
            self._program[0].set_mode("train" if mode else "eval")
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, each once; the masks, which are the engine's, are not there."""
        buffers = {name: value for name, value in self.named_buffers() if value.dtype != torch.bool}
        return {name: value.detach() for name, value in [*self.named_parameters(), *buffers.items()]}

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """The outputs by name."""
        if self.objective is None or (LABELS not in batch and not self.training):
            return self.outputs(batch)
        return self.with_loss(batch, self.objective.counts([batch]))

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without the loss."""
        inputs = {name: value for name, value in batch.items() if name not in BESIDE or name in self.names}
        found: dict[str, Tensor] = self.graph(*bind(self.names, (), inputs))
        return found

    def with_loss(self, batch: dict[str, Tensor], counts: tuple[int, ...]) -> dict[str, Tensor]:
        """The outputs and this batch's part of a step's loss; see `Objective.counts`."""
        assert self.objective is not None
        outputs = self.outputs(batch)
        return {LOSS: self.objective.loss(outputs, batch, self._taught(batch), counts), **outputs}

    def _taught(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for teacher in self._teacher:
            inputs: dict[str, Any] = {name: value for name, value in batch.items() if name in teacher.inputs}
            with torch.no_grad():
                found = teacher(**inputs)
        return found
