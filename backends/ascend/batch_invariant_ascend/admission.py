"""Kernels that others wrote are compared with themselves on this device before they are used.

What a vendor calls batch-invariant is taken at its word only where a row alone, in company and at
another place has the same bits. This cannot prove a promise; it refuses what visibly breaks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

ROWS = 70
_CUTS = ((0, 1), (37, 38), (69, 70), (0, 2), (5, 12), (0, 33), (3, 67))
"""Rows first..last of the whole that are computed again as a batch of their own."""


def values(*shape: int, dtype: torch.dtype, cancelling: bool = True) -> torch.Tensor:
    """Seeded values on the CPU; with a huge pair in each row that cancels, so that order shows."""
    generator = torch.Generator().manual_seed(20260)
    x = torch.randint(-(2**10), 2**10, shape, generator=generator).float() / 2**8
    if cancelling and shape[-1] > 8:
        huge = 2.0**11 if dtype == torch.float16 else 2.0**18
        at = torch.randint(0, shape[-1] // 2, (*shape[:-1], 1), generator=generator)
        x = x.scatter(-1, at, huge).scatter(-1, at + shape[-1] // 2, -huge)
    return x.to(dtype)


def fractions(n: int) -> torch.Tensor:
    """Seeded fp32 values within (0, 1), by operators that the mode never refuses."""
    generator = torch.Generator().manual_seed(n)
    return torch.randint(1, 2**16, (n,), generator=generator).float() / 2**16


def rows_agree(fn: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> str | None:
    """None if the rows of fn(x) have the same bits in every cut of x; else which differ."""
    whole = fn(x).cpu()
    for first, last in _CUTS:
        part = fn(x[first:last].contiguous()).cpu()
        if not same_bits(part, whole[first:last]):
            return f"rows {first} to {last} of {len(x)} {x.dtype} rows differ when computed alone"
    return None


def places_agree(fn: Callable[..., Any], *arguments: torch.Tensor) -> str | None:
    """None if elements have the same bits wherever they stand; arguments are 1-D, of one size."""
    whole = fn(*arguments).cpu()
    n = arguments[0].numel()
    for begin, end in ((1, n), (n - 1, n), (7, 8), (3, n - 2), (n // 2, n)):
        # Both a view that begins off a boundary and a copy that does not.
        for cut in (lambda t: t, lambda t: t.clone()):
            part = fn(*(cut(a[begin:end]) for a in arguments)).cpu()
            if not same_bits(part, whole[begin:end]):
                return f"elements {begin} to {end} of {n} {arguments[0].dtype} differ when cut out"
    return None


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two CPU tensors have the same shape and bits."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    view = integers.get(a.element_size(), torch.uint8)
    return torch.equal(a.contiguous().view(view), b.contiguous().view(view))


def dtypes() -> Iterator[torch.dtype]:
    """The dtypes in which a part must pass."""
    yield from (torch.float32, torch.bfloat16, torch.float16)
