"""The engine: what sparse training does around any optimizer step. It knows no loop, no data and no loss.

    begin -> for each step: [gradients] observe -> [clip] -> pre_step -> [optimizer] -> post_step; epoch_end ... -> end

1. The parameters of the program given are trained in place: the caller owns them (`model.own`).
2. Masks are bool buffers in the graph while they act. When they become final, weights and the optimizer's moments are
   set to zero where they are 0, and again after every step: moments and weight decay would bring them back.
3. A site that is selected before training keeps its selection from the first step on.
4. `end` leaves no mask in the graph, which is in eval mode, exact zeros in the weights, a selection on every site.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsec import _fx
from sparsec.errors import PassError, PatternError, UsageError
from sparsec.program import Program
from sparsec.selection import Selection
from sparsec.sites import Site
from sparsec.training.parts import Act, Clock, Method, Tracked

State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors, and what JSON can hold."""
_SELECTION = "selection."


class Engine:
    """Trains the sparse sites of a program by a method. See the module for the order of calls."""

    def __init__(self, program: Program, method: Method) -> None:
        if any(site.mask for site in program.sites):
            raise UsageError("the engine puts masks into the graph itself: run the freeze pass before")
        self.program, self.method, self.clock = program, method, Clock(0, 1)
        self.numbers: dict[str, Any] = {}
        self.curves: dict[str, list[list[float]]] = {}
        """Name -> [step, value], one for each time that masks were chosen."""
        self.frozen = False
        module = program.module
        self.sites = [Tracked(s, module.get_parameter(s.name), selection=s.selection) for s in program.sites.sparse]
        for one in self.sites:
            assert one.site.pattern is not None
            if one.selection is None and (reason := method.schedule.misfit(one.site.pattern)):
                raise PatternError(f"{one.site.name}: {reason}")
            if not one.parameter.requires_grad:
                raise UsageError(f"{one.site.name} has a pattern but is not trained (requires_grad is False)")

    @property
    def _free(self) -> list[Tracked]:
        return [one for one in self.sites if one.selection is None]

    def begin(self, steps: int, per_epoch: int) -> None:
        """Before the first of `steps` optimizer steps, `per_epoch` of which are an epoch."""
        self.clock = Clock(steps, per_epoch)
        self.method.schedule.check(self.clock)
        for one in self.sites:
            if one.selection is not None:  # rule 3
                self._fix(one, one.selection, None)
        if self.method.schedule.frozen_from(self.clock) > 0:
            self.method.update.begin(self._free, self._project, self.numbers)
            self._act()
        else:
            self._freeze(None)

    def observe(self) -> None:
        """Gradients are complete: accumulated, averaged and not scaled; before clipping where the loop allows it."""
        for one in self._free:
            self.method.criterion.observe(one)

    def pre_step(self) -> None:
        """After clipping, before the optimizer steps."""
        if not self.frozen:
            self.method.update.pre_step(self._free, self.numbers)

    @torch.no_grad()
    def post_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """After the optimizer stepped."""
        self.clock = replace(self.clock, step=self.clock.step + 1)
        for one in self.sites:
            if one.selection is not None:
                one.parameter.masked_fill_(~one.tensors["mask"], 0.0)  # rule 2
        self._choose(epoch_ends=False)
        if self.clock.step % self.clock.per_epoch:  # else the epoch's own choice comes first, in `epoch_end`
            self._freeze_if_due(optimizer)

    @torch.no_grad()
    def epoch_end(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """After the last step of every epoch."""
        self._choose(epoch_ends=True)
        self._freeze_if_due(optimizer)

    @torch.no_grad()
    def end(self, optimizer: torch.optim.Optimizer | None = None) -> Program:
        """After the last step. Raises PassError if a weight breaks its pattern: a fault of the method."""
        self._freeze(optimizer)
        done = []
        for one in self.sites:
            assert one.selection is not None and one.site.pattern is not None
            _fx.remove_mask(self.program.module, _mask_name(one.site))
            weight = one.site.read(self.program.module)
            if broken := one.site.pattern.violations_of(weight, one.selection).first:
                raise PassError(f"{one.site.name}: after training it breaks {one.site.pattern}: {broken[0]}")
            done.append(one.site.replace(selection=one.selection))
        self.program.set_mode("eval")  # recompiles
        facts = self.program.facts - {"masked"} | {"selected", "trained", "frozen"}
        return self.program.with_sites(done).replace(facts=facts)

    @contextlib.contextmanager
    def pruned(self) -> Iterator[None]:
        """Inside, the weights are those that `end` would leave if it came now: evaluate and save them there."""
        kept = []
        with torch.no_grad():
            for one in self._free:
                mask = self._final(one)[1]
                kept.append((one, one.parameter.detach().clone()))
                one.parameter.masked_fill_(~mask, 0.0)
                if _fx.has_tensor(self.program.module, _mask_name(one.site)):
                    _fx.set_tensor(self.program.module, _mask_name(one.site), mask)
        try:
            yield
        finally:
            with torch.no_grad():
                for one, weight in kept:
                    one.parameter.copy_(weight)
                self._act()

    def state_dict(self) -> State:
        """All that the engine needs to go on, beside the parameters: tensors, and plain data."""
        tensors = {f"{one.site.name}:{key}": value for one in self.sites for key, value in one.tensors.items()}
        for one in self.sites:
            tables = one.selection.tensors() if one.selection else {}
            tensors |= {f"{one.site.name}:{_SELECTION}{key}": value for key, value in tables.items()}
        plain = {"method": repr(self.method), "patterns": self._patterns(), "numbers": self.numbers}
        clock = {"steps": self.clock.steps, "per_epoch": self.clock.per_epoch, "step": self.clock.step}
        return tensors, {**plain, "clock": clock, "frozen": self.frozen, "curves": self.curves}

    def load_state(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, in place of `begin`. Raises UsageError for that of another method or pattern."""
        for key, own in (("method", repr(self.method)), ("patterns", self._patterns())):
            if plain[key] != own:
                raise UsageError(f"the state to resume has {key} {plain[key]}; this training has {own}: start anew")
        self.clock, self.frozen = Clock(**plain["clock"]), bool(plain["frozen"])
        self.numbers = dict(plain["numbers"])
        self.curves = {name: [list(point) for point in curve] for name, curve in plain["curves"].items()}
        for one in self.sites:
            prefix, chosen = f"{one.site.name}:", f"{one.site.name}:{_SELECTION}"
            own_tensors = {name: value for name, value in tensors.items() if name.startswith(prefix)}
            if f"{chosen}positions" in own_tensors:
                one.selection = Selection.of(own_tensors, chosen)
            one.tensors = {
                name.removeprefix(prefix): value.clone()
                for name, value in own_tensors.items()
                if not name.startswith(chosen)
            }
        self._act()

    def _patterns(self) -> dict[str, str]:
        return {one.site.name: str(one.site.pattern) for one in self.sites}

    def _choose(self, epoch_ends: bool) -> None:
        if self.frozen or not self._free or not self.method.schedule.fires(self.clock, epoch_ends):
            return
        for name, value in self.method.update.choose(self._free, self._project, self.numbers).items():
            self.curves.setdefault(name, []).append([self.clock.step, value])
        self._act()

    def _freeze_if_due(self, optimizer: torch.optim.Optimizer | None) -> None:
        if self.clock.step >= self.method.schedule.frozen_from(self.clock):
            self._freeze(optimizer)

    @torch.no_grad()
    def _freeze(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Make all masks final (rule 2)."""
        if self.frozen:
            return
        for one in self._free:
            self._fix(one, *self._final(one), optimizer)
        self.frozen = True
        self._act()

    @torch.no_grad()
    def _fix(
        self, one: Tracked, selection: Selection, mask: Tensor | None, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        site = one.site
        assert site.pattern is not None
        if mask is None:
            mask = site.view.to_parameter(site.pattern.mask(selection, site.shape[2]))
        one.selection, one.tensors = selection, {"mask": mask}
        one.parameter.masked_fill_(~mask, 0.0)
        for moment in (optimizer.state.get(one.parameter, {}) if optimizer else {}).values():
            if isinstance(moment, Tensor) and moment.shape == mask.shape:
                moment.masked_fill_(~mask, 0.0)

    def _final(self, one: Tracked) -> tuple[Selection, Tensor]:
        """Selection and mask of a site's own pattern, of the weights as they are."""
        assert one.site.pattern is not None
        view, score = one.site.view, self.method.criterion.score(one, one.parameter.detach())
        try:
            selection, mask = one.site.pattern.choose(view.to_matrices(score), self.method.columns)
        except PatternError as error:
            raise PatternError(f"{one.site.name}: {error}") from None
        return selection, view.to_parameter(mask)

    def _project(self, one: Tracked, weight: Tensor) -> Tensor:
        pattern = self.method.schedule.pattern(one.site, self.clock)
        if pattern is None:
            return torch.ones_like(weight, dtype=torch.bool)
        view, score = one.site.view, self.method.criterion.score(one, weight)
        try:
            return view.to_parameter(pattern.choose(view.to_matrices(score), self.method.columns)[1])
        except PatternError as error:
            raise PatternError(f"{one.site.name}: {error}") from None

    def _act(self) -> None:
        """Bring the graph's masks up to date: new buffers, or nodes where a mask begins to act."""
        module, edited = self.program.module, False
        for one in self.sites:
            name, act = _mask_name(one.site), "hard" if one.selection is not None else self.method.update.act
            if act == "nothing" or "mask" not in one.tensors:
                continue
            if (acts := _acts(self.program, name)) not in ("nothing", act):
                _fx.remove_mask(module, name)
            _fx.set_tensor(module, name, one.tensors["mask"])
            if acts != act:
                _fx.insert_mask(module, one.site, name, straight_through if act == "through" else None)
                edited = True
        if edited:
            module.recompile()


def _mask_name(site: Site) -> str:
    return f"{site.name}_mask"


def _acts(program: Program, mask: str) -> Act:
    users = [user for node in _fx.reads(program.module, mask) for user in node.users]
    if not users:
        return "nothing"
    return "through" if users[0].target is straight_through else "hard"


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mask: Tensor, weight: Tensor) -> Tensor:
        return torch.where(mask, weight, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def straight_through(mask: Tensor, weight: Tensor, other: float) -> Tensor:
    """`where(mask, weight, 0)` whose gradient goes to all of `weight`; `other` is 0, as in the graph's own masks."""
    result: Tensor = _StraightThrough.apply(mask, weight)  # type: ignore[no-untyped-call]
    return result
