"""The CUDA backend of batch-invariant: Triton kernels for NVIDIA GPUs from compute capability 8.0.

Importing it imports neither Triton nor a kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import torch

from batch_invariant.backend import API_VERSION, Availability, Backend, Gap, Kernel, Tuner
from batch_invariant.errors import BackendUnavailable

FAMILIES = (
    *("matmul", "grouped", "reduce", "scan", "softmax", "norm"),
    *("attention", "varlen_attention", "embedding", "select", "elementwise", "sample"),
)
"""Modules with a `KERNELS` table, named as in core; one that is missing is a gap."""

OLDEST = (8, 0)
OLDEST_TRITON = (3, 6)
_REMEDY = "pip install 'batch-invariant-cuda[runtime]'"


class CudaBackend(Backend):
    """Kernels for CUDA tensors."""

    name = "cuda"
    device_type = "cuda"
    api_version = API_VERSION

    def probe(self) -> Availability:
        """Ok with a GPU of compute capability 8.0 or newer and an installed Triton."""
        if torch.version.cuda is None:
            return Availability(
                False,
                f"torch {torch.__version__} is built without CUDA",
                "install a CUDA build of torch (https://pytorch.org/get-started)",
            )
        if not torch.cuda.is_available():
            return Availability(
                False,
                "torch finds no CUDA GPU",
                "check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES",
            )
        devices = range(torch.cuda.device_count())
        old = [d for d in devices if torch.cuda.get_device_capability(d) < OLDEST]
        if old:
            major, minor = torch.cuda.get_device_capability(old[0])
            return Availability(
                False,
                f"{torch.cuda.get_device_name(old[0])} has compute capability {major}.{minor}; "
                f"the kernels need {OLDEST[0]}.{OLDEST[1]} (A100) or newer",
                "hide it with CUDA_VISIBLE_DEVICES, or compute on the CPU",
            )
        if find_spec("triton") is None:
            return Availability(False, "Triton is not installed", _REMEDY)
        version = _triton_version()
        if version is None:
            return Availability(False, "the installed Triton does not tell its version", _REMEDY)
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TRITON:
            needed = ".".join(map(str, OLDEST_TRITON))
            return Availability(
                False, f"Triton {version} is installed; the kernels need {needed} or newer", _REMEDY
            )
        return Availability(True)

    def kernels(self) -> Mapping[str, Kernel]:
        """The kernels of every family that is there; BackendUnavailable without Triton."""
        return _kernels()

    def aten_overrides(self) -> Mapping[str, Callable[..., Any]]:
        """Scatters that torch does with atomics, and selections between zeros."""
        from batch_invariant_cuda import scatter, selections

        return {**scatter.overrides(), **selections.overrides()}

    def aten_harmless(self) -> Mapping[str, str | None]:
        """Elementwise kernels: one thread computes one element."""
        from batch_invariant_cuda.harmless import HARMLESS

        return HARMLESS

    def fused_kernels(self) -> Mapping[str, Callable[..., Any]]:
        """What the reductions can do with their operand as they read it."""
        from batch_invariant_cuda.reduce import mean_square

        return {"mean_square": mean_square}

    def tuner(self) -> Tuner:
        """Schedules of the matrix products."""
        from batch_invariant_cuda.tune import CudaTuner

        return CudaTuner()

    def gaps(self) -> Sequence[Gap]:
        """The operators without a kernel."""
        from batch_invariant.ops import CONTRACTS

        return tuple(
            Gap(op=name, check="kernel", reason="no kernel for CUDA yet")
            for name in CONTRACTS
            if name not in _kernels()
        )


def _triton_version() -> str | None:
    """By the package's metadata, which imports nothing."""
    for name in ("triton", "pytorch-triton"):  # the second comes with nightly builds of torch
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


@cache
def _kernels() -> dict[str, Kernel]:
    found: dict[str, Kernel] = {}
    for family in FAMILIES:
        if find_spec(f"{__name__}.{family}") is not None:
            try:
                found |= import_module(f"{__name__}.{family}").KERNELS
            except ImportError as error:
                reason = f"its kernels cannot be imported: {error}"
                raise BackendUnavailable("cuda", reason, _REMEDY) from error
    return found
