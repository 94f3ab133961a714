"""An emulated `npu` device on CPU torch: wiring only, never the numerics of an Ascend chip.

PrivateUse1 is renamed to npu and given Python hooks. A tensor is real CPU memory whose DLPack
capsule says another device, so sizes, strides, views and writes are true. Kernels are those of
npu_kernels.py.

Once per process, since the rename is. Not there: streams, formats, Inductor, deepcopy and
torch.save of npu tensors, and kernels of its own for matmul, softmax.int and their derivatives.
"""

from __future__ import annotations

import ctypes
import types
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from npu_kernels import KEY, CpuKernels, libraries

_CPU, _EXTENSION = 1, 12


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _Head(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("device", _Device))


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _relabelled(t: torch.Tensor, device: int) -> torch.Tensor:
    capsule = torch._C._to_dlpack(t)
    head = _Head.from_address(_pointer(capsule, b"dltensor"))
    head.device.type, head.device.id = device, 0
    return torch._C._from_dlpack(capsule)


def on_cpu(t: torch.Tensor) -> torch.Tensor:
    """The same memory as a CPU tensor."""
    return _relabelled(t, _CPU)


def on_npu(t: torch.Tensor) -> torch.Tensor:
    """The same memory as an npu tensor."""
    return _relabelled(t, _EXTENSION)


class Npu(types.ModuleType):
    """`torch.npu`, as far as a backend touches it."""

    name = "Ascend910B3"
    level = 0
    newest_level = 2  # what this CANN can do; 3 from 9.2.0 on

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, _device: Any) -> None:
        return None

    def synchronize(self, _device: Any = None) -> None:
        return None

    def manual_seed_all(self, _seed: int) -> None:
        return None

    def get_rng_state(self, _device: Any = None) -> torch.Tensor:
        return torch.random.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, _device: Any = None) -> None:
        torch.random.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_device_name(self, _device: Any = None) -> str:
        return self.name

    def set_deterministic_level(self, level: int) -> None:
        """As in torch_npu 2.13: follows torch's flag and sets it, strictly, if it is off."""
        if level not in (0, 1, 2, 3):
            raise RuntimeError("'torch_npu.npu.set_deterministic_level' supports 0/1/2/3.")
        if level > self.newest_level:
            raise RuntimeError(
                "'torch_npu.npu.set_deterministic_level(3)' requires CANN runtime and operator "
                "packages that support it"
            )
        if (level > 0) != torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(level > 0)
        self.level = level

    def _get_deterministic_level(self) -> int:
        """Also writes, as torch_npu's does: a level that torch's flag contradicts follows it."""
        if (self.level > 0) != torch.are_deterministic_algorithms_enabled():
            self.level = int(torch.are_deterministic_algorithms_enabled())
        return self.level


npu = Npu("torch.npu")


_kernels = CpuKernels(on_cpu, on_npu, lambda: npu.level, shares=True)


def install() -> None:
    """Makes the device, with a kernel for every aten overload that has one for the CPU."""
    _setup_privateuseone_for_python_backend("npu", backend_module=npu)
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(_kernels.run, KEY)
    libraries.append(everything)
    made_by_torch = ("_local_scalar_dense", "empty", "empty_strided", "_copy_from")
    _kernels.install(skipped=frozenset(made_by_torch))
