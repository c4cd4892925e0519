"""Memory of pruning a large model: python tests/bench/bench_large.py [--layers 24 --hidden 2048] [--plot FILE]

A Llama-shaped model (24 layers, hidden 2048, intermediate 5632, vocabulary 32000: 1.3 billion parameters) lies as
random bf16 weights in shards of 1 GB. `sparsec compile` prunes it to 64:2:8 by SparseGPT with 16 x 64 calibration
tokens and writes a Hugging Face folder, on 2 threads. A second compile is killed when half of the sites are solved,
and resumed.
Exit status 1 when the process took more than 12 GB, when a weight breaks its pattern, or when one bit differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PATTERN, GIGABYTES, SAMPLES, LENGTH, VOCABULARY, HEADS = "64:2:8", 12.0, 16, 64, 32000, 16
SHARD_BYTES, SITES_OF_A_LAYER, HERTZ = 10**9, 7, 5
JOURNAL = "oneshot"  # the pass that keeps solved sites


def make_model(folder: Path, layers: int, hidden: int) -> None:
    """Write the model shard by shard; no more than one shard is in memory."""
    from transformers import LlamaConfig

    wide = hidden * 11 // 4
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=512, tie_word_embeddings=False,
        dtype="bfloat16", architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{each}_proj.weight": (hidden, hidden) for each in "qkvo"}
        shapes |= {f"{name}.mlp.{each}_proj.weight": (wide, hidden) for each in ("gate", "up")}
        shapes |= {f"{name}.mlp.down_proj.weight": (hidden, wide)}
        shapes |= {f"{name}.{each}_layernorm.weight": (hidden,) for each in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}
    generator, index, shard = torch.Generator().manual_seed(0), dict[str, str](), dict[str, torch.Tensor]()
    for name, shape in shapes.items():
        made = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
        shard[name] = made.bfloat16()
        if sum(each.nbytes for each in shard.values()) >= SHARD_BYTES or name == "lm_head.weight":
            file = f"model-{len(set(index.values())):05}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def make_tokens(file: Path) -> None:
    """Calibration samples: random tokens, as the weights are."""
    ids = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))


@dataclass
class Run:
    """One compile in a process of its own, its memory watched."""

    command: list[str]
    seconds: float = 0.0
    rss: list[tuple[float, float, float]] = field(default_factory=list)
    """Seconds since the start, resident and anonymous GB."""

    peak_rss: float = 0.0
    """GB, as the system counts it between samples too."""

    @property
    def peak_anonymous(self) -> float:
        return max(each[2] for each in self.rss)

    def run(self, threads: int, kill_at: tuple[Path, int] | None = None) -> int:
        """Run to the end, or until so many files lie in a folder; the exit status."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        start = time.perf_counter()
        process = subprocess.Popen(self.command, env=environment, stdout=subprocess.DEVNULL)
        watcher = threading.Thread(target=self._watch, args=(process, start, kill_at))
        watcher.start()
        process.wait()
        watcher.join()
        self.seconds = time.perf_counter() - start
        return process.returncode

    def _watch(self, process: subprocess.Popen[bytes], start: float, kill_at: tuple[Path, int] | None) -> None:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            found = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith(("VmHWM", "RssAnon"))}
            if len(found) == 2:  # a process that ends has no memory any more
                self.peak_rss = max(self.peak_rss, int(found["VmHWM"]) / 1e6 * 1.024)
                resident = int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
                self.rss.append(
                    (time.perf_counter() - start, resident / 1e6 * 1.024, int(found["RssAnon"]) / 1e6 * 1.024)
                )
            if kill_at and len(list(kill_at[0].glob("*.safetensors"))) >= kill_at[1]:
                process.send_signal(signal.SIGKILL)
                return
            time.sleep(1 / HERTZ)


