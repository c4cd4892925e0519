"""The operators a sparsec graph may hold, by name. Everything else is refused by name.

All are functional, deterministic apart from dropout, and touch nothing but their arguments. Plain arithmetic on sizes
is spelled `py.add`. To allow another aten operator, check those three properties and add it to the list.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from sparsec.errors import GraphError

if TYPE_CHECKING:
    from torch._ops import OpOverload

_ARITHMETIC = "add sub mul floordiv truediv mod neg pow getitem eq ne lt le gt ge and_ or_ not_"
PYTHON: dict[str, Callable[..., Any]] = {f"py.{name}": getattr(operator, name) for name in _ARITHMETIC.split()}
_SYMBOLIC = {f"py.{name}": f"sym_{name}" for name in "max min not ite float int".split()}
"""What Python spells otherwise: functions of torch that take plain numbers too."""

ATEN = frozenset(
    """
    __and__.Scalar __and__.Tensor __lshift__.Scalar __lshift__.Tensor __or__.Scalar __or__.Tensor __rshift__.Scalar
    __rshift__.Tensor __xor__.Tensor _conj.default _log_softmax.default _safe_softmax.default _softmax.default
    _to_copy.default _upsample_bicubic2d_aa.vec _upsample_bilinear2d_aa.vec _upsample_nearest_exact2d.vec
    _weight_norm.default abs.default absolute.default acos.default adaptive_avg_pool1d.default
    adaptive_avg_pool2d.default adaptive_avg_pool3d.default adaptive_max_pool1d.default adaptive_max_pool2d.default
    add.Scalar add.Tensor addbmm.default addcdiv.default addcmul.default addmm.default addmv.default adjoint.default
    affine_grid_generator.default alias.default all.default all.dim all.dims amax.default amin.default aminmax.default
    any.default any.dim any.dims arange.default arange.start arange.start_step arctan.default argmax.default
    argmin.default argsort.default argsort.stable asin.default atan.default atan2.default avg_pool1d.default
    avg_pool2d.default avg_pool3d.default baddbmm.default batch_norm.default bincount.default bitwise_and.Scalar
    bitwise_and.Tensor bitwise_left_shift.Tensor bitwise_not.default bitwise_or.Scalar bitwise_or.Tensor
    bitwise_right_shift.Tensor bitwise_xor.Scalar bitwise_xor.Tensor bmm.default broadcast_tensors.default
    bucketize.Tensor cat.default cdist.default ceil.default celu.default channel_shuffle.default chunk.default
    clamp.Tensor clamp.default clamp_max.Tensor clamp_max.default clamp_min.Tensor clamp_min.default clip.default
    clone.default col2im.default column_stack.default concat.default concatenate.default conj.default
    constant_pad_nd.default contiguous.default conv1d.default conv1d.padding conv2d.default conv2d.padding
    conv3d.default conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input convolution.default
    copy.default cos.default cosh.default cosine_similarity.default count_nonzero.default count_nonzero.dim_IntList
    cross.default cummax.default cummin.default cumprod.default cumsum.default deg2rad.default detach.default
    diag.default diag_embed.default diagonal.default diagonal_scatter.default diff.default div.Scalar div.Tensor
    div.Tensor_mode divide.Scalar divide.Tensor dot.default dropout.default einsum.default elu.default embedding.default
    embedding_bag.padding_idx eq.Scalar eq.Tensor erf.default erfinv.default exp.default exp2.default expand.default
    expand_as.default expand_copy.default expm1.default eye.default feature_dropout.default fft_fft.default
    fft_fft2.default fft_fftn.default fft_ifft.default fft_ifftn.default fft_irfft.default fft_irfft2.default
    fft_rfft.default fft_rfft2.default fill.Scalar fill.Tensor flatten.using_ints flip.default fliplr.default
    flipud.default float_power.Tensor_Scalar float_power.Tensor_Tensor floor.default floor_divide.Scalar
    floor_divide.default fmod.Scalar frac.default frobenius_norm.dim full.default full_like.default gather.default
    ge.Scalar ge.Tensor gelu.default glu.default greater.Scalar greater_equal.Tensor grid_sampler.default
    grid_sampler_2d.default group_norm.default gt.Scalar gt.Tensor hardshrink.default hardsigmoid.default
    hardswish.default hardtanh.default heaviside.default histc.default hsplit.int hstack.default hypot.default
    im2col.default imag.default index.Tensor index_add.default index_copy.default index_fill.int_Scalar
    index_put.default index_reduce.default index_select.default inner.default instance_norm.default isclose.default
    isfinite.default isinf.default isnan.default item.default kron.default kthvalue.default layer_norm.default le.Scalar
    le.Tensor leaky_relu.default lerp.Scalar lerp.Tensor less.Scalar less_equal.Tensor lift_fresh_copy.default
    linalg_matrix_norm.default linalg_norm.default linalg_vector_norm.default linear.default linspace.default
    log.default log10.default log1p.default log2.default log_sigmoid.default log_softmax.int logaddexp.default
    logcumsumexp.default logical_and.default logical_not.default logical_or.default logical_xor.default
    logsumexp.default lt.Scalar lt.Tensor mH.default mT.default masked_fill.Scalar masked_fill.Tensor
    masked_scatter.default masked_select.default matmul.default matrix_H.default max.default max.dim max.other
    max_pool1d.default max_pool2d.default max_pool3d.default maximum.default mean.default mean.dim median.default
    median.dim meshgrid.default meshgrid.indexing min.default min.dim min.other minimum.default mish.default mm.default
    moveaxis.int movedim.int msort.default mul.Scalar mul.Tensor multiply.Scalar multiply.Tensor mv.default
    nan_to_num.default nanmean.default nansum.default narrow.Tensor narrow.default ne.Scalar ne.Tensor neg.default
    negative.default new_full.default new_ones.default new_zeros.default nonzero.default norm.Scalar norm.ScalarOpt_dim
    norm.ScalarOpt_dim_dtype not_equal.Tensor nuclear_norm.default numpy_T.default one_hot.default ones.default
    ones_like.default outer.default pad.default pairwise_distance.default permute.default pixel_shuffle.default
    pixel_unshuffle.default polar.default positive.default pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor prelu.default
    prod.default prod.dim_int ravel.default real.default reciprocal.default reflection_pad1d.default
    reflection_pad2d.default relu.default relu6.default remainder.Scalar remainder.Tensor renorm.default repeat.default
    repeat_interleave.Tensor repeat_interleave.self_Tensor repeat_interleave.self_int replication_pad1d.default
    replication_pad2d.default reshape.default reshape_as.default resolve_conj.default resolve_neg.default
    rms_norm.default roll.default rot90.default round.default rsqrt.default rsub.Scalar rsub.Tensor
    scalar_tensor.default scaled_dot_product_attention.default scatter.src scatter.value scatter.value_reduce
    scatter_add.default scatter_reduce.two searchsorted.Tensor select.int select_scatter.default selu.default
    sgn.default sigmoid.default sign.default silu.default sin.default sinh.default slice.Tensor slice_scatter.default
    softmax.int softplus.default sort.default sort.stable special_erf.default special_expit.default split.Tensor
    split.default split.sizes split_with_sizes.default sqrt.default square.default squeeze.default squeeze.dim
    squeeze.dims stack.default std.correction std.dim std_mean.correction sub.Scalar sub.Tensor subtract.Tensor
    sum.default sum.dim_IntList swapaxes.default sym_numel.default sym_size.int t.default take_along_dim.default
    tan.default tanh.default tensor_split.indices tensor_split.sections tensordot.default threshold.default tile.default
    to.device to.dtype to.dtype_layout to.other topk.default trace.default transpose.int tril.default
    tril_indices.default triu.default triu_indices.default true_divide.Scalar true_divide.Tensor trunc.default
    type_as.default unbind.int unflatten.int unfold.default unsafe_chunk.default unsafe_split.Tensor unsqueeze.default
    upsample_bicubic2d.vec upsample_bilinear2d.vec upsample_linear1d.vec upsample_nearest1d.vec upsample_nearest2d.vec
    upsample_nearest3d.vec upsample_trilinear3d.vec var.correction var.dim var_mean.correction var_mean.dim vdot.default
    view.default view_as.default view_as_complex.default view_as_real.default vstack.default where.Scalar
    where.ScalarOther where.ScalarSelf where.self zero.default zeros.default zeros_like.default
    """.split()
)
SPARSEC = frozenset({"nm_linear.default", "nm_weight.default", "expert_linear.default"})


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
    if name in _SYMBOLIC:
        return _symbolic(name)
    if not _allowed(name):
        raise GraphError(f"operator {name!r} is not on sparsec's allow-list; the file is damaged or not from sparsec")
    import torch

    namespace, operation, overload = name.split(".")
    if namespace == "sparsec":
        importlib.import_module("sparsec.ops")  # which registers them, and builds on this module's level
    try:
        found: OpOverload = getattr(getattr(getattr(torch.ops, namespace), operation), overload)
    except AttributeError:
        raise GraphError(f"operator {name} does not exist in torch {torch.__version__}") from None
    return found


def _allowed(name: str) -> bool:
    namespace, _, rest = name.partition(".")
    return (
        name in PYTHON
        or name in _SYMBOLIC
        or (namespace == "aten" and rest in ATEN)
        or (namespace == "sparsec" and rest in SPARSEC)
    )


@cache
def _python_names() -> dict[Callable[..., Any], str]:
    return {function: name for name, function in PYTHON.items()} | {_symbolic(name): name for name in _SYMBOLIC}


def _symbolic(name: str) -> Callable[..., Any]:
    import torch

    found: Callable[..., Any] = getattr(torch, _SYMBOLIC[name])
    return found


def _overload_name(target: Any) -> str | None:
    import torch

    return str(target) if isinstance(target, torch._ops.OpOverload) else None
