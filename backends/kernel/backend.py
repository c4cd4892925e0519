"""The kernel backend: graph.json with the portable sparse operator, packed weights, and CPU kernels put in at load."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from sparsec import _fx
from sparsec.backend import FP32_TOLERANCE, Backend, Check, CheckData, Emitted, Parts, Verdict, compare
from sparsec.backends.kernel import cost
from sparsec.backends.kernel.calls import has_kernel, no_kernel
from sparsec.backends.kernel.cpu import int8, library
from sparsec.backends.kernel.cuda import ahead, calibrating
from sparsec.backends.kernel.cuda.build import cache_folder
from sparsec.backends.kernel.cuda.destination import destination
from sparsec.backends.kernel.cuda.install import install_on, layers_anywhere, room
from sparsec.backends.kernel.cuda.sharing import share
from sparsec.backends.kernel.install import absorbed, install_kernels
from sparsec.backends.kernel.parts import on_gpu, read_parts
from sparsec.backends.kernel.proofs import KERNEL_TOKENS, kernel_problems
from sparsec.cost import TokenRange
from sparsec.errors import UsageError
from sparsec.layout import Values, decompress
from sparsec.lowered import packed_calls
from sparsec.pattern import VNM, Pattern
from sparsec.pipeline import PassManager, Progress, no_progress
from sparsec.program import Program, bind, check_sizes, read_graph, write_graph
from sparsec.uses import lowers_to_linear

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule

    from sparsec.cost import Basis
    from sparsec.sites import Site


class KernelBackend(Backend):
    """Weights are always stored packed; what runs them is decided when the artifact is loaded."""

    name: ClassVar[str] = "kernel"
    describes: ClassVar[str] = "packed weights run by sparsec's own CPU kernels; loads without transformers"

    stores: ClassVar[tuple[Values, ...]] = ("fp32", "bf16", "int8")

    def instruction_set(self) -> str | None:
        return library.level()

    def plan(self, program: Program, values: Values = "fp32", tokens: TokenRange | None = None) -> tuple[Verdict, ...]:
        return tuple(self._verdict(program, site, values, tokens) for site in program.sites.sparse)

    def _verdict(self, program: Program, site: Site, values: Values, tokens: TokenRange | None) -> Verdict:
        assert site.pattern is not None
        pattern = site.pattern.executable
        if reason := no_kernel(pattern, values):
            return Verdict(site.name, False, "dense", reason)
        if (dtype := site.read(program.module).dtype) != torch.float32:
            return Verdict(
                site.name, False, "dense", f"{dtype} weights are stored packed; the kernels run float32 only"
            )
        if not lowers_to_linear(program.module, site):
            return Verdict(
                site.name, False, "dense", f"{_what(site)} is stored packed; there is no sparse kernel for it"
            )
        if library.level() is None:
            return Verdict(
                site.name, False, "reference", library.unavailable_reason() or "the kernels are switched off"
            )
        if reason := cost.too_slow(site.shape, pattern, values, tokens):
            return Verdict(site.name, False, "dense", reason)
        return Verdict(site.name, True, _kernel_name(values), _caveat(pattern, values))

    def cost(self, shape: tuple[int, int, int], pattern: Pattern, tokens: int, values: Values = "fp32") -> float:
        return cost.seconds(shape, pattern.executable, tokens, values)

    def cost_basis(self, pattern: Pattern, values: Values = "fp32") -> Basis:
        return cost.basis(pattern.executable, values)

    def calibrate(self, patterns: Iterable[Pattern], values: Values = "fp32", progress: Progress = no_progress) -> None:
        cost.calibrate([pattern.executable for pattern in patterns], values, progress)

    def measure(
        self, shape: tuple[int, int, int], patterns: Sequence[Pattern], tokens: Sequence[int], values: Values = "fp32"
    ) -> list[list[float]]:
        return cost.measure(shape, [pattern.executable for pattern in patterns], tokens, values)

    def calibrate_device(self, device: str, progress: Progress = no_progress) -> dict[str, Any]:
        """The ceilings of a GPU; they are kept, and decide from then on what runs sparse there."""
        return dataclasses.asdict(calibrating.calibrate(device, progress))

    def compile_for(self, device: str, folder: Path, progress: Progress = no_progress) -> Check:
        """Whatever is predicted there: every layer that can run on panels."""
        devices, calls = ahead.devices_named(device), packed_calls(read_graph(folder))
        arch = devices[0].arch
        layers, reasons = layers_anywhere(calls)
        if not layers:
            return Check(f"kernel: {arch}", False, f"no layer runs sparse there: {'; '.join(sorted(reasons))}")
        count = ahead.compile_all(ahead.variants_of(layers, devices), arch, progress)
        return Check(f"kernel: {arch}", True, f"{count} kernels are compiled, and kept in {cache_folder()}")

    def on(self, device: str) -> Backend:
        """`cpu`, a GPU that is known such as `h200`, or `cuda`, this machine's. Raises UsageError for another."""
        if device == "cpu":
            return self
        from sparsec.backends.kernel.on_gpu import OnGpu  # a subclass

        return OnGpu(device)

    def absorbed(self, program: Program) -> dict[str, str]:
        return absorbed(program)

    def emit(self, program: Program, folder: Path, values: Values = "fp32") -> Emitted:
        lowered = PassManager.parse(f"lower{{values={values}}}").run(program)
        write_graph(folder, lowered.module)
        tables = {call.site: call.layout.nbytes for call in packed_calls(lowered.module)}
        files = [folder / "graph.json", folder / "weights.safetensors"]
        return Emitted(sum(tables.values()), sum(path.stat().st_size for path in files), {})

    def verify(self, folder: Path, manifest: dict[str, Any], check: CheckData) -> list[Check]:
        module = read_graph(folder)
        declared = {site["name"]: site for site in manifest["sites"] if site["pattern"]}
        found = {call.site: call for call in packed_calls(module)}
        if missing := sorted(declared.keys() ^ found.keys()):
            return [Check("kernel: sites", False, f"{missing[0]} is sparse in the manifest or the graph, not in both")]
        problems: dict[str, str] = {}
        for name, call in found.items():
            pattern = Pattern.parse(declared[name]["pattern"])
            if pattern.executable != call.layout.pattern:
                problems["pattern"] = f"{name}: declared {pattern}, stored {call.layout.pattern}"
            elif declared[name].get("values", "fp32") not in ("fp32", call.layout.stored):
                problems["pattern"] = f"{name}: declared {declared[name]['values']}, stored {call.layout.stored}"
            elif violations := pattern.violations_of(decompress(call.layout), call.layout.selection()).first:
                problems["pattern"] = f"{name}: {violations[0]}"
            if has_kernel(call) and library.level() is not None:
                problems.update(kernel_problems(name, call.layout))
        kernels = sum(has_kernel(call) for call in found.values())
        same = "the reference operator" if manifest["recipe"].get("values") == "int8" else "the dense product"
        proven = {
            "pattern": f"{len(found)} sites satisfy their pattern bit for bit",
            "pack": f"the kernels' form of {kernels} sites unpacks to the same bits",
            "kernel": f"{kernels} sites give what {same} gives, for {KERNEL_TOKENS} tokens",
        }
        if library.level() is None or not kernels:
            del proven["pack"], proven["kernel"]
        checks = [Check(f"kernel: {what}", what not in problems, problems.get(what, ok)) for what, ok in proven.items()]
        with torch.no_grad():
            reference = module(*(check.inputs[name] for name in _inputs(module)))
            outputs = Runnable(install_kernels(module, tokens=declared_tokens(manifest)), manifest)(
                **check.inputs
            )  # as `load`, without a second copy
        tolerance = manifest.get("tolerance", FP32_TOLERANCE)
        checks.append(compare("kernel: reference operator", reference, check.outputs, tolerance))
        checks.append(compare("kernel: outputs", outputs, check.outputs, tolerance))
        return checks

    def load(self, folder: Path, manifest: dict[str, Any]) -> Runnable:
        return Runnable(install_kernels(read_graph(folder), tokens=declared_tokens(manifest)), manifest)

    def load_on(self, device: str, folder: Path, manifest: dict[str, Any]) -> Runnable:
        """`cpu`, or a CUDA GPU: `cuda`, `cuda:1`. Raises UsageError where it cannot run there."""
        chosen = _device(device)
        if chosen.type == "cpu":
            return self.load(folder, manifest)
        there, module = destination(chosen, declared_tokens(manifest)), read_graph(folder)
        with torch.cuda.device(chosen):
            verdicts = install_on(module, there)
        return Runnable(module, manifest, there.device, verdicts)

    def load_dense(self, folder: Path, manifest: dict[str, Any]) -> Runnable:
        return Runnable(install_kernels(read_graph(folder), dense=True), manifest)

    def parts(self, folder: Path, manifest: dict[str, Any], device: str = "cpu") -> Parts:
        chosen = _device(device)
        if chosen.type == "cpu":
            return read_parts(folder, manifest)
        there = destination(chosen, declared_tokens(manifest))
        with torch.cuda.device(chosen):
            parts = read_parts(folder, manifest, on_gpu(there), share)
            for name, tensor in parts.tensors.items():
                with room(name, there.device, f"{tensor.nbytes / 2**20:.0f} MiB"):
                    parts.tensors[name] = tensor.to(there.device)
        return parts


