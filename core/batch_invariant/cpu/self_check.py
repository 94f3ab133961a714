"""What depends on the machine, checked when the backend is first used: a wrong guess fails closed.

The order of bf16 products is that of this CPU's matrix instructions, and elementwise functions run
torch's own vector code. Both are compared here with themselves, one row alone and in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from batch_invariant.backend import Kernel
from batch_invariant.ops.bits import mismatch
from batch_invariant.ops.contract import Data, Draw

_ELEMENTWISE = ("silu", "sigmoid", "gelu", "exp", "tanh", "rsqrt")


def find_variance(kernels: Mapping[str, Kernel]) -> str | None:
    """None if rows keep their bits here, else what changed."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        draw = Draw(dtype, Data.CANCELLING, torch.Generator().manual_seed(1))
        x, w = draw.rows(33, 1056), draw.shared(80, 1056)
        linear = kernels["linear"].fn
        whole = linear(x, w, None)
        for rows in (slice(0, 1), slice(5, 8), slice(16, 33)):
            if (found := mismatch(whole[rows], linear(x[rows].clone(), w, None))) is not None:
                return f"self-check of linear in {dtype} failed: rows {rows} changed in {found}"
        values = torch.randn(40_001, generator=draw.generator).to(dtype)
        for name in _ELEMENTWISE:
            fn = kernels[name].fn
            together = fn(values)
            for part in (slice(0, 1), slice(3, 70), slice(39_990, 40_001)):
                if (found := mismatch(together[part], fn(values[part].clone()))) is not None:
                    return f"self-check of {name} in {dtype} failed: elements changed in {found}"
    return None
