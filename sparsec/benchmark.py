"""How much faster an artifact's kernels are than what a user would run instead: the whole model, and layer by layer."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec import machine, peers, registry, timing
from sparsec.errors import SparsecError, UsageError
from sparsec.pipeline import Progress, no_progress, relative_difference

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.artifact import Artifact

OURS = "kernel"
PEERS = tuple(peers.MODELS)
FP32 = ("dense", "mkldnn", "onnxruntime")  # peers that compute the same numbers, up to the order of sums
_LAYER_CALLS_IN_A_ROW = 3


@dataclass(frozen=True)
class Case:
    """Inputs of one size. `size`: (batch, length) where they were asked for so."""

    tokens: int
    inputs: dict[str, Tensor]
    size: tuple[int, int] | None = None

    def describe(self) -> dict[str, Any]:
        """As in the result."""
        return {"tokens": self.tokens} | ({"batch": self.size[0], "length": self.size[1]} if self.size else {})


def bench(
    artifact: Artifact,
    against: Sequence[str] = PEERS,
    *,
    tokens: Sequence[int] = timing.TOKENS,
    sizes: Sequence[tuple[int, int]] = (),
    threads: Sequence[int] = (),
    seconds: float = 3.0,
    layers: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Time an artifact's kernels, interleaved with `against`, all in this process. Returns plain data.

    `sizes`: (batch, length) of the inputs, in place of `tokens`. `threads`: thread counts; default: torch's own.
    `seconds`: time for each row of the result. `layers`: every distinct sparse layer by itself, too.

    The result: `machine`; `speed`, a row for every thread count and size, whose `seconds` are by the row's `clock`
    (`timing.clock`) and `wall_seconds` by wall time; `layers`, such rows for (rows, cols, pattern); `unavailable`, peer
    -> why it could not run; `differences`, of the outputs from the dense ones, over the largest of these.
    Raises UsageError for a request that cannot be met; a peer that cannot run here is no error unless none is left.
    """
    import torch

    _check_request(against, tokens, threads, seconds)
    if reason := registry.backend(OURS).unavailable():
        raise UsageError(f"there is nothing to measure: {reason}")
    kernel, facts = artifact.load(OURS), machine.facts()  # the load as it is before we add to it
    with tempfile.TemporaryDirectory(prefix="sparsec-bench-") as scratch, _threads_restored(), torch.inference_mode():
        dense = peers.DenseModel(artifact, Path(scratch))
        example = dense.program.inputs
        cases = cases_of_sizes(example, artifact.manifest, sizes) or cases_of_tokens(example, artifact.manifest, tokens)
        bench_of = _Bench(artifact, tuple(dict.fromkeys(against)), seconds, dense)
        counts = tuple(dict.fromkeys(threads)) or (torch.get_num_threads(),)
        total = len(counts) * len(cases) * (1 + layers * len(distinct_layers(artifact.manifest)))
        for count in counts:
            torch.set_num_threads(count)
            for case in cases:
                progress("timing", len(bench_of.speed) + len(bench_of.layers), total)
                bench_of.whole(kernel, case)
        for count in counts if layers else ():
            torch.set_num_threads(count)
            for rows in dict.fromkeys(case.tokens for case in cases):
                for layer in distinct_layers(artifact.manifest):
                    progress("timing layers", len(bench_of.speed) + len(bench_of.layers), total)
                    bench_of.layer(layer, rows)
    return {
        "model": artifact.manifest["source"].get("model", "model"),
        "patterns": sorted({site["pattern"] for site in artifact.manifest["sites"] if site["pattern"]}),
        "values": artifact.manifest.get("values", {}).get("type", "fp32"),
        "machine": facts,
        "speed": bench_of.speed,
        **({"layers": bench_of.layers} if layers else {}),
        "differences": bench_of.differences,
        "unavailable": bench_of.unavailable,
    }


def _check_request(against: Sequence[str], tokens: Sequence[int], threads: Sequence[int], seconds: float) -> None:
    if unknown := [name for name in against if name not in PEERS]:
        raise UsageError(f"{unknown[0]!r} is nothing to compare with; expected some of {', '.join(PEERS)}")
    if not against:
        raise UsageError(f"there is nothing to compare with; expected some of {', '.join(PEERS)}")
    for what, counts in (("tokens", tokens), ("threads", threads)):
        if wrong := [count for count in counts if count < 1]:
            raise UsageError(f"{wrong[0]} {what} cannot be measured; expected 1 or more")
    if not seconds > 0:
        raise UsageError(f"{seconds} seconds cannot be spent on measuring; expected more than 0")


def cases_of_tokens(example: Mapping[str, Tensor], manifest: Mapping[str, Any], tokens: Sequence[int]) -> list[Case]:
    """Inputs in which the layers see these numbers of rows, or the nearest that the model takes."""
    cases: list[Case] = []
    for count in tokens:
        inputs, actual = timing.inputs_for_tokens(
            example, _types(manifest), manifest["dims"], manifest["rows_per_item"], count
        )
        if actual not in [case.tokens for case in cases]:
            cases.append(Case(actual, inputs))
    return cases


def cases_of_sizes(
    example: Mapping[str, Tensor], manifest: Mapping[str, Any], sizes: Sequence[tuple[int, int]]
) -> list[Case]:
    """Inputs of these batches and lengths. Raises UsageError for one that the model does not take."""
    types, dims = _types(manifest), manifest["dims"]
    return [
        Case(batch * length, timing.inputs_for_size(example, types, dims, batch, length), (batch, length))
        for batch, length in dict.fromkeys(sizes)
    ]


