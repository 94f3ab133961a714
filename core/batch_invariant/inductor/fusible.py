"""What Inductor may generate code for: what is exact, so that no fusion, vector or tail can matter.

A generated loop computes an element with a vector instruction, a scalar one, in the middle of
other arithmetic or alone, depending on shapes. Operations that are correctly rounded by IEEE, or
do not round, have the same bits in all of these, given that products are not contracted into FMA
and that low precision is rounded after every operation (`compile_fx` sets both).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from batch_invariant import coverage
from batch_invariant.inductor.rules import Device
from batch_invariant.ops.elementwise import ATEN as ELEMENTWISE

ROUNDED_ONCE = frozenset(
    """add sub rsub mul div neg abs floor ceil trunc sign signbit bitwise_and bitwise_or bitwise_xor
    bitwise_not bitwise_left_shift bitwise_right_shift""".split()
)
"""Arithmetic with one rounding or none, by name without overload."""

READ_ONLY = frozenset(
    """embedding gather index index_select masked_fill masked_select nonzero nonzero_static take
    where _unsafe_index _unsafe_masked_index""".split()
)
"""Indexing that copies from given places; writing to places is left to one kernel in order."""

_WHOLE = (
    coverage.VIEW,
    coverage.FACTORY,
    coverage.COPY,
    coverage.COUNTS,
    coverage.RANDOM,
    coverage.SYSTEM,
)
"""Classes of harmless operators that are harmless however they are lowered."""

LOOP_OPS = frozenset(
    """
    abs add and_ argreduce bitwise_and bitwise_left_shift bitwise_not bitwise_or
    bitwise_right_shift bitwise_xor ceil check_bounds constant eq floor floordiv ge get_index gt
    halide_clamp identity index_expr indirect_indexing invert isinf isnan le load load_seed
    logical_and logical_not logical_or logical_xor lshift lt masked masked_subblock maximum
    minimum mod mul ne neg or_ output placeholder reduction remainder rshift set_indirect
    sign signbit store store_reduction sub to_dtype to_dtype_bitcast truediv trunc
    truncdiv trunc_to_int ceil_to_int floor_to_int where xor int_truediv bucketize
    device_assert_async
    """.split()
)
"""Operations in the body of a generated loop that are exact. Extremes are of indices alone, since
the aten operators that take extremes of values are not fusible."""


def always_fused(func: torch._ops.OpOverload, reason: str | None) -> bool:
    """Whether Inductor may lower every call of an overload that is harmless for this reason."""
    return coverage.base_of(func.name()) in READ_ONLY or reason in _WHOLE


def may_fuse(
    func: torch._ops.OpOverload,
    reason: str | None,
    device: Device,
    values: Sequence[Any],
    eager_bits: bool = False,
) -> bool:
    """Whether Inductor may lower this call itself.

    reason: why the overload is harmless, or None; values: all arguments of the call, in order;
    eager_bits: whether it must have the bits of eager code beside being invariant.
    """
    base = coverage.base_of(func.name())
    # A GPU's elementwise functions are those of another library in generated code, and division
    # by a number is a product with a reciprocal that is rounded otherwise than torch's.
    called = eager_bits and device.elementwise
    if base in ROUNDED_ONCE:
        if called and base == "div":
            return False
        return _real(values) and not _scaled(func, values) and not _modes(func)
    if func.name().removeprefix("aten::") in device.overridden:
        return False
    if always_fused(func, reason):
        return True
    # What a backend calls harmless, and core does not: one thread of a GPU computes an element, in
    # generated code as well.
    by_backend = reason is not None and coverage.harmless(func.name()) is None
    return by_backend and base in ELEMENTWISE and _real(values) and not called


def _real(values: Sequence[Any]) -> bool:
    return not any(
        isinstance(v, complex) or (isinstance(v, torch.Tensor) and v.is_complex()) for v in values
    )


def _scaled(func: torch._ops.OpOverload, values: Sequence[Any]) -> bool:
    """Whether the call multiplies by alpha before it adds."""
    names = [a.name for a in func._schema.arguments]
    return "alpha" in names and len(values) == len(names) and values[names.index("alpha")] != 1


def _modes(func: torch._ops.OpOverload) -> bool:
    """Whether the overload of a division or rounding does more than that."""
    return any(a.name in ("rounding_mode", "decimals") for a in func._schema.arguments)
