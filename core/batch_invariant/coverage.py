"""Aten operators that no kernel covers: the harmless ones are left alone, the rest is refused.

Decided from torch's own registry. An overload is covered (by a contract or a backend's override),
or harmless for one of the reasons below, or refused; a name that nobody has classified, such as one
of a newer torch, is refused too.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from batch_invariant.ops.elementwise import ATEN as ELEMENTWISE

VIEW = "a view or metadata: no element is computed"
FACTORY = "makes a tensor from sizes and numbers"
COPY = "copies, casts or rearranges elements"
INDEXING = "copies elements to or from given places"
EXACT = "one correctly rounded operation an element, or none"
COUNTS = "comparisons, booleans and counts: exact in any order"
SELECTS = "returns elements of the input: exact"
RANDOM = "draws from one random stream: a row's draw depends on its place, its result does not"
WHOLE_BATCH = "reduces over the batch by definition, one after another"
PARAMETERS = "updates parameters, which have no batch axis"
DECOMPOSES = "is made of operators that are dispatched, and so covered, themselves"
SYSTEM = "tests of torch itself, checks and messages"

_HARMLESS = {
    VIEW: """
        _conj _fw_primal _has_same_storage_numel _lazy_clone _local_scalar_dense _make_dual
        _neg_view _nested_compute_contiguous_strides_offsets _reshape_alias _unsafe_view alias
        as_strided ccol_indices col_indices crow_indices dense_dim detach diagonal expand indices
        is_coalesced is_pinned is_same_size is_set_to lift lift_fresh permute resize resize_as
        row_indices select set slice slice_inverse sparse_dim split split_with_sizes squeeze
        sym_constrain_range sym_constrain_range_for_size t transpose unbind unfold unsafe_split
        unsafe_split_with_sizes unsqueeze values view view_as_complex view_as_real _values _indices
        _coalesced _dimI _dimV _nnz coalesce is_leaf result_type size stride sym_size sym_stride
        sym_numel sym_storage_offset q_scale q_zero_point qscheme _fused_sdp_choice
    """,
    FACTORY: """
        _efficientzerotensor _empty_affine_quantized _empty_per_channel_affine_quantized
        _new_zeros_with_same_feature_meta _sparse_compressed_tensor_with_dims
        _sparse_coo_tensor_with_dims _sparse_coo_tensor_with_dims_and_tensors arange
        bartlett_window blackman_window empty empty_like empty_permuted empty_strided eye
        fft_fftfreq fft_rfftfreq from_file full full_like hamming_window hann_window kaiser_window
        linspace logspace new_empty new_empty_strided new_full new_ones new_zeros ones ones_like
        range scalar_tensor sparse_compressed_tensor sparse_coo_tensor tril_indices triu_indices
        zeros zeros_like
    """,
    COPY: """
        _chunk_cat _conj_copy _conj_physical _fw_primal_copy _indices_copy _make_dual_copy
        _neg_view_copy _pin_memory _reshape_alias_copy _reshape_copy _stack _to_copy _values_copy
        alias_copy as_strided_copy as_strided_scatter block_diag cat ccol_indices_copy
        channel_shuffle clone col_indices_copy complex conj_physical constant_pad_nd copy
        crow_indices_copy dequantize detach_copy diag_embed diagonal_backward diagonal_copy
        diagonal_scatter expand_copy fill flip im2col indices_copy lift_fresh_copy narrow_copy
        native_channel_shuffle permute_copy pixel_shuffle pixel_unshuffle reflection_pad1d
        reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d
        replication_pad2d replication_pad3d roll rot90 row_indices_copy select_backward select_copy
        select_scatter slice_backward slice_copy slice_scatter split_copy split_with_sizes_copy
        squeeze_copy stack t_copy to_mkldnn transpose_copy tril triu unbind_copy unfold_copy
        upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
        _upsample_nearest_exact2d _upsample_nearest_exact3d unsqueeze_copy values_copy
        view_as_complex_copy view_as_real_copy view_copy zero
    """,
    INDEXING: """
        _index_put_impl _unsafe_index _unsafe_index_put _unsafe_masked_index embedding gather index
        index_copy index_fill index_put index_select masked_fill masked_scatter
        masked_scatter_backward masked_select nonzero nonzero_static scatter take where
    """,
    EXACT: """
        __lshift__ __rshift__ __ilshift__ __irshift__ _prelu_kernel _prelu_kernel_backward abs add
        bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil
        clamp clamp_max clamp_min copysign deg2rad div floor frexp gcd hardtanh heaviside ldexp lcm
        leaky_relu leaky_relu_backward mul nan_to_num native_dropout_backward neg nextafter rad2deg
        relu round rsub sign signbit sub threshold threshold_backward trunc
    """,
    COUNTS: """
        _int_mm _is_all_true _is_any_true _unique _unique2 all any bucketize count_nonzero eq equal
        ge gt histc isin isinf isnan isneginf isposinf le logical_and logical_not logical_or
        logical_xor lt ne searchsorted unique_consecutive unique_dim unique_dim_consecutive
    """,
    SELECTS: """
        _aminmax _cummax_helper _cummin_helper adaptive_max_pool2d adaptive_max_pool3d amax amin
        aminmax argmin cummax cummin max max_pool2d_with_indices max_pool3d_with_indices min sort
    """,
    RANDOM: """
        _sample_dirichlet _standard_gamma bernoulli binomial cauchy exponential geometric log_normal
        multinomial native_dropout normal normal_functional poisson rand rand_like randint
        randint_like randn randn_like random randperm rrelu_with_noise uniform
    """,
    WHOLE_BATCH: "nll_loss_forward nll_loss_backward",
    PARAMETERS: """
        _amp_foreach_non_finite_check_and_unscale _amp_update_scale _fused_adagrad _fused_adam
        _fused_adamw _fused_sgd
    """,
    DECOMPOSES: """
        _foreach_abs _foreach_acos _foreach_add _foreach_addcdiv _foreach_addcmul _foreach_asin
        _foreach_atan _foreach_ceil _foreach_clamp_max _foreach_clamp_min _foreach_clone
        _foreach_copy _foreach_cos _foreach_cosh _foreach_div _foreach_erf _foreach_erfc
        _foreach_exp _foreach_expm1 _foreach_floor _foreach_frac _foreach_lerp _foreach_lgamma
        _foreach_log _foreach_log10 _foreach_log1p _foreach_log2 _foreach_max _foreach_maximum
        _foreach_minimum _foreach_mm _foreach_mul _foreach_neg _foreach_norm _foreach_pow
        _foreach_powsum _foreach_reciprocal _foreach_round _foreach_rsqrt _foreach_sigmoid
        _foreach_sign _foreach_sin _foreach_sinh _foreach_sqrt _foreach_sub _foreach_tan
        _foreach_tanh _foreach_trunc _foreach_zero _trilinear affine_grid_generator allclose
        binary_cross_entropy_with_logits celu dist floor_divide.Scalar floor_divide_.Scalar
        fmod.Scalar fmod.Scalar_out fmod_.Scalar huber_loss_backward
        log_softmax.int_out mvlgamma polygamma_ pow.Scalar pow.Scalar_out remainder.Scalar
        remainder.Scalar_Tensor remainder.Scalar_out remainder_.Scalar smooth_l1_loss_backward
        soft_margin_loss soft_margin_loss_backward softmax.int_out special_xlog1py.other_scalar
        special_xlog1py.other_scalar_out special_xlog1py.self_scalar
        special_xlog1py.self_scalar_out special_zeta.other_scalar special_zeta.other_scalar_out
        special_zeta.self_scalar special_zeta.self_scalar_out xlogy.OutScalar_Other
        xlogy.OutScalar_Self xlogy.Scalar_Other xlogy.Scalar_Self xlogy_.Scalar_Other
    """,
    SYSTEM: """
        _assert_async _assert_scalar _assert_tensor_metadata _foobar _functional_assert_async
        _functional_assert_scalar _functional_sym_constrain_range
        _functional_sym_constrain_range_for_size _make_dep_token _print
        _test_autograd_multiple_dispatch _test_autograd_multiple_dispatch_view
        _test_autograd_multiple_dispatch_view_copy _test_functorch_fallback
        _test_optional_filled_intlist _test_optional_floatlist _test_optional_intlist
        _test_parallel_materialize _test_warn_in_autograd
    """,
}
HARMLESS: dict[str, str] = {
    name: reason for reason, names in _HARMLESS.items() for name in names.split()
}
"""Why each operator is left alone: by name without overload and trailing underscore, or with."""

_CONVOLUTION = "a convolution adds in an order that depends on shapes and threads"
_SEVERAL = "it adds several elements, in an order that torch does not fix"
_BY_PLACE = (
    "nobody has checked that this device computes an element alike wherever it stands; its backend "
    "covers it or calls it harmless"
)
_BY_SHAPES = (
    "the order of the products is chosen by all sizes, the batch's too; multiply two at a time"
)
_FACTORIZATION = "LAPACK's order depends on sizes and threads"
_OWN_ATTENTION = "call scaled_dot_product_attention, which is covered"
_MIXES_ROWS = "its statistics mix the rows of the batch"
_WHOLE_INPUT_SCALE = "it quantizes by the extremes of the whole batch"
_COMPOSITES = {
    "chain_matmul": _BY_SHAPES,
    "linalg_multi_dot": _BY_SHAPES,
    "_wrapped_quantized_linear_prepacked": _WHOLE_INPUT_SCALE,
    "choose_qparams_optimized": _WHOLE_INPUT_SCALE,
    "fbgemm_linear_fp16_weight": _SEVERAL,
    "fbgemm_linear_fp16_weight_fp32_activation": _SEVERAL,
    "fbgemm_linear_int8_weight": _WHOLE_INPUT_SCALE,
    "fbgemm_linear_int8_weight_fp32_activation": _WHOLE_INPUT_SCALE,
    "quantized_gru_cell": _WHOLE_INPUT_SCALE,
    "quantized_lstm_cell": _WHOLE_INPUT_SCALE,
    "quantized_rnn_relu_cell": _WHOLE_INPUT_SCALE,
    "quantized_rnn_tanh_cell": _WHOLE_INPUT_SCALE,
}
"""Composite operators that covered parts do not make invariant, or that compute by themselves."""

_REASONS = {
    **_COMPOSITES,
    "put": "duplicates are added in the order of timing; use index_put",
    "_native_batch_norm_legit": _MIXES_ROWS,
    "native_batch_norm": _MIXES_ROWS,
    "_batch_norm_with_update": _MIXES_ROWS,
    "cumprod": "it has no fixed order; use exp(cumsum(log(x))) or prod",
    "nansum": "use nan_to_num and sum",
    "trace": "use diagonal and sum",
    "_native_multi_head_attention": "the fused fast path; turn it off with "
    "torch.backends.mha.set_fastpath_enabled(False)",
    "_transformer_encoder_layer_fwd": "the fused fast path; turn it off with "
    "torch.backends.mha.set_fastpath_enabled(False)",
}
_PREFIXES = (
    ("_convolution", _CONVOLUTION),
    ("convolution", _CONVOLUTION),
    ("conv", _CONVOLUTION),
    ("slow_conv", _CONVOLUTION),
    ("_slow_conv", _CONVOLUTION),
    ("mkldnn_conv", _CONVOLUTION),
    ("_fft_", "an FFT adds in an order that depends on its plan"),
    ("linalg_", _FACTORIZATION),
    ("_linalg_", _FACTORIZATION),
    ("cholesky", _FACTORIZATION),
    ("_scaled_dot_product", _OWN_ATTENTION),
)


@dataclass(frozen=True)
class Refusal:
    """Why an overload is refused; `only_floating`: whole numbers and bools may pass."""

    text: str
    only_floating: bool = True


def base_of(name: str) -> str:
    """`aten::add_.Tensor` -> `add`; dunder names stay as they are."""
    base = name.removeprefix("aten::").split(".")[0]
    return base if base.startswith("__") else base.rstrip("_")


Here = Mapping[str, "str | None"]
"""What a backend adds to `HARMLESS` for its device, or takes back with None."""
_NOTHING: Here = MappingProxyType({})


def harmless(name: str, here: Here = _NOTHING) -> str | None:
    """Why an overload may run torch's kernel, or None."""
    short, base = name.removeprefix("aten::"), base_of(name)
    for table in (here, HARMLESS):
        for listed in (short, base):
            if listed in table:
                return table[listed]
    return None


