"""Elementwise functions on Ascend: torch_npu's own kernels where they pass a comparison.

Nothing is added across elements, and yet a kernel may compute the end of a tensor, or one that
begins off a boundary, with other instructions. So each is compared with itself at other places, on
this device and in every dtype, before it may run while the mode is on. exp and log are composed
where they fail.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.guarantee import Guarantee
from batch_invariant.order import undeclared
from batch_invariant.stock import stock
from batch_invariant_ascend import admission, explog
from batch_invariant_ascend.dtypes import DTYPES, check_dtype
from batch_invariant_ascend.tiers import Tier

_SIZE = 4099
_ONE = """
    acos acosh asin asinh atan atanh cos cosh digamma elu erf erfc erfinv exp exp2 expm1 frac gelu
    hardshrink hardsigmoid hardswish lgamma log log10 log1p log2 logit mish reciprocal rsqrt sgn
    sigmoid silu sin sinc sinh softplus softshrink sqrt tan tanh
""".split()
_TWO = """
    atan2 floor_divide fmax fmin fmod.Tensor gelu_backward hypot logaddexp logaddexp2 maximum
    minimum pow.Tensor_Tensor remainder.Tensor sigmoid_backward silu_backward tanh_backward
    xlogy.Tensor
""".split()
_THREE = "addcdiv addcmul lerp.Tensor".split()
_MORE: dict[str, tuple[Any, ...]] = {
    "pow.Tensor_Scalar": (1.7,),
    "fmod.Scalar": (0.7,),
    "remainder.Scalar": (0.7,),
    "lerp.Scalar": (0.3,),
}
"""Overloads that take numbers too; those of one tensor, but for lerp."""

PLACE = "torch_npu's own kernel, which gave an element the same bits at other places on this device"


@cache
def varies(overload: str) -> str | None:
    """Why an overload's own kernel may not run: where it differs, or how it fails."""
    try:
        fn = stock(overload, "PrivateUse1")
    except RuntimeError:
        return "torch_npu has no kernel for it"
    count = 1 + (overload in _TWO or overload == "lerp.Scalar") + 2 * (overload in _THREE)
    numbers = _MORE.get(overload, ())
    for dtype in admission.dtypes():
        # Within (0, 1), where every one of the functions has a value.
        tensors = [admission.fractions(_SIZE + i).to(dtype)[i:].npu() for i in range(count)]
        try:
            found = admission.places_agree(lambda *t: fn(*t, *numbers), *tensors)
        except (RuntimeError, NotImplementedError) as error:
            # A dtype that the kernel refuses gives nobody a wrong bit.
            if "not implemented" in str(error).lower() or "not support" in str(error).lower():
                continue
            found = f"{dtype}: {str(error).splitlines()[0]}"
        if found is not None:
            return found
    return None


def harmless() -> dict[str, str]:
    """The operators that passed, by name: all of their overloads that are measured did."""
    found: dict[str, bool] = {}
    for overload in (*_ONE, *_TWO, *_THREE, *_MORE):
        name = overload.split(".")[0]
        found[name] = found.get(name, True) and varies(overload) is None
    return {name: PLACE for name, good in found.items() if good}


_KERNELS = {name: name for name in "exp log rsqrt sin cos tanh erf sigmoid silu gelu".split()} | {
    "pow": "pow.Tensor_Scalar"
}
_COMPOSED = {"exp": explog.exp, "log": explog.log}


def _own(name: str, overload: str) -> Callable[..., Any]:
    def fn(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.is_floating_point() or self.is_complex():
            check_dtype(name, self)  # others were not compared
        return stock(overload, "PrivateUse1")(self, *args, **kwargs)

    return fn


def _composed(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def fn(self: torch.Tensor) -> torch.Tensor:
        check_dtype(name, self)
        return _COMPOSED[name](self.float()).to(self.dtype)

    return fn


def kernels() -> dict[str, Kernel]:
    """Those that passed, and exp and log in any case."""
    found = {}
    for name, overload in _KERNELS.items():
        reason = varies(overload)
        if reason is not None and name not in _COMPOSED:
            continue
        found[name] = Kernel(
            fn=_own(name, overload) if reason is None else _composed(name),
            guarantee=Guarantee.BATCH,
            dtypes=DTYPES,
            order=undeclared("nothing is added across elements"),
            source="torch_npu, measured here" if reason is None else Tier.D.value,
            better=() if reason is None else (f"torch_npu's own {name}: {reason}",),
        )
    return found


def gaps() -> dict[str, str]:
    """The functions without a kernel, and why."""
    return {
        name: f"torch_npu's own kernel is not batch-invariant on this device: {reason}"
        for name, overload in _KERNELS.items()
        if name not in _COMPOSED and (reason := varies(overload)) is not None
    }
