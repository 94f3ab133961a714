"""Every operator of torch_npu and vllm-ascend in the mode: replaced, left alone, or refused.

The namespaces are searched as they are found at run time. What is neither replaced nor known to be
harmless is refused by core: most are fused products, norms and quantisations, and one of a newer
torch_npu that nobody has looked at is refused too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from batch_invariant.errors import OpNotSupported
from batch_invariant_ascend import admission, npu_attention, npu_matmul, npu_norm

_COPIES = """
    _npu_dtype_cast _npu_dtype_cast_backward copy_memory_ empty_with_format
    empty_with_swapped_memory get_npu_format get_storage_size npu_alloc_float_status
    npu_broadcast npu_change_data_ptr npu_clear_float_status npu_confusion_transpose
    npu_confusion_transpose_backward npu_dtype_cast npu_dtype_cast_ npu_dtype_cast_backward
    npu_gather_pa_kv_cache npu_gather_pa_kv_cache_functional
    npu_get_float_status npu_indexing npu_masked_fill_range npu_one_hot npu_pad npu_prefetch
    npu_reshape npu_scatter npu_scatter_list npu_scatter_list_ npu_scatter_nd_update
    npu_scatter_nd_update_ npu_scatter_pa_cache npu_scatter_pa_kv_cache
    npu_scatter_pa_kv_cache_functional npu_slice npu_stride_copy npu_transpose npu_view_copy one_
    scatter_update scatter_update_ unsafe_empty_with_format
    _npu_fused_infer_attention_score_get_max_workspace
    _npu_fused_infer_attention_score_infer_output
    _npu_fused_infer_attention_score_v2_get_max_workspace
    _npu_fused_infer_attention_score_v2_infer_output
    npu_moe_compute_expert_tokens npu_moe_re_routing npu_moe_token_permute
""".split()
"""Copies, casts, places, sizes: nothing is added across elements."""

_HALVES = ("npu_swiglu", "npu_geglu")
_ONE = ("fast_gelu", "npu_fast_gelu", "npu_gelu", "npu_mish", "npu_silu")
_ROTARY = ("npu_rotary_mul",)

_COLLECTIVE = (
    "it fuses a product with a collective, whose order of additions belongs to neither; turn the "
    "fusion off in the engine (vllm-ascend: VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE=0)"
)
_ATTENTION = "call npu_fused_infer_attention_score or scaled_dot_product_attention instead"
REFUSED = dict.fromkeys(
    """
    npu_mm_all_reduce_base npu_mm_reduce_scatter_base npu_all_gather_base_mm
    npu_quant_mm_reduce_scatter npu_all_gather_quant_mm npu_alltoallv_gmm npu_gmm_alltoallv
    npu_all_to_all_matmul npu_matmul_all_to_all
    """.split(),
    _COLLECTIVE,
) | dict.fromkeys(
    "npu_prompt_flash_attention npu_incre_flash_attention npu_fusion_attention".split(),
    _ATTENTION,
)
"""Reasons that help more than the general one, by name without overload."""


def overrides() -> dict[str, Callable[..., Any] | None]:
    """By qualified name; None where an operator's own kernel keeps the promise."""
    found: dict[str, Callable[..., Any] | None] = {}
    for name in registered():
        base = name.split("::")[1].split(".")[0]
        if base in _COPIES or (base in (*_HALVES, *_ONE, *_ROTARY) and varies(base) is None):
            found[name] = None
        elif base in REFUSED:
            found[name] = _refusal(name, REFUSED[base])
    for name in npu_matmul.FORMATS:
        if name in registered():
            found[name] = npu_matmul.format_cast(_original(name))
    for table in (npu_norm.OVERRIDES, npu_matmul.OVERRIDES, npu_attention.OVERRIDES):
        found |= {name: fn for name, fn in table.items() if name in registered()}
    # Chosen now, not at the first call: the tiers compare kernels that are about to be replaced.
    for version in ("", "_v2"):
        if f"npu::npu_fused_infer_attention_score{version}" in found:
            npu_attention.choice(version)
    return found


@cache
def registered() -> frozenset[str]:
    """The vendor's operators with a kernel for NPU tensors."""
    from batch_invariant_ascend import AscendBackend

    names = torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1")
    return frozenset(n for n in names if n.split("::")[0] in AscendBackend.vendor_namespaces)


@cache
def _original(name: str) -> Callable[..., Any]:
    """torch_npu's own kernel, as it was before anything was replaced."""
    kernel = torch.library.get_kernel(name, "PrivateUse1")
    keyset = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
    return lambda *args, **kwargs: kernel.call_boxed(keyset, *args, **kwargs)


@cache
def varies(base: str) -> str | None:
    """Why a fused elementwise operator may not run: where it differs on this device."""
    fn = _original(f"npu::{base}")
    for dtype in admission.dtypes():
        x = admission.values(admission.ROWS, 1536, dtype=dtype, cancelling=False).npu()
        try:
            found = admission.rows_agree(_on_rows(base, fn, dtype), x)
        except RuntimeError as error:
            found = f"{dtype}: {str(error).splitlines()[0]}"
        if found is not None:
            return found
    return None


def _on_rows(base: str, fn: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    if base not in _ROTARY:
        return fn
    angles = admission.values(1, 1, 1, 128, dtype=dtype, cancelling=False).npu()
    return lambda x: fn(x.view(len(x), 12, 1, 128), angles, angles)


def _refusal(name: str, reason: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OpNotSupported(f"{name} has no batch-invariant kernel: {reason}")

    return refuse