def hashes(out: Path) -> dict[str, str]:
    """SHA-256 of every file that holds tensors or the graph."""
    files = [*out.rglob("*.safetensors"), *out.glob("graph.json")]
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[str(path.relative_to(out))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def violations(out: Path) -> list[str]:
    """The checks that fail when another process reads the Hugging Face folder."""
    command = [sys.executable, "-m", "sparsec.cli", "verify", str(out / "hf"), "--pattern", PATTERN, "--json"]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    return [f"{check['name']}: {check['detail']}" for check in report["checks"] if not check["ok"]]


def measure(scratch: Path, asked: argparse.Namespace) -> tuple[dict[str, Any], Run]:
    """Compile, kill, resume and compare."""
    model, tokens = scratch / "model", scratch / "tokens.jsonl"
    make_model(model, asked.layers, asked.hidden)
    make_tokens(tokens)
    base = [sys.executable, "-m", "sparsec.cli", "compile", str(model), "--pattern", PATTERN, "--dtype", "bf16"]
    base += ["--backend", "hf", "--threads", str(asked.threads)]
    base += ["--calib", str(tokens), "--num-calibration-samples", str(SAMPLES), "--max-seq-length", str(LENGTH)]
    base += ["--passes", asked.passes] if asked.passes else ["--solver", asked.solver]
    whole = Run([*base, "-o", str(scratch / "whole")])
    if status := whole.run(asked.threads):
        raise SystemExit(f"the compile ended with status {status}")
    row: dict[str, Any] = {"parameters": round(_parameters(model) / 1e9, 3), "seconds": round(whole.seconds, 1)}
    row |= {"peak_rss_gb": round(whole.peak_rss, 2), "peak_anon_gb": round(whole.peak_anonymous, 2)}
    row |= {"bound": GIGABYTES, "violations": violations(scratch / "whole")}
    if asked.passes and JOURNAL not in asked.passes:
        return {**row, "identical": None, "not_resumed": f"{asked.passes} keeps nothing to resume from"}, whole
    half = SITES_OF_A_LAYER * asked.layers // 2
    out = scratch / "killed"
    killed = Run([*base, "-o", str(out)])
    status = killed.run(asked.threads, (scratch / ".killed.work" / JOURNAL, half))
    resumed = Run([*base, "-o", str(out), "--resume"])
    if status != -signal.SIGKILL or out.exists() or resumed.run(asked.threads):
        raise SystemExit(f"the second compile was to be killed (status {status}) and resumed")
    row |= {"killed_after_seconds": round(killed.seconds, 1), "resumed_seconds": round(resumed.seconds, 1)}
    row |= {"resumed_peak_rss_gb": round(resumed.peak_rss, 2), "killed_at_sites": half}
    return {**row, "identical": hashes(scratch / "whole") == hashes(out)}, whole


def _parameters(model: Path) -> float:
    return sum(path.stat().st_size for path in model.glob("*.safetensors")) / 2


def plot(run: Run, file: Path) -> None:
    """Memory over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    seconds, resident, anonymous = zip(*run.rss, strict=True)
    axes.plot(seconds, resident, label="resident")
    axes.plot(seconds, anonymous, label="of it no file's")
    axes.axhline(GIGABYTES, linestyle=":", color="gray", label="bound")
    axes.set(xlabel="seconds", ylabel="GB", ylim=(0, None))
    axes.legend()
    figure.savefig(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048, help="a multiple of 64")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--solver", default="sparsegpt")
    parser.add_argument("--passes", help="these instead of what --solver stands for")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--scratch", type=Path, help="where some GB may lie; default: the temporary folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.scratch) as scratch:
        row, run = measure(Path(scratch), asked)
    if asked.plot:
        plot(run, asked.plot)
    ok = max(row["peak_rss_gb"], row.get("resumed_peak_rss_gb", 0.0)) <= GIGABYTES
    ok = ok and not row["violations"] and row["identical"] is not False
    print(json.dumps({**row, "threads": asked.threads, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
