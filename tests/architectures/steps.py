"""What is proven about one architecture, step by step, and what is measured on the way."""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from zoo import Case

from sparsec import Program, modes, operators, sizes, trace
from sparsec.backends.onnx.backend import Weights
from sparsec.backends.onnx.exporter import export
from sparsec.backends.onnx.session import OnnxModule
from sparsec.pipeline import PassManager

Outputs = dict[str, Tensor]
MASKED = 1e-6  # the same operators on the same masked weights: at most a few last bits
LOWERED = 1e-5  # packed weights are unpacked exactly; sums of up to 128 products may be reordered
GRADIENT = 1e-5  # sums over a batch may be reordered
ONNX = 1e-5  # onnxruntime fuses operators and sums in another order
BF16 = 2e-2  # 8 bits of mantissa, a few roundings in a row


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """A cache is a copy of the keys: with it, some models sum in another order."""
    config: Any = model.config
    had, config.use_cache = getattr(config, "use_cache", None), False
    yield
    config.use_cache = had


def reference(model: nn.Module, inputs: Outputs) -> Outputs:
    with without_cache(model), torch.no_grad():
        outputs = model.eval()(**inputs)
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def difference(expected: Outputs, found: Outputs) -> float:
    """The largest difference relative to the largest value of an output."""
    assert list(expected) == list(found)
    worst = 0.0
    for name, value in expected.items():
        assert value.shape == found[name].shape, name
        assert bool(torch.isfinite(value).all()), name
        gap, scale = (value.double() - found[name].double()).abs().max(), value.double().abs().max()
        worst = max(worst, float(gap / scale.clamp_min(1e-30)))
    return worst


def traced(case: Case, row: dict[str, Any], timed: Sequence[str]) -> Program:
    """The program; the processor seconds of `trace`, and of torch.export alone if asked for, go into the row."""
    seconds = {}
    for which in timed:
        start = time.process_time()
        if which == "bare":
            _export_alone(case)
        else:
            program = trace(case.model, case.inputs, case.dynamic, case.limits)
        seconds[which] = time.process_time() - start
    row["seconds"] = seconds
    return program


def _export_alone(case: Case) -> None:
    ranges = sizes.ranges(case.dynamic, case.limits)
    dims = {name: torch.export.Dim(name, min=low, max=high or sizes.MAX_SIZE) for name, (low, high) in ranges.items()}
    shapes = {name: {axis: dims[size] for axis, size in axes.items()} for name, axes in case.dynamic.items()}
    with modes.exporting(case.model):
        torch.export.export(
            case.model, (), kwargs=case.inputs, dynamic_shapes=shapes, strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )  # fmt: skip


def check_eval(case: Case, program: Program) -> float:
    """Equal to the model at two sizes, twice in a row."""
    worst = 0.0
    for inputs in (case.inputs, case.other_inputs()):
        expected = reference(case.model, inputs)
        for _ in range(2):
            with torch.no_grad():
                worst = max(worst, difference(expected, program(**inputs)))
    assert worst == 0.0
    return worst


def check_training(case: Case, program: Program) -> None:
    """Backward in train mode reaches what the model's backward reaches; eval mode and its gradients are the model's."""
    with modes.exporting(case.model):
        expected = _gradients(case.model, case.model(**case.inputs)).keys()
    training = program.clone()
    training.set_mode("train")
    found = _gradients(case.model, training(**case.inputs)).keys()  # the graph holds the model's own parameters
    assert set() == expected - found
    training.set_mode("eval")
    check_eval(case, training)
    with without_cache(case.model):  # only now: in train mode batch norm has changed its running statistics
        exact = _gradients(case.model, case.model.eval()(**case.inputs))
    assert difference(exact, _select(_gradients(case.model, training(**case.inputs)), exact)) <= GRADIENT


