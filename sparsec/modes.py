"""Train and eval mode of a traced graph: torch.export freezes the mode, so it is switched in the operators' arguments.

Covered: dropout, the dropout of scaled-dot-product attention, batch norm. In eval mode the graph equals the original
model's eval output exactly. (`GraphModule.eval()` of an exported graph raises; torchao's helper misses attention.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sparsec.errors import TraceError

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

Mode = Literal["train", "eval"]
_TRAINING_ARGUMENT = {"aten.dropout.default": 2, "aten.batch_norm.default": 5}
_ATTENTION = "aten.scaled_dot_product_attention.default"
_ATTENTION_DROPOUT = 4


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