def registered(key: str) -> list[str]:
    """Every aten overload with a kernel registered under a dispatch key."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return sorted(n for n in names if n.startswith("aten::") and _has_schema(n))


def _has_schema(name: str) -> bool:
    """Whether an operator is defined: a vendor may register kernels for names that are not."""
    base, _, overload = name.partition(".")
    try:
        torch._C._dispatch_find_schema_or_throw(base, overload)
    except RuntimeError:
        return False
    return True


@functools.cache
def _is_generated(name: str) -> bool:
    """Generated out= overloads call the functional one through the dispatcher, and copy."""
    base, _, overload = name.removeprefix("aten::").partition(".")
    op: Any = getattr(getattr(torch.ops.aten, base), overload or "default")
    return torch.Tag.generated in op.tags


def aten_overloads(key: str = "CPU") -> list[str]:
    """Every aten overload that runs code of its own on a backend, below autograd."""
    explicit = (
        *registered("CompositeExplicitAutograd"),
        *registered("CompositeExplicitAutogradNonFunctional"),
    )
    implicit = registered("CompositeImplicitAutograd")
    return sorted(
        {
            *registered(key),
            *(n for n in explicit if not _is_generated(n)),
            *(n for n in implicit if base_of(n) in _COMPOSITES),
        }
    )


def reason_against(name: str) -> Refusal:
    """Why an overload that is neither covered nor harmless is refused."""
    base = base_of(name)
    for prefix, reason in _PREFIXES:
        if base.startswith(prefix):
            return Refusal(_REASONS.get(base, reason))
    return Refusal(_REASONS.get(base, _BY_PLACE if base in ELEMENTWISE else _SEVERAL))


@dataclass(frozen=True)
class Coverage:
    """What the mode does with an overload: `kind` is covered, harmless or refused, and why."""

    kind: str
    reason: str


def classify(name: str, covered: Collection[str] = (), here: Here = _NOTHING) -> Coverage:
    """The class of one overload; composites are harmless, since their parts are dispatched."""
    if name in covered:
        return Coverage("covered", "an invariant kernel takes its place")
    if (reason := harmless(name, here)) is not None:
        return Coverage("harmless", reason)
    if name not in aten_overloads():
        return Coverage("harmless", DECOMPOSES)
    return Coverage("refused", reason_against(name).text)


def refused_overloads(
    covered: Collection[str],
    key: str = "CPU",
    here: Here = _NOTHING,
) -> dict[str, Refusal]:
    """The overloads that must raise while the mode is on, given those that are covered."""
    return {
        name: reason_against(name)
        for name in aten_overloads(key)
        if name not in covered and harmless(name, here) is None
    }


_LAYOUTS = ("Sparse", "SparseCsr", "Quantized", "NestedTensor", "Mkldnn")


def layout_keys(key: str) -> list[str]:
    """Dispatch keys of a device's tensors that are not plain ones: their kernels are torch's own.

    torch derives their names from the device's own key; not every device has all of them.
    """
    return [n for n in (f"{kind}{key}" for kind in _LAYOUTS) if torch._C._parse_dispatch_key(n)]


_LAYOUT = Refusal(
    "sparse, quantized, nested and mkldnn tensors have no invariant kernels; convert to a plain "
    "tensor first",
    only_floating=False,
)


def refused_layouts(key: str) -> dict[str, Refusal]:
    """The overloads that must raise for tensors of such a layout."""
    return {name: _LAYOUT for name in registered(key) if harmless(name) is None}
