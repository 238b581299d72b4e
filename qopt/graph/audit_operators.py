"""The operators that a program in a torch.export archive may call: tensor arithmetic without effects outside it.

torch resolves an operator's name with getattr on the whole torch namespace, so that a list of what is harmless is the
only safe test. It holds what inference graphs use and `torch.onnx` can translate; operators that read or write files,
call back into Python or run what a string says are left out.
"""

from __future__ import annotations

import torch

from qopt.graph.audit_grammar import Refused

_ATEN_NAMES = """
    _adaptive_avg_pool2d _assert_scalar _assert_tensor_metadata _conj _log_softmax _native_batch_norm_legit
    _native_batch_norm_legit_no_training _prelu_kernel _safe_softmax _scaled_dot_product_efficient_attention
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu _softmax _to_copy _unsafe_index
    _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa _weight_norm
    abs abs_ acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d add add_ addbmm addcdiv addcmul addmm addmv addr alias all alpha_dropout amax amin any arange
    argmax argmin as_strided asin asinh atan atan2 atanh atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d
    avg_pool3d
    baddbmm batch_norm bilinear bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor
    bmm broadcast_tensors broadcast_to bucketize
    cat cdist ceil celu celu_ channel_shuffle chunk clamp clamp_ clamp_max clamp_max_ clamp_min clamp_min_ clone col2im
    concat concatenate constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d convolution copy copy_ cos cosh cosine_similarity cross cudnn_batch_norm cumprod cumsum
    deg2rad detach detach_ diag diag_embed diagonal diff div div_ divide dot dropout dropout_
    einsum elu elu_ embedding embedding_bag empty empty_like eq erf erfc exp exp2 exp_ expand expand_as expm1 eye
    feature_dropout fill fill_ flatten flip fliplr flipud floor floor_divide fmax fmin fmod frac frobenius_norm full
    full_like
    gather ge gelu gelu_ glu greater greater_equal grid_sampler grid_sampler_2d group_norm gru gt
    hardshrink hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh hardtanh_ hstack hypot
    im2col index index_add index_copy index_fill index_put index_put_ index_select instance_norm is_nonzero isclose
    isfinite isinf isnan item
    kron
    layer_norm le leaky_relu leaky_relu_ lerp less less_equal lift_fresh_copy linalg_cross linalg_norm
    linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid log_softmax logaddexp logical_and logical_not
    logical_or logical_xor logit logsumexp lstm lt
    mH mT masked_fill masked_fill_ masked_scatter masked_select matmul max max_pool1d max_pool1d_with_indices
    max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices maximum mean median meshgrid min minimum mish
    mish_ mm moveaxis movedim mul mul_ multiply mv
    nan_to_num narrow native_batch_norm native_dropout native_group_norm native_layer_norm ne neg neg_ negative
    new_empty new_full new_ones new_zeros norm not_equal numpy_T
    one_hot ones ones_like outer
    pad permute pixel_shuffle pixel_unshuffle pow pow_ prelu prod
    rad2deg ravel reciprocal reciprocal_ reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 relu6_ relu_
    remainder repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape reshape_as
    resolve_conj resolve_neg rms_norm rnn_relu rnn_tanh roll rot90 round rsqrt rsqrt_ rsub
    scalar_tensor scaled_dot_product_attention scatter scatter_add scatter_reduce select select_scatter selu selu_
    sigmoid sigmoid_ sign signbit silu silu_ sin sinc sinh slice slice_scatter softmax softplus softshrink sort
    split split_with_sizes sqrt sqrt_ square squeeze stack std std_mean sub sub_ subtract sum sum_to_size swapaxes
    swapdims sym_constrain_range sym_constrain_range_for_size sym_numel sym_size sym_storage_offset sym_stride
    t take take_along_dim tan tanh tanh_ tensor_split threshold threshold_ tile to topk transpose tril triu true_divide
    trunc type_as
    unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze upsample_bicubic2d upsample_bilinear2d
    upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d
    var var_mean view view_as vstack
    where
    xlogy
    zero_ zeros zeros_like
    """
_OPERATOR_NAMES = "abs add and_ eq floordiv ge getitem gt le lt mod mul ne neg or_ pow sub truediv trunc"
_SYM_NAMES = "float int ite max min not sum"

_ATEN = frozenset(_ATEN_NAMES.split())
_SYMBOLIC = frozenset(
    [f"_operator.{name}" for name in _OPERATOR_NAMES.split()]
    + [f"math.{name}" for name in ("ceil", "floor", "trunc")]
    + [f"torch.sym_{name}" for name in _SYM_NAMES.split()]
)
_HIGHER_ORDER = frozenset(
    f"torch.ops.higher_order.{name}" for name in ("cond", "wrap_with_set_grad_enabled", "wrap_with_autocast")
)


def operator(text: str) -> str:
    """An operator on the list, as torch.export writes it (``torch.ops.aten.add.Tensor``); raises Refused otherwise."""
    if text in _SYMBOLIC or text in _HIGHER_ORDER:
        return text
    parts = text.split(".")
    if len(parts) == 5 and parts[:3] == ["torch", "ops", "aten"] and parts[3] in _ATEN:
        packet = getattr(torch.ops.aten, parts[3], None)
        if packet is not None and parts[4] in packet.overloads():
            return text
    raise Refused("the operator is not on the list of those known to be harmless", text)
