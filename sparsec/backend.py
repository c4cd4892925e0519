"""What a backend is: it says for every site what will run and why, writes its part of an artifact, and proves it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sparsec.errors import UsageError
from sparsec.layout import Values
from sparsec.pipeline import CLOSE_IN, Progress, no_progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sparsec.cost import Basis, TokenRange
    from sparsec.pattern import Pattern
    from sparsec.profiling import Profile
    from sparsec.program import Program
    from sparsec.view import WeightView

FORMAT = "sparsec-artifact"
CHECK_FILE = "check.safetensors"
FP32_TOLERANCE = 1e-5  # of the largest output: reordered fp32 sums; the same bound that passes declared `close` obey
BF16_TOLERANCE = CLOSE_IN["bfloat16"]
INT8_MARGIN = 2.0  # of what was measured: other sums in fp32 move a few activations to the next of 255 steps


@dataclass(frozen=True)
class Verdict:
    """What will run for one site, and why. No site goes dense without a reason."""

    site: str
    sparse: bool
    """Whether a sparse kernel runs; the weights may be sparse where it does not."""
    kernel: str
    reason: str


@dataclass(frozen=True)
class Check:
    """One thing that was proven about an artifact, or not."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Emitted:
    """What a backend wrote: sparse weight bytes in its form, all its bytes, and facts for the manifest."""

    nbytes_sparse: int
    nbytes: int
    data: dict[str, Any]
    """A `note` in it is a sentence that every report of the artifact shows."""
    verdicts: tuple[Verdict, ...] = ()
    """In place of those of `plan`, where what runs is decided while files are written."""


@dataclass(frozen=True)
class Parts:
    """What an artifact holds of its model, by the model's own names; see `attaching`."""

    tensors: dict[str, Tensor]
    """Parameters and buffers that run dense."""
    layers: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    """For each weight with a kernel: bias or None -> a layer (module) with `unpacked()` and a count of `reads`."""
    views: dict[str, WeightView] = field(default_factory=dict)
    """How the model holds the weights in `layers`."""
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    """What the weights in `layers` compute in."""
    dense: dict[str, str] = field(default_factory=dict)
    """Why a sparse weight is among the tensors."""
    share: Callable[[Any], Iterable[Any]] | None = None
    """Gives a module that holds several of the layers hooks, by which they share work; returns their handles."""