def _gradients(model: nn.Module, outputs: Any) -> Outputs:
    model.zero_grad()
    parts = [value for value in outputs.values() if isinstance(value, Tensor) and value.requires_grad]
    torch.stack([value.float().square().mean() for value in parts]).sum().backward()  # type: ignore[no-untyped-call]
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def _select(values: Outputs, names: Outputs) -> Outputs:
    assert names.keys() <= values.keys()
    return {name: values[name] for name in names}


def check_every_matrix(case: Case, program: Program) -> Counter[str]:
    """Each floating-point matrix is a site, or listed with its reason. Returns why matrices are dense, by role."""
    listed = {entry.name: entry for entry in program.sites.exclusions}
    named = {site.name: site for site in program.sites}
    dense: Counter[str] = Counter()
    for name, parameter in case.model.named_parameters():
        if parameter.dim() < 2 or not parameter.is_floating_point():
            continue
        assert (name in named) != (name in listed), name
        if name in listed:
            assert len(listed[name].reason) > 10, name
            dense[listed[name].role] += 1
        elif named[name].excluded:
            dense[named[name].role] += 1
    return dense


def pruned(case: Case, program: Program, pattern: str, tolerance: float = MASKED) -> tuple[Program, Outputs]:
    """Masked and frozen: equal to the model with the same weights written in. Returns that model's outputs too."""
    frozen = PassManager.parse(f"mask{{pattern={pattern}}} | freeze").run(program)
    assert frozen.sites.sparse
    for site in frozen.sites.sparse:
        weight = site.read(frozen.module)
        assert torch.equal(weight, torch.where(site.pattern.mask(site.selection, weight.shape[-1]), weight, 0.0))
    masked = copy.deepcopy(case.model)
    frozen.write_back(masked)
    inputs = case.other_inputs()
    expected = reference(masked, inputs)
    with torch.no_grad():
        assert difference(expected, frozen(**inputs)) <= tolerance
    return frozen, expected


class FreshProcess:
    """A Python that cannot import transformers: loads programs and compares their outputs with stored ones."""

    CODE = """
import sys
sys.modules["transformers"] = None
import json, torch
from safetensors.torch import load_file
from sparsec import Program
torch.set_num_threads(1)
for line in sys.stdin:
    folder, worst = line.strip(), 0.0
    try:
        program, stored = Program.load(folder + "/program"), load_file(folder + "/stored.safetensors")
        inputs = {k[3:]: v for k, v in stored.items() if k.startswith("in.")}
        with torch.no_grad():
            found = program(**inputs)
        for key, value in stored.items():
            if key.startswith("out."):
                gap = (value.double() - found[key[4:]].double()).abs().max() / value.double().abs().max()
                worst = max(worst, float(gap))
        print(json.dumps(worst), flush=True)
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)
"""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def difference(self, folder: Path, program: Program, inputs: Outputs, expected: Outputs) -> float:
        folder.mkdir()
        program.save(folder / "program")
        stored = {f"in.{k}": v for k, v in inputs.items()} | {f"out.{k}": v for k, v in expected.items()}
        save_file({name: value.clone().contiguous() for name, value in stored.items()}, folder / "stored.safetensors")
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert isinstance(answer, float), answer
        return answer


def lowered(frozen: Program) -> Program:
    """The program on packed weights, which every sparse site's are."""
    program = PassManager.parse("lower").run(frozen)
    packed = [node.target for node in program.module.graph.nodes if "sparsec.nm_" in str(node.target)]
    assert len(packed) >= len(program.sites.sparse) > 0
    return program


def as_onnx(case: Case, frozen: Program, weights: Weights, folder: Path) -> float:
    """The largest difference of the frozen program in onnxruntime, at two sizes."""
    folder.mkdir()
    export(frozen.clone(), folder / "model.onnx", weights)
    session, worst = OnnxModule(folder / "model.onnx"), 0.0
    for inputs in (case.inputs, case.other_inputs()):
        with torch.no_grad():
            expected = frozen(**inputs)
        worst = max(worst, difference(expected, session(**inputs)))
    return worst


def used_operators(program: Program) -> list[str]:
    return sorted({operators.name_of(node.target) for node in program.module.graph.nodes if node.op == "call_function"})
