"""What torch users select: the TPU kernels behind the operators of batch-invariant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch

from batch_invariant.backend import API_VERSION, Availability, Backend, Evidence, Gap, Kernel
from batch_invariant.ops import CONTRACTS
from batch_invariant_tpu import route
from batch_invariant_tpu.requirements import jax_problem, require_jax

FAMILIES = (
    "matmul",
    "reduce",
    "softmax",
    "norm",
    "scan",
    "attention",
    "embedding",
    "select",
    "elementwise",
)
"""Modules with a `KERNELS` table, named as in core."""


class TpuBackend(Backend):
    """Kernels for tensors on the device `tpu`, and for checks on CPU tensors by `to_native`."""

    name = "tpu"
    device_type = "tpu"
    api_version = API_VERSION

    def probe(self) -> Availability:
        """Ok where jax is installed; the reason says on which route the kernels run."""
        if (problem := jax_problem()) is not None:
            return Availability(False, *problem)
        if (refusal := route.torchax_problem()) is not None:
            return Availability(False, refusal, "use another process for torchax")
        return Availability(True, route.describe())

    def kernels(self) -> Mapping[str, Kernel]:
        """The kernels of every family; BackendUnavailable without a recent jax."""
        require_jax()
        return _kernels()

    def aten_overrides(self) -> Mapping[str, Callable[..., Any]]:
        """The elementwise functions; XLA's own may be fused with what stands beside them."""
        from batch_invariant_tpu.elementwise import ATEN

        kernels = self.kernels()

        def of(name: str) -> Callable[..., Any]:
            return lambda keyset, *args, **keywords: kernels[name].fn(*args, **keywords)

        return {overload: of(name) for overload, name in ATEN.items()}

    def gaps(self) -> Sequence[Gap]:
        """What is not written for TPUs."""
        return (
            Gap(
                dtype=torch.float16,
                check="kernel",
                reason="TPUs have no float16 arithmetic; use bfloat16",
            ),
            Gap(
                check="restoration",
                reason="importing jax sets TF_CPP_MIN_LOG_LEVEL, TPU_SKIP_MDS_QUERY and, beside "
                "libtpu, TPU_LIBRARY_PATH, which it and libtpu read later; they stay",
            ),
            *(
                Gap(op=name, check="kernel", reason="no kernel for TPUs yet")
                for name in CONTRACTS
                if name not in _kernels()
            ),
        )

    def evidence(self, full: bool) -> Evidence | None:
        """The kernels in the interpreter's hard modes, and what the TPU compiler makes of them."""
        from batch_invariant_tpu.evidence import gather

        return gather(full)

    def to_native(self, tensor: torch.Tensor) -> Any:
        """A CPU tensor as a `jax.Array`, copied: torch may change it afterwards."""
        from batch_invariant_tpu.exchange import to_jax

        return to_jax(tensor)

    def to_torch(self, array: Any) -> torch.Tensor:
        """A `jax.Array` as a CPU tensor."""
        from batch_invariant_tpu.exchange import to_torch

        return to_torch(array)


@cache
def _kernels() -> dict[str, Kernel]:
    found: dict[str, Kernel] = {}
    for family in FAMILIES:
        found |= import_module(f"batch_invariant_tpu.{family}").KERNELS
    return found
