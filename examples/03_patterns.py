"""Patterns without any model: what they keep, what they cost, what breaks them."""

import torch

import sparsec

weight = torch.randn(128, 96)
for text in ("2:4", "2:8", "64:2:5", "64:2:8", "unstructured:0.7"):
    pattern = sparsec.Pattern.parse(text)
    selection = pattern.project(weight.abs())
    mask = pattern.mask(selection, weight.shape[1])
    kept = float((weight.abs() * mask[0]).sum() / weight.abs().sum())
    count = pattern.violations(weight[None] * mask).count
    print(f"{text:18} {pattern.words:38} keeps {kept:.3f} of the magnitude, {count} violations")
print(sparsec.Pattern.parse("2:4").violations(weight[None]).first[0])
