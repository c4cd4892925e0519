"""Find a subnetwork that does not rely on a shortcut: masks trained against a known bias, offline.

The last input agrees with the label in 9 of 10 training samples, and in 1 of 10 of the others that count.
"""

import torch
from torch.nn import functional

import sparsec


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = torch.nn.Linear(17, 64), torch.nn.Linear(64, 17), torch.nn.Linear(17, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(x + self.down(functional.gelu(self.up(x))))}


torch.manual_seed(0)
teacher = torch.randn(16, 24), torch.randn(24)


def samples(count: int, agrees: float) -> dict[str, torch.Tensor]:
    core = torch.randn(count, 16)
    labels = ((core @ teacher[0]).relu() @ teacher[1] > 0).long()
    shortcut = torch.where(torch.rand(count) < agrees, labels, 1 - labels)
    # What a model that sees nothing but the shortcut says: log-probabilities, (samples, classes).
    bias = torch.full((count, 2), 0.1).scatter(1, shortcut[:, None], 0.9).log()
    return {"x": torch.cat([core, 2.0 * shortcut[:, None] - 1], 1), "labels": labels, "bias": bias}


def told(name: str, module) -> None:
    with torch.no_grad():
        right = [(module(x=one["x"])["logits"].argmax(1) == one["labels"]).float().mean() for one in (same, other)]
    print(f"{name}: accuracy {right[0]:.3f} where the shortcut helps, {right[1]:.3f} where it misleads")


train, same, other = samples(4096, 0.9), samples(2048, 0.9), samples(2048, 0.1)
model = Classifier()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(8):
    for rows in torch.randperm(4096).split(64):
        optimizer.zero_grad()
        functional.cross_entropy(model(train["x"][rows])["logits"], train["labels"][rows]).backward()
        optimizer.step()
dense = sparsec.trace(model.eval(), {"x": same["x"][:2]})
told("dense", dense)

ctx = sparsec.Context(resources={"train": [train], "unbiased": [samples(4096, 0.5)]})
masks = "mask-training{pattern=unstructured:0.5, epochs=12, batch_size=64, score_lr=5e-3"
weights = "imp{pattern=unstructured:0.5, epochs=12, batch_size=64, lr=3e-3, rewind=initial"
# The third shows how good a subnetwork there is: its mask is trained on data without the bias.
for passes in (f"{masks}}}", f"{masks}, loss=poe}}", f"{masks}, data=unbiased}}", f"{weights}, loss=poe}}"):
    told(passes, sparsec.PassManager.parse(passes).run(dense, ctx))