def _types(manifest: Mapping[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["type"] for entry in manifest["inputs"]}


def measure(runs: Mapping[str, Any], case: Case, seconds: float) -> dict[str, Any]:
    """One row of a result: callables of one interface on the inputs of one size, interleaved."""
    calls = {name: (lambda run=run: run(**case.inputs)) for name, run in runs.items()}
    return {**case.describe(), **_row(timing.interleaved(calls, seconds))}


def _row(times: Mapping[str, timing.Times]) -> dict[str, Any]:
    import torch

    threads = torch.get_num_threads()
    return {
        "threads": threads,
        "clock": timing.clock(threads),
        "seconds": timing.judged(times, threads),
        "wall_seconds": {name: one.wall for name, one in times.items()},
    }


@dataclass
class _Bench:
    """What has been measured so far."""

    artifact: Artifact
    against: tuple[str, ...]
    seconds: float
    dense: peers.DenseModel

    def __post_init__(self) -> None:
        self.speed: list[dict[str, Any]] = []
        self.layers: list[dict[str, Any]] = []
        self.unavailable: dict[str, str] = {}
        self.differences: dict[str, float] = {}
        self.parts: Any = None

    def whole(self, kernel: Any, case: Case) -> None:
        """Add a row for the whole model."""
        runs: dict[str, Any] = {OURS: kernel}
        for name in self._left():
            try:
                runs[name] = peers.MODELS[name](self.dense, case.inputs)
            except SparsecError as error:
                self.unavailable[name] = str(error)
        if len(runs) == 1:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.unavailable.items())
            raise UsageError(f"there is nothing left to compare with: {reasons}")
        if not self.speed:
            self._compare(runs, case)
        self.speed.append(measure(runs, case, self.seconds))

    def _left(self) -> list[str]:
        return [name for name in self.against if name not in self.unavailable]

    def _compare(self, runs: dict[str, Any], case: Case) -> None:
        """A peer that computes something else would be no peer."""
        expected = self.dense.program(**case.inputs)
        for name, run in runs.items():
            found = run(**case.inputs)
            self.differences[name] = max(relative_difference(found[key], value) for key, value in expected.items())

    def layer(self, layer: tuple[int, int, str], tokens: int) -> None:
        """Add a row for one product, (tokens, cols) with (rows, cols); nothing where the artifact has no kernel."""
        import torch

        rows, cols, pattern = layer
        names = distinct_layers(self.artifact.manifest)[layer]
        self.parts = self.parts or self.artifact.parts()
        sparse = next((self.parts.layers[name] for name in names if name in self.parts.layers), None)
        entry = {"rows": rows, "cols": cols, "pattern": pattern, "sites": len(names), "tokens": tokens}
        if sparse is None:
            self.layers.append({**entry, "reason": self.parts.dense[names[0]], "threads": torch.get_num_threads()})
            return
        module = sparse(None)
        copies = peers.copies_of(sum(buffer.nbytes for buffer in module.buffers()))
        calls = {OURS: peers.in_rotation([copy.deepcopy(module).forward for _ in range(copies)])}
        weight = module.unpacked().reshape(rows, cols)
        for name in self._left():
            calls[name] = peers.LAYERS[name](weight, tokens, self.dense.scratch)
        x = torch.randn(tokens, cols)
        timed = {name: (lambda call=call: call(x)) for name, call in calls.items()}
        self.layers.append(entry | _row(timing.interleaved(timed, self.seconds, _LAYER_CALLS_IN_A_ROW)))


def distinct_layers(manifest: Mapping[str, Any]) -> dict[tuple[int, int, str], list[str]]:
    """(rows, cols, pattern) -> the sparse sites of this kind, without those that are several matrices."""
    found: dict[tuple[int, int, str], list[str]] = {}
    for site in manifest["sites"]:
        batch, rows, cols = site["shape"]
        if site["pattern"] and batch == 1:
            found.setdefault((rows, cols, site["pattern"]), []).append(site["name"])
    return found


def ratios(row: Mapping[str, Any]) -> dict[str, float]:
    """Peer -> how many times faster than it the kernels are."""
    seconds = row["seconds"]
    return {name: one / seconds[OURS] for name, one in seconds.items() if name != OURS}


def best_fp32(rows: Sequence[Mapping[str, Any]]) -> tuple[str, int, float] | None:
    """The fp32 peer that is the best in most rows, in how many, and the geometric mean against each row's best."""
    best = [min((one, name) for name, one in ratios(row).items() if name in FP32) for row in rows if _has_fp32(row)]
    if not best:
        return None
    names = [name for _, name in best]
    name = max(dict.fromkeys(names), key=names.count)
    return name, names.count(name), math.exp(sum(math.log(one) for one, _ in best) / len(best))


def _has_fp32(row: Mapping[str, Any]) -> bool:
    return any(name in row.get("seconds", {}) for name in FP32)


def title(result: Mapping[str, Any]) -> str:
    """What was measured: `demo:minilm at 64:2:8`, `demo:minilm at 64:2:8, int8 values`."""
    values = "" if result["values"] == "fp32" else f", {result['values']} values"
    return f"{result['model']} at {', '.join(result['patterns'])}{values}"


def size_of(row: Mapping[str, Any]) -> str:
    """A row's inputs in words: `8 x 128 tokens`, `1 token`."""
    if "batch" in row:
        return f"{row['batch']} x {row['length']} tokens"
    return f"{row['tokens']} token{'s' if row['tokens'] > 1 else ''}"


@contextmanager
def _threads_restored() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
