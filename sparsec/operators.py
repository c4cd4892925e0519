"""The operators a sparsec graph may hold, by name. Everything else is refused by name.

All are functional, deterministic apart from dropout, and touch nothing but their arguments. Plain arithmetic on sizes
is spelled `py.add`. To allow another aten operator, check those three properties and add it to the list.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from sparsec.errors import GraphError

if TYPE_CHECKING:
    from torch._ops import OpOverload

_ARITHMETIC = "add sub mul floordiv truediv mod neg pow getitem eq ne lt le gt ge and_ or_ not_"
PYTHON: dict[str, Callable[..., Any]] = {f"py.{name}": getattr(operator, name) for name in _ARITHMETIC.split()}

ATEN = frozenset(
    """
    __and__.Tensor __and__.Scalar __or__.Tensor __or__.Scalar __xor__.Tensor _softmax.default abs.default
    adaptive_avg_pool1d.default adaptive_avg_pool2d.default add.Tensor add.Scalar addmm.default alias.default
    all.default all.dim amax.default amin.default any.default any.dim arange.default arange.start arange.start_step
    argmax.default argmin.default argsort.default argsort.stable atan.default avg_pool2d.default baddbmm.default
    batch_norm.default bitwise_and.Tensor bitwise_and.Scalar bitwise_not.default bitwise_or.Tensor
    bitwise_xor.Tensor bmm.default broadcast_tensors.default bucketize.Tensor cat.default ceil.default chunk.default
    clamp.default clamp.Tensor clamp_max.default clamp_min.default clone.default constant_pad_nd.default
    contiguous.default conv1d.default conv2d.default conv2d.padding conv1d.padding cos.default cumsum.default
    detach.default diagonal.default diff.default div.Scalar div.Tensor div.Tensor_mode dot.default dropout.default
    einsum.default elu.default embedding.default eq.Scalar eq.Tensor erf.default exp.default expand.default
    expand_as.default expm1.default eye.default fill.Scalar flatten.using_ints flip.default floor.default
    floor_divide.default fmod.Scalar full.default full_like.default gather.default ge.Scalar ge.Tensor gelu.default
    glu.default group_norm.default gt.Scalar gt.Tensor hardsigmoid.default hardswish.default hardtanh.default
    index.Tensor index_put.default index_select.default isinf.default isnan.default layer_norm.default le.Scalar
    le.Tensor leaky_relu.default lift_fresh_copy.default linear.default linspace.default log.default log1p.default
    log_softmax.int logical_and.default logical_not.default logical_or.default logical_xor.default logsumexp.default
    lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor masked_scatter.default matmul.default max.default
    max.dim max.other max_pool2d.default maximum.default mean.default mean.dim min.default min.dim min.other
    minimum.default mish.default mm.default movedim.int mul.Scalar mul.Tensor mv.default narrow.default ne.Scalar
    ne.Tensor neg.default new_full.default new_ones.default new_zeros.default nonzero.default norm.ScalarOpt_dim
    numpy_T.default one_hot.default ones.default ones_like.default outer.default pad.default permute.default
    pixel_shuffle.default pixel_unshuffle.default pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor prelu.default
    prod.default prod.dim_int reciprocal.default relu.default relu6.default remainder.Scalar remainder.Tensor
    repeat.default repeat_interleave.Tensor repeat_interleave.self_int repeat_interleave.self_Tensor reshape.default
    rms_norm.default roll.default round.default rsqrt.default rsub.Scalar scalar_tensor.default
    scaled_dot_product_attention.default scatter.src scatter.value scatter_add.default select.int selu.default
    sigmoid.default sign.default silu.default sin.default slice.Tensor slice_scatter.default softmax.int
    softplus.default sort.default sort.stable split.Tensor split.sizes split_with_sizes.default sqrt.default
    square.default squeeze.default squeeze.dim squeeze.dims stack.default std.correction std.dim sub.Scalar
    sub.Tensor sum.default sum.dim_IntList sym_size.int t.default tan.default tanh.default tensor_split.sections
    to.device to.dtype to.dtype_layout to.other topk.default transpose.int tril.default triu.default
    true_divide.Tensor type_as.default unbind.int unflatten.int unfold.default unsqueeze.default
    upsample_bicubic2d.vec upsample_bilinear2d.vec upsample_nearest2d.vec var.correction var.dim var_mean.correction
    var_mean.dim linalg_vector_norm.default
    view.default view_as.default where.Scalar where.ScalarOther where.ScalarSelf where.self zeros.default
    zeros_like.default
    """.split()
)
SPARSEC = frozenset({"nm_linear.default"})


def name_of(target: Any) -> str:
    """The name of an operator, such as `aten.linear.default`; raises GraphError when it is not on the list."""
    name = _python_names().get(target) or _overload_name(target)
    if name is None or not _allowed(name):
        found = name or getattr(target, "__name__", str(target))
        raise GraphError(
            f"operator {found} is not on sparsec's allow-list, so the graph cannot be stored or compiled; "
            "please report the model, or rewrite the module that uses it"
        )
    return name


def resolve(name: str) -> Callable[..., Any]:
    """The operator of this name; raises GraphError when it is not on the list or this torch does not have it."""
    if name in PYTHON:
        return PYTHON[name]
    if not _allowed(name):
        raise GraphError(f"operator {name!r} is not on sparsec's allow-list; the file is damaged or not from sparsec")
    import torch

    namespace, operation, overload = name.split(".")
    try:
        found: OpOverload = getattr(getattr(getattr(torch.ops, namespace), operation), overload)
    except AttributeError:
        raise GraphError(f"operator {name} does not exist in torch {torch.__version__}") from None
    return found


def _allowed(name: str) -> bool:
    namespace, _, rest = name.partition(".")
    return name in PYTHON or (namespace == "aten" and rest in ATEN) or (namespace == "sparsec" and rest in SPARSEC)


@cache
def _python_names() -> dict[Callable[..., Any], str]:
    return {function: name for name, function in PYTHON.items()}


def _overload_name(target: Any) -> str | None:
    import torch

    return str(target) if isinstance(target, torch._ops.OpOverload) else None
