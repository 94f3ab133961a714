"""The reference backend: the embedded default, and the readable definition of every operator.

It needs nothing beyond torch: the native kernels are compiled when the package is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from batch_invariant.backend import API_VERSION, Availability, Backend, Kernel
from batch_invariant.cpu import native


class CpuBackend(Backend):
    """Kernels for CPU tensors, in fp32, bf16, fp16 and float64."""

    name = "cpu"
    device_type = "cpu"
    api_version = API_VERSION

    def probe(self) -> Availability:
        """Ok if the native library loads here and its results pass the self-check."""
        if (reason := native.availability()) is not None:
            return Availability(False, reason)
        if (reason := _checked()) is not None:
            return Availability(False, reason, "please report this CPU and torch version")
        return Availability(True)

    def kernels(self) -> Mapping[str, Kernel]:
        """Every operator of the contracts."""
        return _kernels()

    def aten_overrides(self) -> Mapping[str, Callable[..., Any]]:
        """Elementwise functions, which depend on position here, and accumulating index_put."""
        from batch_invariant.cpu import elementwise, indexing

        return {**elementwise.overrides(), **indexing.overrides()}

    def aten_harmless(self) -> Mapping[str, str | None]:
        """Scatters, selections and losses, which run in order on a CPU."""
        from batch_invariant.cpu.harmless import HARMLESS

        return HARMLESS


@cache
def _kernels() -> dict[str, Kernel]:
    from batch_invariant.cpu import (
        attention,
        elementwise,
        embedding,
        grouped,
        matmul,
        norm,
        reduce,
        sample,
        scan,
        select,
        softmax,
        varlen_attention,
    )

    families = (
        *(matmul, grouped, softmax, reduce, scan, norm, attention, varlen_attention),
        *(embedding, select, elementwise, sample),
    )
    return {name: kernel for family in families for name, kernel in family.KERNELS.items()}


@cache
def _checked() -> str | None:
    from batch_invariant.cpu.self_check import find_variance

    return find_variance(_kernels())
