"""Generate text with sparse kernels: an artifact attached to the model it was compiled from, with its KV cache."""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsec

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=200, hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()  # yours comes from AutoModelForCausalLM.from_pretrained(...)
example = {"input_ids": torch.randint(3, 200, (2, 8))}

with tempfile.TemporaryDirectory() as folder:
    artifact = sparsec.compile(
        model, example, pattern="64:2:8", out=Path(folder) / "llama.sparsec",
        dynamic={"input_ids": {0: "batch", 1: "length"}}, options=sparsec.Options(measure_speed=False),
    )  # fmt: skip
    attached = sparsec.attach(model, artifact.root)  # originals="drop" would free the dense weights
    print(f"{len(attached.layers)} layers run sparse kernels; dense: {attached.dense or 'none'}")

    prompt = {"input_ids": torch.tensor([[5, 17, 40]]), "attention_mask": torch.ones(1, 3).long()}
    print(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0].tolist())

    sparsec.detach(model)  # the dense model again, bit for bit
    print(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0].tolist())
