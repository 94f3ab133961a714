"""An emulated `npu` device on CPU torch: wiring only, never the numerics of an Ascend chip.

PrivateUse1 is renamed to npu and given Python hooks. A tensor is real CPU memory whose DLPack capsule
says another device, so sizes, strides, views and writes are true. Every aten overload with a CPU
kernel gets a kernel for npu, as torch_npu has its own; it runs torch's CPU kernel on the same memory.
Kernels that add across elements are made batch-VARIANT on purpose, as a vendor's may be: reaching one
fails a comparison of bits. With deterministic level 3 they are batch-invariant, as CANN says of its
own.

Once per process, since the rename is. Not there: streams, formats, Inductor, deepcopy and torch.save
of npu tensors, and kernels of its own for matmul, softmax.int and their derivatives.
"""

from __future__ import annotations

import ctypes
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_CPU, _EXTENSION = 1, 12
KEY = "PrivateUse1"
log: list[str] = []
"""The vendor kernels that ran, by overload."""
_libraries: list[torch.library.Library] = []

SUMS = frozenset(
    """
    mm bmm addmm baddbmm addmv mv dot vdot sum sum.dim_IntList mean mean.dim prod prod.dim_int
    _softmax _log_softmax _softmax_backward_data _log_softmax_backward_data cumsum logsumexp
    var.correction std.correction linalg_vector_norm native_layer_norm native_group_norm
    """.split()
)
"""What adds across elements, and is variant below level 3."""


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


def install() -> None:
    """Makes the device, with a kernel for every aten overload that has one for the CPU."""
    _setup_privateuseone_for_python_backend("npu", backend_module=npu)
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(_run, KEY)
    aten = torch.library.Library("aten", "IMPL")
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU"):
        if not name.startswith("aten::"):
            continue
        base, _, overload = name.removeprefix("aten::").partition(".")
        op = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
        if op is None or base in ("_local_scalar_dense", "empty", "empty_strided", "_copy_from"):
            continue
        short = name.removeprefix("aten::")
        aten.impl(short, _kernel(op), KEY)
        # These stand for torch_npu's own C++ kernels, not for another library's overrides.
        torch.library._impls.discard(f"aten/{short}/{KEY}")
    _libraries.extend((everything, aten))


def _kernel(op: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _run(op, *args, **kwargs)


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs an aten operator on the CPU view of npu tensors; views and in-place results stay so."""
    name = op._schema.name.removeprefix("aten::") + (
        "" if op._overloadname == "default" else f".{op._overloadname}"
    )
    log.append(name)
    held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    seen = [False]

    def down(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and x.device.type == "npu":
            seen[0] = True
            c = on_cpu(x)
            held[id(c)] = (c, x)
            return c
        if isinstance(x, torch.device) and x.type == "npu":
            seen[0] = True
            return torch.device("cpu")
        return x

    is_view = any(
        r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns
    )

    def up(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in held:  # in place, or out=: the caller's own tensor
            return held[id(x)][1]
        if not (seen[0] and x.device.type == "cpu"):
            return x
        if is_view and not args[0].is_inference():
            # The view of an ordinary tensor stays one under inference_mode.
            with torch.inference_mode(False):
                return on_npu(x)
        return on_npu(x)

    c_args, c_kwargs = tree_map(down, (args, kwargs))
    if name == "_copy_from":
        c_args[1].copy_(c_args[0])
        return args[1]
    if name == "resize_":
        return _resized(args[0], c_args[0], c_args[1])
    try:
        result = _cpu_kernel(op, name)(*c_args, **c_kwargs)
    except RuntimeError as error:
        outs = [k for k in kwargs if k in {a.name for a in op._schema.arguments if a.is_out}]
        if "resiz" not in str(error) or len(outs) != 1:
            raise
        fresh = torch.empty(0, dtype=c_kwargs[outs[0]].dtype)
        _cpu_kernel(op, name)(*c_args, **{**c_kwargs, outs[0]: fresh})
        kwargs[outs[0]].data = on_npu(fresh)
        return kwargs[outs[0]]
    if name in SUMS and npu.level < 3:
        result = tree_map(lambda x: _varied(x, c_args), result)
    return tree_map(up, result)


def _varied(x: Any, args: Any) -> Any:
    """A result that depends on the size of the batch, by more than rounding."""
    if not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point:
        return x
    from batch_invariant.stock import stock

    return stock("mul.Tensor")(x, torch.tensor(1 + args[0].numel() % 29 / 64, dtype=x.dtype))


def _resized(tensor: torch.Tensor, old: torch.Tensor, size: Any) -> torch.Tensor:
    new = torch.empty(size, dtype=old.dtype)
    kept = min(new.numel(), old.numel())
    new.view(-1)[:kept].copy_(old.reshape(-1)[:kept])
    tensor.data = on_npu(new)
    return tensor


def _cpu_kernel(op: Any, name: str) -> Callable[..., Any]:
    """Torch's CPU kernel, also while the mode has overridden it; elementwise ones place by place.

    CPU kernels compute the end of a tensor with other instructions than its body. A device whose
    kernels did would have no elementwise functions, so these come from the CPU backend, unless
    `places_differ` asks for what torch does.
    """
    from batch_invariant.stock import stock

    if name in SUMS and npu.level >= 3:
        from batch_invariant import mode

        return mode.overrides("cpu")[0][name]
    if name in _elementwise() and name.split(".")[0] not in places_differ:
        fn = _elementwise()[name]
        return lambda *args, **kwargs: fn(None, *args, **kwargs)
    if f"aten/{name}/CPU" in torch.library._impls:
        return stock(name)
    return op


places_differ: set[str] = set()
"""Nothing, or names of the operators that depend on the place of an element, as torch's do."""
_table: dict[str, Callable[..., Any]] = {}


def _elementwise() -> dict[str, Callable[..., Any]]:
    if not _table:
        from batch_invariant.cpu import elementwise

        _table.update(elementwise.overrides())
    return _table
