"""amax, amin, aminmax, max and min on CUDA: torch's kernels, with +0 for either zero.

They return an element, so they are exact but for one thing: where +0 and -0 are both extreme, the
one that is met first wins, and that follows the schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batch_invariant.stock import stock

_OVERLOADS = """
    amax amax.out amin amin.out aminmax aminmax.out max max.dim max.dim_max max.unary_out min
    min.dim min.dim_min min.unary_out
""".split()


def overrides() -> dict[str, Callable[..., Any]]:
    """The aten overloads by name; each callable takes the keyset first."""
    return {
        name: _positive_zero(name)
        for name in _OVERLOADS
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA")
    }


def _positive_zero(name: str) -> Callable[..., Any]:
    kernel = stock(name, "CUDA")
    add = stock("add_.Tensor", "CUDA")

    def select(_keyset: Any, *args: Any, **kwargs: Any) -> Any:
        found = kernel(*args, **kwargs)
        for extreme in found if isinstance(found, (tuple, list)) else (found,):
            if extreme.is_floating_point():
                add(extreme, torch.zeros((), dtype=extreme.dtype))
        return found

    return select
