"""Merge a LoRA that peft trained into a sparse model without filling its zeros, then train on under the same masks.

A tiny classifier stands for a model that is trained on its task; so that a page suffices, it is trained here.
"""

import peft
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


def fit(module: torch.nn.Module) -> None:
    optimizer = torch.optim.AdamW([one for one in module.parameters() if one.requires_grad], lr=3e-3)
    for batch in train * 12:
        optimizer.zero_grad()
        functional.cross_entropy(module(x=batch["x"])["logits"], batch["labels"]).backward()
        optimizer.step()


def told(name: str, module) -> None:
    with torch.no_grad():
        right = float((module(x=x[2048:])["logits"].argmax(1) == labels[2048:]).float().mean())
    weights = dict((getattr(module, "module", module)).named_parameters())
    zeros = float(torch.cat([weights[name].flatten() for name in ("up.weight", "down.weight")]).eq(0).float().mean())
    print(f"{name}: accuracy {right:.3f}, zeros {zeros:.3f}")


model = Classifier()
fit(model)
sparse = sparsec.PassManager.parse("mask{pattern=16:2:8} | freeze").run(sparsec.trace(model.eval(), {"x": x[:2]}))
sparse.write_back(model)
told("pruned", model)

lora = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["up", "down"]))
fit(lora)
lora.save_pretrained("adapter")
merged = sparsec.PassManager.parse("merge-adapter{adapter=adapter}").run(sparse)
trained = "three-stage-lora{adapter=adapter, epochs=6, lr=3e-3, batch_size=64}"
tuned = sparsec.PassManager.parse(trained).run(sparse, sparsec.Context(resources={"train": train}))
told("merged by peft", lora.merge_and_unload())
told("merged under the masks", merged)
told("and trained under them", tuned)
