"""Elementwise functions on CUDA: torch's own kernels, which compute every element alone.

ATen instantiates one scalar functor for the vectorised, the tail and the strided loop of a kernel,
so an element's bits do not depend on where it stands; `tests/test_gpu_rows.py` checks it.
"""

from __future__ import annotations

from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.errors import OpNotSupported
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.order import undeclared
from batch_invariant.stock import stock


def _kernel(overload: str) -> Kernel:
    def fn(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.is_complex():
            raise OpNotSupported(
                f"{overload} on CUDA takes real numbers, got {self.dtype}: torch's kernels for "
                "complex ones have not been checked; split real and imaginary parts"
            )
        return stock(overload, "CUDA")(self, *args, **kwargs)

    return Kernel(
        fn=fn,
        guarantee=Guarantee.PARALLEL,
        dtypes=frozenset((*FLOATS, torch.float64)),
        order=undeclared("nothing is added across elements"),
    )


KERNELS = {
    name: _kernel(name) for name in "exp log rsqrt sin cos tanh erf sigmoid silu gelu".split()
} | {"pow": _kernel("pow.Tensor_Scalar")}
