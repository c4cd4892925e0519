"""Compile a model of your own, load the artifact, run it: the whole job in one page."""

import tempfile
from pathlib import Path

import torch

import sparsec

model = torch.nn.Sequential(
    torch.nn.Linear(96, 200), torch.nn.GELU(), torch.nn.Linear(200, 96), torch.nn.GELU(), torch.nn.Linear(96, 10)
)
with tempfile.TemporaryDirectory() as folder:
    artifact = sparsec.compile(model, [torch.randn(4, 96)], pattern="16:2:5", out=Path(folder) / "mlp.sparsec")
    for site in artifact.manifest["sites"]:
        print(site["name"], site["pattern"] or f"dense: {site['excluded']}")

    module = sparsec.load(artifact.root)  # needs no model source
    print(module(torch.randn(7, 96))["output"].shape)
    print(all(check.ok for check in artifact.verify()))
