"""One-shot pruning against its peers: python tests/bench/peers.py [--quick] [--only NAME] [--markdown FILE]

Compares sparsec with llm-compressor, nvidia-modelopt and onnxsim in time, error, memory and kept patterns, prints the
table of targets, and ends with exit status 1 when one is missed. Each peer is installed in an environment of its own
(--venvs); one that cannot be, as without a network, is skipped with its reason.

Every run is a process with one thread. After imports, loading (and tracing, which is shown beside) and three forwards
over the calibration tokens it measures one pruning call: CPU seconds of the process, and resident memory above the
start, every 5 ms. Tools run alternately on the same tokens, the fastest of --repeats counts, ratios are what is judged.
The error is ||y - y0|| / ||y0|| of the last hidden state on held-out tokens; it and broken patterns are computed here
from the weights that a tool wrote, by one code for all. Pooler and language model head are left dense by all.
Real text is taken from SPARSEC_DATA (default ../shared/data of the repository), random tokens where it is not there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

from oneshot import plotting, tables
from oneshot.cases import BATCH, Bench, Case, Outcome, in_order
from oneshot.gates import LARGE, ONE_BLOCK, SMALL, Gate, judge
from oneshot.materials import make

METHODS = {  # sparsec's, as pass text
    "magnitude": "oneshot{solver=none, score=magnitude}",
    "wanda": "oneshot{solver=none, score=wanda}",
    "sparsegpt": "oneshot{solver=sparsegpt, refit=false, calibration=sequential, damping=0.01}",  # as its paper has it
    "refit": "oneshot{solver=sparsegpt}",
    "alps": "oneshot{solver=alps}",
}
PATTERNS = ("2:5", "64:2:5", "16:2:8", "64:2:8@strip")
GPT, BETTER = ("sparsegpt",), ("alps", "refit")
GATES = (
    Gate("magnitude", "minilm", ("magnitude",), "modelopt/magnitude", "time", 0.5, sizes=(SMALL,)),
    Gate("wanda", "minilm", ("wanda",), "llmc/wanda", "time", 0.5),
    *(Gate("sparsegpt", model, GPT, "llmc/sparsegpt", "time", 0.5, 0.33) for model in ("minilm", "llama")),
    *(Gate("sparsegpt", model, GPT, "llmc/sparsegpt", "error", 1.01) for model in ("minilm", "llama")),
    *(Gate("alps or refit", model, BETTER, "sparsec/sparsegpt", "error", 0.9) for model in ("minilm", "llama")),
    Gate("memory", "llama", GPT, "llmc/sparsegpt", "memory", 1.0),
    Gate("memory", "llama", GPT, ONE_BLOCK, "memory", 1.0),
    *(
        Gate(
            "patterns",
            model,
            GPT,
            "llmc/sparsegpt" if pattern == "2:5" else "",  # the peers know no others of these
            "violated",
            0,
            pattern=pattern,
            sizes=(SMALL,),
        )
        for pattern in PATTERNS
        for model in ("minilm", "llama-h320")
    ),
)
BESIDE = (  # shown, held against nothing
    Case("onnxsim", "magnitude", "minilm", SMALL),
    Case("modelopt", "sparsegpt", "minilm", SMALL),
)


def repeats(case: Case, wanted: int, timed: set[Case]) -> int:
    """Minutes long runs, and those of which only error or pattern count, are done once."""
    return wanted if case in timed and (case.model, case.size) != ("llama", LARGE) else 1


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="16x64 tokens only, the best of 2")
    parser.add_argument("--repeats", type=int, default=3, help="how often what is timed runs (default 3)")
    parser.add_argument("--only", metavar="NAME", help="only the targets whose `name model pattern` has NAME in it")
    parser.add_argument("--venvs", type=Path, default=Path.home() / ".cache" / "sparsec-peers", metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory over time of SparseGPT on the Llama")
    return parser.parse_args()


def main() -> int:
    """Measure, print and check."""
    options = parsed()
    wanted = [g for g in GATES if not options.only or options.only in f"{g.name} {g.model} {g.pattern}"]
    if not wanted:
        names = ", ".join(dict.fromkeys(gate.name for gate in GATES))
        print(f"--only {options.only}: no target has that in its name; expected one of {names}", file=sys.stderr)
        return 2
    due = [(gate, size) for gate in wanted for size in gate.sizes if size == SMALL or not options.quick]
    timed = {case for gate, size in due if gate.metric in ("time", "memory") for case in gate.cases(size)}
    cases = in_order([case for gate, size in due for case in gate.cases(size)] + ([] if options.only else [*BESIDE]))
    count = 2 if options.quick else options.repeats
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        materials = make(Path(folder), LARGE[0] * LARGE[1])
        bench = Bench(options.venvs, materials, METHODS)
        found = bench.run(cases, {case: repeats(case, count, timed) for case in cases})
    rows = [judge(gate, size, found) for gate, size in due]
    heading = f"{machine()}, 1 thread, {materials.tokens_are}, batches of {BATCH}\n{versions(found)}"
    text = tables.report(rows, found, heading)
    print(json.dumps({"heading": heading, **tables.as_data(rows, found)}) if options.json else text)
    if options.markdown:
        options.markdown.write_text(text + "\n")
    if options.plot and not plotting.draw(found, options.plot):
        print("--plot: SparseGPT did not run on the Llama, so there is nothing to draw", file=sys.stderr)
    return int(any(row.met is False for row in rows))


def prepare() -> None:
    """One thread and no network for the evaluation in this process; before torch and transformers are imported."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def machine() -> str:
    """The processor's name, where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.machine()


def versions(found: dict[Case, Outcome]) -> str:
    """What ran, by tool."""
    runs = {case.tool: outcome.runs[0].versions for case, outcome in found.items() if outcome.runs}
    return "; ".join(f"{tool}: " + ", ".join(f"{n} {v}" for n, v in known.items()) for tool, known in runs.items())


if __name__ == "__main__":
    raise SystemExit(main())
