"""Train and eval mode: of a model while it is exported, and of its graph ever after.

torch.export freezes the mode, so the graph's is switched in the operators' arguments: dropout, the dropout of
scaled-dot-product attention, batch norm. In eval mode the graph equals the original model's eval output exactly.
(`GraphModule.eval()` of an exported graph raises; torchao's helper misses attention.) What else is random while a model
trains is Python code, which no argument could switch: it is off while the model is exported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from sparsec.errors import TraceError

if TYPE_CHECKING:
    from torch import nn
    from torch.fx import GraphModule, Node

Mode = Literal["train", "eval"]
_TRAINING_ARGUMENT = {"aten.dropout.default": 2, "aten.batch_norm.default": 5, "aten.feature_dropout.default": 2}
_ATTENTION = "aten.scaled_dot_product_attention.default"
_ATTENTION_DROPOUT = 4
_RATES = frozenset(
    """
    layerdrop encoder_layerdrop decoder_layerdrop drop_path_rate stochastic_depth_prob mask_time_prob mask_feature_prob
    router_jitter_noise jitter_noise input_jitter_noise router_input_jitter_noise
    """.split()
)
_SWITCHES = frozenset({"apply_spec_augment"})
_CACHES = frozenset({"use_cache", "use_mems_train", "use_mems_eval"})


@contextlib.contextmanager
def exporting(model: nn.Module) -> Iterator[list[str]]:
    """Train mode, with caches and all randomness but dropout off; everything is restored.

    Yields what random parts were set to 0: layerdrop, stochastic depth, SpecAugment, router jitter.
    """
    was_training = {module: module.training for module in model.modules()}
    restore: list[tuple[Any, str, Any]] = []
    silenced = []
    try:
        for where, holder in _holders(model):
            for attribute, value in _set(holder):
                restore.append((holder, attribute, value))
                setattr(holder, attribute, type(value)(0))
                if attribute not in _CACHES:
                    silenced.append(f"{where}.{attribute}".lstrip("."))
        model.train()
        yield silenced
    finally:
        for module, training in was_training.items():
            module.training = training
        for holder, attribute, value in restore:
            setattr(holder, attribute, value)


def _holders(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules of a model and the configurations they read, each once, with its name."""
    from torch import nn

    seen: set[int] = set()
    for name, module in model.named_modules():
        yield name, module
        config = getattr(module, "config", None)
        if config is not None and not isinstance(config, (nn.Module, dict)) and id(config) not in seen:
            seen.add(id(config))
            yield f"{name}.config".lstrip("."), config


def _set(holder: Any) -> list[tuple[str, Any]]:
    """The rates above 0 and the switches that are on."""
    rates = _RATES | ({"drop_prob"} if "DropPath" in type(holder).__name__ else set())
    found = [(name, getattr(holder, name, None)) for name in sorted(rates | _SWITCHES | _CACHES)]
    return [
        (name, value)
        for name, value in found
        if (value is True if name in _SWITCHES | _CACHES else isinstance(value, float) and value > 0)
    ]


def set_mode(module: GraphModule, mode: Mode) -> None:
    """Switch all random and mode-dependent operators of the graph, in place."""
    for node in module.graph.nodes:
        name = str(node.target)
        if name in _TRAINING_ARGUMENT:
            node.update_arg(_TRAINING_ARGUMENT[name], mode == "train")
        elif name == _ATTENTION and (len(node.args) > _ATTENTION_DROPOUT or "dropout_p" in node.kwargs):
            _set_attention(node, mode)
    module.recompile()


def _set_attention(node: Node, mode: Mode) -> None:
    """Attention holds a probability, not a switch: it is remembered in the node while eval mode zeroes it."""
    by_keyword = "dropout_p" in node.kwargs
    current = node.kwargs["dropout_p"] if by_keyword else node.args[_ATTENTION_DROPOUT]
    probability = node.meta.setdefault("dropout_p", current)
    value = probability if mode == "train" else 0.0
    if by_keyword:
        node.update_kwarg("dropout_p", value)
    else:
        node.update_arg(_ATTENTION_DROPOUT, value)


def refuse_random(module: GraphModule) -> None:
    """Raise TraceError when the graph draws random numbers that eval mode would not switch off."""
    import torch

    for node in module.graph.nodes:
        tags = getattr(node.target, "tags", ())
        switched = str(node.target) in _TRAINING_ARGUMENT or str(node.target) == _ATTENTION
        if torch.Tag.nondeterministic_seeded in tags and not switched:
            scope = node.meta.get("scope") or "the model"
            raise TraceError(
                f"{scope} draws random numbers ({node.target}); set its random depth, noise or jitter to 0 first"
            )
