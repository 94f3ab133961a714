"""A function of jax arrays as a kernel of an operator's contract."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.errors import OpNotSupported
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops import CONTRACTS
from batch_invariant.order import Order
from batch_invariant_tpu import torchtpu
from batch_invariant_tpu.exchange import DTYPES, dtype_of, interpreted
from batch_invariant_tpu.room import make_room


def adapted(
    op: str,
    fn: Callable[..., Any],
    order: Order | Mapping[torch.dtype, Order],
    guarantee: Guarantee = Guarantee.BATCH,
    indices: tuple[int, ...] = (),
) -> Kernel:
    """A kernel that checks the call as the contract's shape function does, then calls `fn`.

    fn: takes the arguments of the schema with jax arrays for tensors, and `how` (interpret), and
        returns arrays of the contract's shapes and dtypes.
    indices: places of arguments that are indices, not values.
    """

    @functools.wraps(fn)
    def kernel(*args: Any, **keywords: Any) -> Any:
        _checked(op, args, keywords, indices)
        if any(isinstance(value, torch.Tensor) for value in args):
            return torchtpu.run(op, fn, args, keywords)
        _in_range(op, args, indices)
        how = interpreted()
        if how:
            make_room()
        return fn(*args, **keywords, how=how)

    return Kernel(
        fn=kernel,
        guarantee=guarantee,
        dtypes=frozenset(DTYPES),
        order=order,
        supports=functools.partial(_supports, op),
    )


def _in_range(op: str, args: tuple[Any, ...], indices: tuple[int, ...]) -> None:
    """Raises IndexError for an index beyond the rows of the first argument."""
    for place in indices:
        if args[place].size:
            least, most = int(args[place].min()), int(args[place].max())
            if least < 0 or most >= args[0].shape[0]:
                raise IndexError(
                    f"{op}: index {least if least < 0 else most} is out of range for a table of "
                    f"{args[0].shape[0]} rows"
                )


def _supports(op: str, *args: Any, **keywords: Any) -> str | None:
    for value in (*args, *keywords.values()):
        if isinstance(value, torch.dtype) and value not in DTYPES:
            return f"{op} on TPU returns float32 or bfloat16; asked for {value}"
    return None


def _checked(
    op: str, args: tuple[Any, ...], keywords: dict[str, Any], indices: tuple[int, ...]
) -> None:
    """Raises what the contract's shape function raises, or `OpNotSupported` for a dtype."""
    meta = [_meta(value) for value in args]
    values = [m for place, m in enumerate(meta) if place not in indices]
    floats = [m.dtype for m in values if isinstance(m, torch.Tensor) and m.dtype != torch.bool]
    if strange := [str(dtype) for dtype in floats if dtype not in DTYPES]:
        raise OpNotSupported(f"{op} on TPU takes float32 and bfloat16; got {', '.join(strange)}")
    CONTRACTS[op].fake(*meta, **keywords)
    if (reason := _supports(op, *args, **keywords)) is not None:
        raise OpNotSupported(reason)


def _meta(value: Any) -> Any:
    """A tensor without values, of the shape and dtype of an array; anything else as it is."""
    if not hasattr(value, "shape"):
        return value
    dtype = value.dtype
    if not isinstance(dtype, torch.dtype):
        dtype = getattr(torch, "bool" if str(dtype) == "bool" else str(dtype))
    return torch.empty(tuple(value.shape), dtype=dtype, device="meta")


def out_dtype(dtype: torch.dtype | None) -> Any:
    """jax's dtype for a requested one; None stays None, the input's."""
    return None if dtype is None else dtype_of(dtype)