class Runnable(torch.nn.Module):
    """A loaded artifact: call it with the model's inputs, by name or position; returns the outputs by name.

    For inference. `manifest` tells what it is: sites, patterns, quality, recipe. With `gpu`, inputs are copied
    there and outputs stay there; `verdicts` then tells what runs each sparse weight, and why.
    """

    def __init__(
        self,
        graph: GraphModule,
        manifest: dict[str, Any],
        gpu: torch.device | None = None,
        verdicts: dict[str, Verdict] | None = None,
    ) -> None:
        super().__init__()
        # Not named `graph`: torch.export puts the names of modules on a GraphModule, whose own that is.
        self.body, self.manifest, self.kinds = graph.requires_grad_(False), manifest, _inputs(graph)
        self.input_names = list(self.kinds)
        self.gpu, self.verdicts = gpu, verdicts or {}

    @property
    def graph(self) -> GraphModule:
        """What runs, as a torch.fx graph."""
        return self.body

    def forward(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        """Run the model. Raises UsageError for inputs of other names or sizes than it was compiled for."""
        inputs = bind(self.input_names, args, kwargs)
        check_sizes(self.kinds, inputs)
        if self.gpu is not None:
            _check_types(self.kinds, inputs)
            inputs = [value.to(self.gpu) for value in inputs]
        outputs: dict[str, Tensor] = self.body(*inputs)
        return outputs


def _check_types(kinds: dict[str, str], values: Sequence[Tensor]) -> None:
    """Panels do not tell their type: what reads the bits of another one gives numbers that mean nothing."""
    for (name, kind), value in zip(kinds.items(), values, strict=True):
        expected, found = kind.partition("[")[0], str(value.dtype).removeprefix("torch.")
        if expected != found and value.is_floating_point():
            raise UsageError(f"input {name}: expected {kind}, found {found}; convert it with .to(torch.{expected})")


def _what(site: Site) -> str:
    """The layer in words, with its article."""
    words = {"conv1d": "a convolution", "conv2d": "a convolution", "experts": "a stack of experts"}
    return words.get(site.kind, "a weight that is read in parts, looked up, or multiplied from the other side")


def _kernel_name(values: Values) -> str:
    chosen = library.level()
    assert chosen is not None
    return f"int8 {int8.kernel_name(chosen)}" if values == "int8" else chosen


def _caveat(pattern: Pattern, values: Values) -> str:
    """Where the sparse kernel is not faster than dense (tests/bench/bench_cpu_linear.py and its notes)."""
    if library.level() == "portable":
        return "the plain x86-64 kernels are slower than dense from about 8 tokens"
    if values == "int8" and isinstance(pattern, VNM) and pattern.v % 16:
        return f"int8 kernels take 16 rows at once, which {pattern} does not fill"
    return ""


def declared_tokens(manifest: dict[str, Any]) -> TokenRange | None:
    """The range of tokens that an artifact was compiled for, if one was declared."""
    text = manifest.get("recipe", {}).get("tokens")
    return TokenRange.parse(str(text)) if text else None


def _device(text: str) -> torch.device:
    """Raises UsageError where it is neither the CPU nor one of this machine's CUDA GPUs."""
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise UsageError(f"device {text!r} cannot be read; expected cpu, cuda, or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"there are no kernels for device {text}; expected cpu, cuda, or cuda:1")
    if device.type == "cpu" or not torch.cuda.is_available():
        return device
    number = torch.cuda.current_device() if device.index is None else device.index
    if number >= torch.cuda.device_count():
        raise UsageError(f"{text}: this machine has {torch.cuda.device_count()} CUDA GPUs, counted from cuda:0")
    return torch.device("cuda", number)


def _inputs(module: GraphModule) -> dict[str, str]:
    """The types of a graph's inputs, such as `int64[batch, length]`, in order."""
    return {str(node.target): node.meta[_fx.TYPE] for node in module.graph.nodes if node.op == "placeholder"}
