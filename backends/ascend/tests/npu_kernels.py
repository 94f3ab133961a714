"""Kernels for npu tensors that compute on the CPU, for tests of wiring: never an Ascend chip's
numerics.

Every aten overload with a CPU kernel gets one at PrivateUse1, which runs torch's CPU kernel on the
same memory. Those that add across elements are made batch-VARIANT on purpose, as a vendor's may be:
reaching one fails a comparison of bits. With deterministic level 3 they are batch-invariant, as
CANN says of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

Tensor = torch.Tensor
KEY = "PrivateUse1"
log: list[str] = []
"""The kernels that ran, by overload."""
places_differ: set[str] = set()
"""Nothing, or names of operators that are made to depend on the place of an element."""
libraries: list[torch.library.Library] = []

SUMS = frozenset(
    """
    mm bmm addmm baddbmm addmv mv dot vdot sum sum.dim_IntList mean mean.dim prod prod.dim_int
    _softmax _log_softmax _softmax_backward_data _log_softmax_backward_data cumsum logsumexp
    var.correction std.correction linalg_vector_norm native_layer_norm native_group_norm
    """.split()
)
"""What adds across elements, and is variant below level 3."""

_table: dict[str, Callable[..., Any]] = {}


class CpuKernels:
    """Runs aten operators on CPU tensors that share the memory of npu tensors.

    on_cpu: an npu tensor as a CPU tensor of the same memory, sizes and strides. on_npu: a CPU
    tensor as an npu tensor, of the same memory where `shares` says so. level: torch_npu's
    deterministic level.
    """

    def __init__(
        self,
        on_cpu: Callable[[Tensor], Tensor],
        on_npu: Callable[[Tensor], Tensor],
        level: Callable[[], int],
        shares: bool,
    ) -> None:
        self.on_cpu, self.on_npu, self.level, self.shares = on_cpu, on_npu, level, shares

    def install(self, skipped: frozenset[str]) -> int:
        """Registers a kernel for every overload but `skipped`, by base name; returns how many."""
        _invariant_sums()
        aten = torch.library.Library("aten", "IMPL")
        libraries.append(aten)
        count = 0
        names = set(torch._C._dispatch_get_registrations_for_dispatch_key("CPU"))
        if not self.shares:
            names |= set(torch._C._dispatch_get_registrations_for_dispatch_key(KEY))
        for name in names:
            short = name.removeprefix("aten::")
            base, _, overload = short.partition(".")
            op = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
            if short == name or op is None or base in skipped:
                continue
            if not self.shares and _is_view(op):
                continue
            aten.impl(short, self._kernel(op), KEY)
            # These stand for torch_npu's own C++ kernels, not for another library's overrides.
            torch.library._impls.discard(f"aten/{short}/{KEY}")
            count += 1
        return count

    def _kernel(self, op: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.run(op, *args, **kwargs)

    def run(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """One aten operator; what is written in place, or is a view of shared memory, stays so."""
        name = op._schema.name.removeprefix("aten::") + (
            "" if op._overloadname == "default" else f".{op._overloadname}"
        )
        log.append(name)
        held: dict[int, tuple[Tensor, Tensor]] = {}
        seen = [False]

        def down(x: Any) -> Any:
            if isinstance(x, Tensor) and x.device.type == "npu":
                seen[0] = True
                c = self.on_cpu(x)
                held[id(c)] = (c, x)
                return c
            if isinstance(x, torch.device) and x.type == "npu":
                seen[0] = True
                return torch.device("cpu")
            return x

        def up(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) in held:  # in place, or out=: the caller's own tensor
                return held[id(x)][1]
            if not (seen[0] and x.device.type == "cpu"):
                return x
            if _is_view(op) and not args[0].is_inference():
                # The view of an ordinary tensor stays one under inference_mode.
                with torch.inference_mode(False):
                    return self.on_npu(x)
            return self.on_npu(x)

        if str(kwargs.get("device")) == "cpu":
            return op(*tree_map(down, args), **kwargs)
        c_args, c_kwargs = tree_map(down, (args, kwargs))
        if name == "_copy_from":
            c_args[1].copy_(c_args[0])
            return args[1]
        if name == "resize_":
            return self._resized(args[0], c_args[0], c_args[1])
        kernel = _cpu_kernel(op, name, self.level())
        try:
            result = kernel(*c_args, **c_kwargs)
        except RuntimeError as error:
            outs = [k for k in kwargs if k in {a.name for a in op._schema.arguments if a.is_out}]
            if "resiz" not in str(error) or len(outs) != 1:
                raise
            fresh = torch.empty(0, dtype=c_kwargs[outs[0]].dtype)
            kernel(*c_args, **{**c_kwargs, outs[0]: fresh})
            kwargs[outs[0]].data = self.on_npu(fresh)
            return kwargs[outs[0]]
        if name.split(".")[0] in places_differ:
            result = tree_map(_end_differs, result)
        if name in SUMS and self.level() < 3:
            result = tree_map(lambda x: _varied(x, c_args), result)
        return tree_map(up, result)

    def _resized(self, tensor: Tensor, old: Tensor, size: Any) -> Tensor:
        new = torch.empty(size, dtype=old.dtype)
        kept = min(new.numel(), old.numel())
        new.view(-1)[:kept].copy_(old.reshape(-1)[:kept])
        tensor.data = self.on_npu(new)
        return tensor


@functools.cache
def _invariant_sums() -> dict[str, Callable[..., Any]]:
    """The CPU backend's, taken before a test selects another backend for the process."""
    from batch_invariant import mode

    return mode.overrides("cpu")[0]


def _is_view(op: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)


def _varied(x: Any, args: Any) -> Any:
    """A result that depends on the size of the batch, by more than rounding."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        return x
    from batch_invariant.stock import stock

    return stock("mul.Tensor")(x, torch.tensor(1 + args[0].numel() % 29 / 64, dtype=x.dtype))


def _end_differs(x: Any) -> Any:
    """A result whose last elements, those after whole vectors of eight, were computed otherwise."""
    if isinstance(x, Tensor) and x.numel() % 8:
        x.view(-1)[x.numel() // 8 * 8 :] *= 1.25
    return x


def _cpu_kernel(op: Any, name: str, level: int) -> Callable[..., Any]:
    """Torch's CPU kernel, also while the mode has overridden it; elementwise ones place by place.

    CPU kernels compute the end of a tensor with other instructions than its body. A device whose
    kernels did would have no elementwise functions, so these come from the CPU backend.
    """
    from batch_invariant import clash
    from batch_invariant.cpu import elementwise
    from batch_invariant.stock import stock

    if name in SUMS and level >= 3:
        return _invariant_sums()[name]
    if not _table:
        _table.update(elementwise.overrides())
    if name in _table:
        fn = _table[name]
        return lambda *args, **kwargs: fn(None, *args, **kwargs)
    if clash.watched(name, "CPU") or f"aten/{name}/CPU" in torch.library._impls:
        return stock(name)
    return op
