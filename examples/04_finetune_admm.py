"""Fine-tune a model towards a pattern with ADMM, offline, and compile what comes out.

A tiny classifier stands for a model that is already trained on its task; so that a page suffices, it is trained here.
"""

import torch
from torch.nn import functional

import sparsec


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32), torch.nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(x + self.down(functional.gelu(self.up(x))))}


torch.manual_seed(0)
x = torch.randn(3072, 32)
labels = (x.relu() @ torch.randn(32, 64)).relu().matmul(torch.randn(64, 4)).argmax(1)
train = [{"x": x[i : i + 64], "labels": labels[i : i + 64]} for i in range(0, 2048, 64)]


def accuracy(model) -> float:
    with torch.no_grad():
        return float((model(x=x[2048:])["logits"].argmax(1) == labels[2048:]).float().mean())


model = Classifier()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(15):
    for batch in train:
        optimizer.zero_grad()
        functional.cross_entropy(model(batch["x"])["logits"], batch["labels"]).backward()
        optimizer.step()
dense = sparsec.trace(model.eval(), {"x": x[:2]})
print(f"dense: accuracy {accuracy(dense):.3f}")

# Batches are dicts of the model's inputs, and labels. `data=train`, the default, names them.
ctx = sparsec.Context(resources={"train": train})
budget = "pattern=16:2:8, epochs=12, lr=5e-3, batch_size=64"
for passes in (
    "mask{pattern=16:2:8} | freeze",
    f"fixed-mask{{{budget}}}",
    f"admm{{{budget}, rho=0.1, every=64, frozen_epochs=4, distill=1}}",
):
    program, reports = sparsec.PassManager.parse(passes).run_reported(dense, ctx)
    print(f"{passes}: accuracy {accuracy(program):.3f}")
curve = ", ".join(f"{value:.2f}" for _, value in reports[0].data["curves"]["primal"])
print(f"distance of the weights from the pattern, dual update by dual update: {curve}")

program.write_back(model)  # zeros and all: the model's own parameters
artifact = sparsec.compile(model, {"x": x[:2]}, out="classifier.sparsec", pattern="16:2:8", passes="mask | freeze")
print(f"compiled: accuracy {accuracy(artifact.load()):.3f}")
