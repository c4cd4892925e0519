"""The engine: what sparse training does around any optimizer step. It knows no loop, no data and no loss.

    begin -> for each step: [gradients] observe -> [clip] -> pre_step -> [optimizer] -> post_step; epoch_end ... -> end

1. The parameters of the program given are trained in place: the caller owns them (`model.own`).
2. Masks that still change act in the graph (`masks`). When they become final, weights and the optimizer's moments are
   set to zero where they are 0, so the graph needs them no more; from then on gradients are masked as they come, so
   what Adam or SGD steps stays 0. After the step of any other optimizer, weights are masked again.
3. A site that is selected before training keeps its selection from the first step on.
4. Under global scope an unstructured site ends with a pattern of its own: what it got of the budget that all share.
5. `end` leaves no mask in the graph, which is in eval mode, exact zeros in the weights, a selection on every site.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sparsec import _fx
from sparsec.errors import PassError, PatternError, UsageError
from sparsec.pattern import Pattern, Unstructured
from sparsec.program import Program
from sparsec.selection import Selection
from sparsec.sites import Site
from sparsec.training import masks, scope
from sparsec.training.parts import WHOLE, Clock, Method, Tracked

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
        self._shares: dict[str, Pattern] = {}
        self._guards: dict[str, RemovableHandle] = {}
        self._cleared = False
        """Whether masked weights and their moments are 0 wherever masks are final."""
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
        self.numbers["share"] = 0.0
        for one in self.sites:
            if one.selection is not None:  # rule 3
                self._fix(one, one.selection, None)
        if self.method.schedule.frozen_from(self.clock) > 0:
            self.method.update.begin(self._free, self._project, self.numbers)
            self._act()
        else:
            self.freeze()

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
        self._clear(optimizer)
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
        self.freeze(optimizer)
        while self._guards:
            self._guards.popitem()[1].remove()
        done = []
        for one in self.sites:
            assert one.selection is not None and one.site.pattern is not None
            one.parameter.masked_fill_(~one.tensors["mask"], 0.0)  # -0.0 becomes 0.0
            weight = one.site.read(self.program.module).cpu()
            if broken := one.site.pattern.violations_of(weight, one.selection).first:
                raise PassError(f"{one.site.name}: after training it breaks {one.site.pattern}: {broken[0]}")
            done.append(one.site.replace(selection=one.selection))
        self.program.set_mode("eval")
        facts = self.program.facts - {"masked"} | {"selected", "trained", "frozen"}
        return self.program.with_sites(done).replace(facts=facts)

    @contextlib.contextmanager
    def pruned(self) -> Iterator[dict[str, Selection]]:
        """Inside, the weights are those that `end` would leave if it came now: evaluate and save them there.

        Yields the selections by site, so that `settle` can make them those that `end` leaves.
        """
        kept, chosen = [], {one.site.name: one.selection for one in self.sites if one.selection is not None}
        with torch.no_grad():
            self._share(final=True)
            for one in self._free:
                chosen[one.site.name], mask = self._final(one)
                kept.append((one, one.parameter.detach().clone()))
                if WHOLE in one.tensors:
                    one.parameter.copy_(one.tensors[WHOLE])
                one.parameter.masked_fill_(~mask, 0.0)
                if _fx.has_tensor(self.program.module, masks.name_of(one.site)):
                    _fx.set_tensor(self.program.module, masks.name_of(one.site), mask)
        try:
            yield chosen
        finally:
            with torch.no_grad():
                for one, weight in kept:
                    one.parameter.copy_(weight)
                self._act()

    @torch.no_grad()
    def settle(self, chosen: Mapping[str, Selection]) -> None:
        """Make these selections final, whatever was chosen or frozen; the caller puts back the weights they fit."""
        for one in self.sites:
            self._fix(one, chosen[one.site.name], None)
        self.frozen = True
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
            one.selection = Selection.of(own_tensors, chosen) if f"{chosen}positions" in own_tensors else None
            one.site = self._shared(one, one.selection)
            one.tensors = {
                name.removeprefix(prefix): value.to(one.parameter.device, copy=True)
                for name, value in own_tensors.items()
                if not name.startswith(chosen)
            }
        self._cleared = False
        self._act()

    def _patterns(self) -> dict[str, str]:
        return {site.name: str(site.pattern) for site in self.program.sites.sparse}  # a share is no site's own wish

    def _choose(self, epoch_ends: bool) -> None:
        if self.frozen or not self._free or not self.method.schedule.fires(self.clock, epoch_ends):
            return
        self.numbers["share"] = self.clock.step / self.clock.steps
        self._share(final=False)
        for name, value in self.method.update.choose(self._free, self._project, self.numbers).items():
            self.curves.setdefault(name, []).append([self.clock.step, value])
        self._act()

    def _freeze_if_due(self, optimizer: torch.optim.Optimizer | None) -> None:
        if self.clock.step >= self.method.schedule.frozen_from(self.clock):
            self.freeze(optimizer)

    @torch.no_grad()
    def freeze(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Make all masks final now (rule 2)."""
        if self.frozen:
            return
        self._share(final=True)
        for one in self._free:
            self._fix(one, *self._final(one), optimizer)
        self.frozen = True
        self._act()

    @torch.no_grad()
    def _fix(
        self, one: Tracked, selection: Selection, mask: Tensor | None, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        site = one.site = self._shared(one, selection)
        assert site.pattern is not None
        if mask is None:
            mask = site.view.to_parameter(site.pattern.mask(selection, site.shape[2])).to(one.parameter.device)
        on_cpu = {name: table.cpu() for name, table in selection.tensors().items()}  # where all passes expect it
        if WHOLE in one.tensors:
            one.parameter.copy_(one.tensors[WHOLE])
        one.selection, one.tensors = Selection.of(on_cpu), {"mask": mask}
        for tensor in (one.parameter, *masks.moments(one, optimizer)):
            tensor.masked_fill_(~mask, 0.0)
        self._cleared = False  # the next step may be that of an optimizer with moments that was not given here

    def _clear(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Rule 2 after a step."""
        if self._cleared and type(optimizer) in masks.KEEP_ZEROS:
            return
        for one in self.sites:
            if one.selection is not None:
                for tensor in (one.parameter, *(() if self._cleared else masks.moments(one, optimizer))):
                    tensor.mul_(masks.factors(one.tensors["mask"]))
        self._cleared = True

    def _share(self, final: bool) -> None:
        """Under global scope, divide what all unstructured sites may keep now, or in the end, among them."""
        if self.method.scope == "local":
            return
        wanted = {
            one.site.name: one.site.pattern if final else self.method.schedule.pattern(one.site, self.clock)
            for one in self._free
        }
        self._shares = scope.shares(self._free, wanted, self.method.criterion)

    def _shared(self, one: Tracked, selection: Selection | None) -> Site:
        """The site, whose pattern under global scope is the share that this selection is of."""
        site = self.program.sites[one.site.name]
        if self.method.scope == "local" or site.selection or not (selection and isinstance(site.pattern, Unstructured)):
            return site
        return site.replace(pattern=scope.chosen(selection))

    def _final(self, one: Tracked) -> tuple[Selection, Tensor]:
        """Selection and mask of a site's own pattern, of the weights as they are."""
        pattern = self._shares.get(one.site.name, one.site.pattern)
        assert pattern is not None
        view, score = one.site.view, self.method.criterion.score(one, one.parameter.detach())
        try:
            selection, mask = pattern.choose(view.to_matrices(score), self.method.columns)
        except PatternError as error:
            raise PatternError(f"{one.site.name}: {error}") from None
        return selection, view.to_parameter(mask)

    def _project(self, one: Tracked, weight: Tensor) -> Tensor:
        pattern = self._shares.get(one.site.name, self.method.schedule.pattern(one.site, self.clock))
        if pattern is None:
            return torch.ones_like(weight, dtype=torch.bool)
        view, score = one.site.view, self.method.criterion.score(one, weight)
        try:
            return view.to_parameter(pattern.choose(view.to_matrices(score), self.method.columns)[1])
        except PatternError as error:
            raise PatternError(f"{one.site.name}: {error}") from None

    def _act(self) -> None:
        """Have all masks act: final ones on gradients, others in the graph."""
        edited = False
        for one in self.sites:
            final, name = one.selection is not None, one.site.name
            edited |= masks.put(self.program, one, "nothing" if final else self.method.update.act)
            if final and name not in self._guards:
                self._guards[name] = masks.guard(one)
            elif not final and name in self._guards:
                self._guards.pop(name).remove()
        if edited:
            self.program.module.recompile()