class Backend(ABC):
    """Subclasses live in one package each under backends/, with one line in its TABLE."""

    name: ClassVar[str]
    describes: ClassVar[str]
    """One line for `sparsec backends`."""
    stores: ClassVar[tuple[Values, ...]] = ("fp32",)
    """What it can store sparse weights as."""
    runs_code: ClassVar[str | None] = None
    """What of an artifact `load` would run that no check can vouch for; it then asks for trust."""

    def unavailable(self) -> str | None:
        """None when the backend can emit and run here, else why not and what to install."""
        return None

    def cannot_verify(self) -> str | None:
        """Why `verify` cannot run here, or None; by default it needs what the rest does."""
        return self.unavailable()

    def refuses(self, program: Program) -> str | None:
        """Why it cannot write this traced program and what to do, or None.

        Asked before any pass runs: first while no site has a pattern, then with the patterns that were asked for.
        """
        return None

    def instruction_set(self) -> str | None:
        """What its kernels run with on this machine, for reports; None where it has none of its own."""
        return None

    @abstractmethod
    def plan(self, program: Program, values: Values = "fp32", tokens: TokenRange | None = None) -> tuple[Verdict, ...]:
        """A verdict for every site that has a pattern, its weights stored as `values`. Reads the program only.

        `tokens`: what its layers are declared to see; a kernel that `cost` says is slower than dense there is not used.
        """

    @abstractmethod
    def emit(self, program: Program, folder: Path, values: Values = "fp32") -> Emitted:
        """Write the backend's files of a frozen program (eval mode, masks folded) below `folder`.

        `values`: what sparse weights are stored as, one of `stores`.
        """

    @abstractmethod
    def verify(self, folder: Path, manifest: dict[str, Any], check: CheckData) -> list[Check]:
        """Re-read what `emit` wrote and prove patterns, tables and outputs. Hashes have been checked already."""

    @abstractmethod
    def load(self, folder: Path, manifest: dict[str, Any]) -> Any:
        """A callable: inputs by name -> dict of output tensors by name. The folder has been checked already."""

    def load_on(self, device: str, folder: Path, manifest: dict[str, Any]) -> Any:
        """Like `load`, on a device that the caller names; only the kernel backend lets him choose."""
        raise UsageError(f"backend {self.name} chooses its device itself: leave device out, or load backend kernel")

    def finish(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Write what people read beside the backend's files, once all is known and sealed: nothing of it is hashed."""
        return None

    def findings(self, folder: Path, manifest: dict[str, Any]) -> list[str]:
        """What was found out about the artifact after it was compiled, a line each."""
        return []

    def load_file(self, path: Path) -> Any:
        """A callable like `load`'s, of a file in the backend's format by anybody; only the onnx backend has it."""
        raise UsageError(f"backend {self.name} runs no files but its own; ask for --backend onnx")

    def load_dense(self, folder: Path, manifest: dict[str, Any]) -> Any:
        """Like `load`, with the sparse weights unpacked and run densely; only the kernel backend has it."""
        raise UsageError(f"backend {self.name} has no dense form to compare with; compile with --backend kernel")

    def cost(self, shape: tuple[int, int, int], pattern: Pattern, tokens: int, values: Values = "fp32") -> float:
        """Seconds of `tokens` vectors times each matrix of a weight (batch, rows, cols); see `sparsec.cost.Cost`.

        Measures nothing: it answers from what `calibrate` found, in this process or an earlier one, else from a model.
        """
        raise UsageError(f"backend {self.name} predicts no speed; ask for --backend kernel")

    def cost_activated(
        self, shape: tuple[int, int, int], pattern: Pattern, tokens: int, operators: int, values: Values = "fp32"
    ) -> float:
        """Like `cost`, where so many operators behind the product are an activation, which `absorbed` names.

        Their time counts where what runs the pattern would not apply it after all; for `Dense()` it never does.
        """
        return self.cost(shape, pattern, tokens, values)

    def cost_basis(self, pattern: Pattern, values: Values = "fp32") -> Basis:
        """What `cost` rests on for a pattern."""
        return "model"

    def calibrate(self, patterns: Iterable[Pattern], values: Values = "fp32", progress: Progress = no_progress) -> None:
        """Measure what `cost` needs for these patterns, where that was not done before: some seconds."""
        return None

    def measure(
        self,
        shape: tuple[int, int, int],
        patterns: Sequence[Pattern],
        tokens: Sequence[int],
        values: Values = "fp32",
    ) -> list[list[float]]:
        """Like `cost`, but measured now on weights of this very shape: by token count, then by pattern."""
        raise UsageError(f"backend {self.name} cannot measure layers; ask for --backend kernel")

    def calibrate_device(self, device: str, progress: Progress = no_progress) -> dict[str, Any]:
        """Measure a device of this machine, anew; plain data about it. Raises UsageError where there is none."""
        raise UsageError(f"backend {self.name} measures no devices; ask for --backend kernel")

    def on(self, device: str) -> Backend:
        """This backend as it would predict for a device that need not be here, such as `h200`."""
        raise UsageError(f"backend {self.name} predicts for this machine only: leave --device out")

    def compile_for(self, device: str, folder: Path, progress: Progress = no_progress) -> Check:
        """Compile the kernels that the artifact runs on a device, which need not be here, into this user's cache.

        Raises UsageError for a device that is not known, or where nothing can be compiled.
        """
        raise UsageError(f"backend {self.name} compiles no kernels for a device: leave --device out")

    def runs_on(self) -> str:
        """What its predictions are for, in words."""
        return "this machine"

    def profile(self, program: Program, without: Collection[str], inputs: dict[str, Tensor], tokens: int) -> Profile:
        """Where the time of the dense program goes there; see `profiling.profile`."""
        from sparsec.profiling import profile

        return profile(program, without, inputs, tokens)

    def absorbed(self, program: Program) -> dict[str, str]:
        """The nodes that go away when sites run sparse, because their kernels do them too: node -> site."""
        return {}

    def parts(self, folder: Path, manifest: dict[str, Any], device: str = "cpu") -> Parts:
        """What `attach` puts into a model on a device; only the kernel backend has it."""
        raise UsageError(f"backend {self.name} has no layers to attach to a model; compile with --backend kernel")


@dataclass(frozen=True)
class CheckData:
    """The stored inputs and the outputs that the masked fp32 graph gave for them."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """As stored in check.safetensors."""
        return {f"input:{k}": v for k, v in self.inputs.items()} | {f"output:{k}": v for k, v in self.outputs.items()}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> CheckData:
        """The inverse of `tensors`."""
        parts: dict[str, dict[str, Tensor]] = {"input": {}, "output": {}}
        for name, tensor in tensors.items():
            kind, _, key = name.partition(":")
            parts[kind][key] = tensor
        return CheckData(parts["input"], parts["output"])


def tolerance_of(program: Program) -> float:
    """What reordered sums may change of a program's outputs, relative to the largest: by its coarsest parameters."""
    types = {str(parameter.dtype).removeprefix("torch.") for parameter in program.module.parameters()}
    return max((CLOSE_IN[name] for name in types & CLOSE_IN.keys()), default=FP32_TOLERANCE)


def compare(name: str, found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> Check:
    """Compare outputs by name: largest difference over the largest expected value."""
    from sparsec.pipeline import relative_difference

    missing = [key for key in expected if key not in found]
    if missing:
        return Check(name, False, f"output {missing[0]} is missing")
    worst = max((relative_difference(found[key], value) for key, value in expected.items()), default=0.0)
    return Check(name, worst <= tolerance, f"largest relative difference {worst:.1e}, allowed {tolerance:.0e}")
