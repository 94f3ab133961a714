"""torch_npu's products: npu_linear, npu_bmmV2, unquantised npu_grouped_matmul, and formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from batch_invariant.errors import OpNotSupported
from batch_invariant_ascend.dtypes import check_dtype
from batch_invariant_ascend.product import FRACTAL_NZ, product

Tensor = torch.Tensor
_ops = torch.ops.batch_invariant


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """npu_linear: input @ weight.T + bias, rounded once."""
    out: Tensor = _ops.linear.default(input, weight, bias)
    return out


def linear_backward(grad: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """npu_linear_backward: gradients of input and weight."""
    rows, x = grad.reshape(-1, grad.size(-1)), input.reshape(-1, input.size(-1))
    g_input = _ops.mm.default(rows, weight).view(input.shape)
    return g_input, _ops.mm.default(rows.mT, x)


def bmm_v2(input: Tensor, mat2: Tensor, output_sizes: Sequence[int]) -> Tensor:
    """npu_bmmV2: the product of two batches of matrices; output_sizes reshapes it, if given."""
    from batch_invariant.ops.matmul import matmul

    out = matmul(input, mat2)
    return out.reshape(*output_sizes) if output_sizes else out


def grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    group_list: Any = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    output_dtype: Any = None,
    **rest: Any,
) -> list[Tensor]:
    """npu_grouped_matmul: x[i] @ weight[i] + bias[i], or groups of rows of one x by `group_list`.

    Each group is a product of its own, so the rows of one expert see no others. Quantised operands,
    activations and group types other than rows (0) are refused.
    """
    name = "npu_grouped_matmul"
    given = sorted(k for k, v in rest.items() if v is not None and not (v == [] or v == ()))
    if given or act_type or output_dtype is not None:
        what = ", ".join([*given, *(["act_type"] if act_type else [])] or ["output_dtype"])
        raise OpNotSupported(
            f"{name} with {what} has no invariant kernel on Ascend; use weights in bf16 or fp16 "
            "and apply the activation apart"
        )
    check_dtype(name, *x, *weight)
    biases = list(bias or [])
    if len(x) > 1 and len(x) == len(weight):
        parts = [
            _with_bias(a, w, biases[i] if biases else None)
            for i, (a, w) in enumerate(zip(x, weight, strict=True))
        ]
        return [torch.cat(parts)] if split_item in (2, 3) else parts
    if len(x) != 1 or group_list is None or group_type not in (0, None):
        raise OpNotSupported(
            f"{name} of {len(x)} inputs and {len(weight)} weights with group_type={group_type}: "
            "one input cut in rows by group_list (group_type=0), or as many inputs as weights"
        )
    matrices = list(weight[0].unbind(0)) if len(weight) == 1 else list(weight)
    ends = _ends(group_list, group_list_type or 0, len(matrices))
    (rows,) = x
    begin, parts = 0, []
    for i, end in enumerate(ends):
        one = None if not biases else (biases[0][i] if len(biases) == 1 else biases[i])
        parts.append(_with_bias(rows[begin:end], matrices[i], one))
        begin = end
    if begin < len(rows):  # torch_npu leaves rows of no group undefined
        parts.append(rows.new_zeros(len(rows) - begin, matrices[0].size(-1)))
    return [torch.cat(parts)] if split_item in (2, 3) else parts


def _ends(group_list: Any, kind: int, groups: int) -> list[int]:
    """Where each group of rows ends: group_list_type 0 lists the ends, 1 the sizes."""
    values = [
        int(v) for v in (group_list.tolist() if isinstance(group_list, Tensor) else group_list)
    ]
    if kind not in (0, 1) or len(values) != groups:
        raise OpNotSupported(
            f"npu_grouped_matmul: group_list_type={kind} with {len(values)} entries for {groups} "
            "weights; 0 (ends) or 1 (sizes), one entry for each weight"
        )
    if kind == 1:
        total, ends = 0, []
        for size in values:
            total += size
            ends.append(total)
        return ends
    return values


def _with_bias(a: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return product(a, w, a.dtype)
    return (product(a, w, torch.float32) + bias.float()).to(a.dtype)


def _refuse_nz(wanted: int) -> None:
    if int(wanted) == FRACTAL_NZ:
        raise OpNotSupported(
            "npu_format_cast to FRACTAL_NZ (29) is off while batch invariance is on: products of "
            "such weights take another kernel. Set VLLM_ASCEND_ENABLE_NZ=0, or weight_nz_mode=0 in "
            "newer vllm-ascend"
        )


def format_cast(original: Any) -> Any:
    """npu_format_cast and its variants: FRACTAL_NZ is refused, everything else passes."""

    def cast(input: Tensor, wanted: Any, **keywords: Any) -> Tensor:
        if isinstance(wanted, Tensor):
            from batch_invariant_ascend.product import check_format

            check_format(wanted)
        else:
            _refuse_nz(wanted)
        out: Tensor = original(input, wanted, **keywords)
        return out

    return cast


FORMATS = (
    "npu::npu_format_cast",
    "npu::npu_format_cast.Tensor",
    "npu::npu_format_cast_",
    "npu::npu_format_cast_.acl_format",
)
OVERRIDES = {
    "npu::npu_linear": linear,
    "npu::npu_linear_backward": linear_backward,
    "npu::npu_bmmV2": bmm_v2,
    "npu::npu_grouped_matmul": grouped_matmul,
    "npu::npu_grouped_matmul.List": grouped_matmul,
}
"""By the name of the operator."""
