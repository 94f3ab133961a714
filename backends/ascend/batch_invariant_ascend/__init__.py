"""The Ascend backend of batch-invariant: kernels for NPU tensors, each from the best tier there is.

Importing it imports neither torch_npu nor Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from batch_invariant.backend import API_VERSION, Availability, Backend, Gap, Kernel
from batch_invariant_ascend import installation

_FAMILIES = (
    *("matmul", "softmax", "reduce", "scan", "norm"),
    *("attention", "embedding", "select", "elementwise"),
)

NOT_WRITTEN = ("grouped_mm", "attention", "sample")


class AscendBackend(Backend):
    """Kernels for NPU tensors in fp32, bf16 and fp16, on Atlas A2 and A3."""

    name = "ascend"
    device_type = "npu"
    api_version = API_VERSION
    vendor_namespaces = ("npu", "atb", "_C_ascend")
    """Of torch_npu, of its ATB operators, and of vllm-ascend's custom fused operators."""

    def __init__(self) -> None:
        self._kernels: dict[str, Kernel] | None = None
        self._switches: Any = None

    def probe(self) -> Availability:
        """Ok with torch_npu for this torch, CANN, and an NPU that is no 310P, before HCCL starts.

        Imports nothing.
        """
        return installation.availability()

    def kernels(self) -> Mapping[str, Kernel]:
        """Every operator that a tier covers; tiers are chosen, and measured, at the first call."""
        from batch_invariant_ascend import switches

        if self._kernels is None:
            switches.torch_npu()
            with switches.held_level_3():
                self._kernels = {
                    name: kernel
                    for family in _FAMILIES
                    for name, kernel in import_module(f"{__name__}.{family}").kernels().items()
                }
        return self._kernels

    def gaps(self) -> Sequence[Gap]:
        """Functions whose kernels depend on the place of an element here, and what is missing."""
        from batch_invariant_ascend import elementwise

        return (
            *(Gap(op=n, check="kernel", reason=why) for n, why in elementwise.gaps().items()),
            *(Gap(op=n, check="kernel", reason="no kernel for Ascend yet") for n in NOT_WRITTEN),
        )

    def notes(self) -> Sequence[str]:
        """The tier of the fused attention that engines call by name, and what every call takes."""
        from batch_invariant_ascend import npu_attention

        return npu_attention.notes()

    def aten_overrides(self) -> Mapping[str, Callable[..., Any]]:
        """Operators that torch_npu has kernels of its own for."""
        from batch_invariant_ascend import aten

        return aten.overrides()

    def aten_harmless(self) -> Mapping[str, str | None]:
        """Elementwise kernels of torch_npu that passed."""
        from batch_invariant_ascend import aten

        return aten.harmless()

    def vendor_overrides(self) -> Mapping[str, Callable[..., Any]]:
        """The operators of torch_npu and vllm-ascend: replaced, left alone, or refused."""
        from batch_invariant_ascend import npu_operators

        return npu_operators.overrides()

    def activate(self) -> None:
        """Determinism, collectives and weight formats; see switches.py."""
        from batch_invariant_ascend.switches import Switches

        self._switches = Switches()
        self._switches.set()

    def deactivate(self) -> None:
        """Undoes `activate` exactly."""
        if self._switches is not None:
            self._switches.restore()
            self._switches = None
