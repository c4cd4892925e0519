"""What the training passes share: their options, and the way from a program to a trained one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch

from sparsec import _fx
from sparsec.errors import RecipeError, UsageError
from sparsec.pipeline import Context, Equivalence, Note, Pass, PassResult, no_progress
from sparsec.program import Program
from sparsec.selection import kept_only
from sparsec.sites import SiteTable
from sparsec.training import debiasing, distributed
from sparsec.training.batches import Batches, resolve
from sparsec.training.checkpoints import Checkpoints
from sparsec.training.engine import Engine
from sparsec.training.evaluation import Evaluator, Keep, held
from sparsec.training.loop import Loop
from sparsec.training.losses import Loss, Objective, objective
from sparsec.training.model import GraphModel, own
from sparsec.training.parts import Method
from sparsec.training.report import report
from sparsec.training.session import Session
from sparsec.training.settings import Precision, Settings

DENSE = "dense"


@dataclass(frozen=True)
class TrainingPass(Pass):
    """Base of the passes that train. A subclass adds its options and says its `method`."""

    requires: ClassVar[frozenset[str]] = frozenset({"traced"})
    establishes: ClassVar[frozenset[str]] = frozenset({"selected", "trained", "frozen"})
    drops: ClassVar[frozenset[str]] = frozenset({"masked"})
    equivalence: ClassVar[Equivalence] = "lossy"
    chooses: ClassVar[bool] = True
    """Whether there is nothing for the pass to do where every site is selected before it."""

    pattern: str = ""
    """Pattern for all sites not excluded, where none was set by targets."""
    data: str = "train"
    """The resource that holds the batches."""
    epochs: int = Settings.epochs
    lr: float = Settings.lr
    batch_size: int = 16
    accumulate: int = Settings.accumulate
    """Batches of an optimizer step."""
    max_grad_norm: float = Settings.max_grad_norm
    """0: no clipping."""
    warmup: float = Settings.warmup
    """Share of the steps in which the learning rate rises; afterwards it falls linearly to 0."""
    weight_decay: float = Settings.weight_decay
    loss: Loss = "auto"
    """auto: cross-entropy for integer labels, mse for others, none without labels. lm: the next token.

    poe, reweight and confreg read a bias model's log-probabilities, the batches' `bias`; see `training.debiasing`.
    """
    distill: float = 0.0
    """Weight of learning from the teacher, beside the loss."""
    teacher: str = DENSE
    """dense: the program as the pass is given it; any other text names a resource, a Program."""
    temperature: float = 2.0
    hidden: float = 1.0
    """Weight, within distill, of outputs that are no logits."""
    precision: Precision = Settings.precision
    """bf16: products in bfloat16; weights, gradients and the optimizer's state stay float32."""
    evaluation: str = "eval"
    """The resource that is judged after each epoch, where there is one."""
    keep: Keep = "last"
    """best: the weights of the epoch that was judged best."""
    log_every: int = 10
    """Steps of a line in the log, where there is one (the resource log, a path)."""
    save_seconds: float = 60.0
    """Between checkpoints within an epoch, where work is kept; never more than 2 % of the time."""

    def __post_init__(self) -> None:
        self.method()  # its options are checked before any work
        self._settings()
        if self.batch_size < 1:
            raise RecipeError(f"pass {self.name}: batch_size is {self.batch_size}; expected 1 or more")
        if self.log_every < 1:
            raise RecipeError(f"pass {self.name}: log_every is {self.log_every}; expected 1 or more")
        if self.keep not in get_args(Keep):
            raise RecipeError(f"pass {self.name}: keep is {self.keep!r}; expected {' or '.join(get_args(Keep))}")
        for name in ("distill", "hidden", "save_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RecipeError(f"pass {self.name}: {name} is {getattr(self, name):g}; expected 0 or more")
        if not 0 < self.temperature < math.inf:
            raise RecipeError(f"pass {self.name}: temperature is {self.temperature:g}; expected a number above 0")

    def method(self) -> Method:
        """Criterion, schedule and update. Raises RecipeError for an option that makes no sense."""
        raise NotImplementedError

    def prepare(self, engine: Engine, model: GraphModel, batches: Batches, seed: int) -> GraphModel:
        """Before the engine begins: look at the model that was given, and return the one to train."""
        return model

    def positive(self, *names: str) -> None:
        """Raise RecipeError unless these options are above 0."""
        for name in names:
            if not 0 < getattr(self, name) < math.inf:
                raise RecipeError(f"pass {self.name}: {name} is {getattr(self, name):g}; expected a number above 0")

    def run(self, program: Program, ctx: Context) -> PassResult:
        distributed.refuse_sharded(program.module)
        group = distributed.join()
        method, sites = self.method(), self._targets(program.sites)
        batches = resolve(ctx, self.data, self.name, program, self.batch_size)
        teacher = self._teacher(program, ctx) if self.distill or self.loss == "confreg" else None
        program = _folded(program.replace(sites=sites))
        own(program)
        engine = Engine(program, method)
        if self.chooses and all(one.selection is not None for one in engine.sites):
            raise RecipeError(
                f"every site is selected already, so {self.name} has no weights to choose; leave out what selects them "
                "before it, or train under those masks with fixed-mask"
            )
        learnt = self._objective(program, batches)
        judged = held(ctx, self.evaluation, self.name, program, self.batch_size, learnt, self.keep)
        model = GraphModel(program, learnt, teacher)
        model = self.prepare(engine, model, batches, ctx.seed)
        loop = Loop(
            model, engine, batches, self._settings(), ctx.seed,
            ctx.progress if group.rank == 0 else no_progress, task=self.name, group=group,
        )  # fmt: skip
        evaluator = Evaluator(judged, self.keep) if judged else None
        name = f"{self.name}-{len(program.history)}"  # a recipe may have a pass twice
        kept = Checkpoints(ctx.workdir / name, self.save_seconds) if ctx.workdir else None
        Session(loop, evaluator, kept, ctx.resources.get("log"), self.log_every, name).run()
        trained = loop.finish()
        notes = tuple(Note(s.name, s.excluded or "no pattern; trained dense") for s in trained.sites if not s.pattern)
        if self.loss in debiasing.TERMS and (remark := debiasing.remark(batches.groups)):
            notes += (Note(self.data, remark),)
        return PassResult(trained, notes, report(loop, evaluator))

    def _settings(self) -> Settings:
        try:
            return Settings(
                self.epochs, self.lr, self.accumulate, self.max_grad_norm, self.warmup, self.weight_decay,
                self.precision,
            )  # fmt: skip
        except UsageError as error:
            raise RecipeError(f"pass {self.name}: {error}") from None

    def _targets(self, sites: SiteTable) -> SiteTable:
        if sites.sparse:
            return sites
        if not self.pattern:
            raise RecipeError(
                f"pass {self.name}: no site has a pattern; set targets, or write {self.name}{{pattern=64:2:5}}"
            )
        return sites.with_targets({"*": self.pattern})

    def _teacher(self, program: Program, ctx: Context) -> Program:
        if self.teacher == DENSE:
            if any(site.selection for site in program.sites):
                raise RecipeError(
                    "the program is pruned already, so it is no dense teacher: name one with teacher=NAME and "
                    "Context(resources={NAME: program}), or put this pass first"
                )
            return program.clone()
        found = ctx.resources.get(self.teacher)
        made = found() if callable(found) and not isinstance(found, Program) else found
        if not isinstance(made, Program):
            raise UsageError(
                f"teacher {self.teacher!r} is {'not there' if made is None else f'a {type(made).__name__}'}; expected "
                f"a Program in Context(resources={{{self.teacher!r}: program}})"
            )
        if missing := [name for name in made.inputs if name not in program.inputs]:
            raise UsageError(f"the teacher takes {missing[0]}, which {', '.join(program.inputs)} do not give")
        return made.clone()

    def _objective(self, program: Program, batches: Batches) -> Objective:
        device = next(program.module.parameters()).device
        with torch.no_grad():
            outputs = program(**{name: value.to(device) for name, value in program.inputs.items()})
        return objective(self.loss, batches.groups[0], outputs, self.distill, self.temperature, self.hidden)


def _folded(program: Program) -> Program:
    """Masks of earlier passes as zeros in weights; the selections stay, and the engine takes the masks from them."""
    changed = []
    for site in program.sites:
        if site.mask is None:
            continue
        mask = site.view.to_matrices(_fx.get_tensor(program.module, site.mask))
        site.write(program.module, kept_only(site.read(program.module), mask))
        _fx.remove_mask(program.module, site.mask)
        changed.append(site.replace(mask=None))
    program.module.recompile()
    return program.with_sites(changed)
