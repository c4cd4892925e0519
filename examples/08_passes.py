"""Run passes one by one and look at the graph, as compiler people do."""

import torch

import sparsec


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = torch.nn.Linear(16, 40), torch.nn.Linear(40, 16), torch.nn.LayerNorm(16)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden + self.down(torch.nn.functional.gelu(self.up(hidden))))


program = sparsec.trace(Block(), [torch.randn(2, 3, 16)], dynamic={"hidden": {0: "batch", 1: "length"}})
manager = sparsec.PassManager.parse("mask{pattern=8:2:5, columns=exact} | freeze | lower")
lowered = manager.run(program, check="outputs", after_each=lambda one, then: print(f"after {one}\n{then.dump()}"))
for site in lowered.sites:
    print(f"{site.name}: {site.role}, keeps {site.retained:.3f} of the summed score")
