"""Time and memory of compiling MiniLM for the kernel backend, after imports. Exit status 1 when a bound is broken.

Bounds (2 cores): 30 s, and 400 MB above the memory after imports plus one dense copy of the model.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

SECONDS, MEGABYTES = 30.0, 400.0
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does


def main() -> int:
    import torch
    import transformers  # noqa: F401  (imports are not what is measured)
    from transformers.models.bert import modeling_bert  # noqa: F401

    from sparsec import api, registry

    for name in ("mask", "freeze", "lower"):
        registry.pass_class(name)
    registry.backend("kernel")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        artifact = api.compile("demo:minilm", pattern="64:2:5", out=Path(folder) / "minilm.sparsec")
        seconds = time.perf_counter() - start
    dense = artifact.manifest["nbytes"]["dense_model"] / 1e6
    above = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before - dense
    ok = seconds <= SECONDS and above <= MEGABYTES
    row = {
        "seconds": round(seconds, 1),
        "megabytes_above_one_dense_copy": round(above),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps({**row, "bounds": {"seconds": SECONDS, "megabytes": MEGABYTES}, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
