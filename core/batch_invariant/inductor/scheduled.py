"""What Inductor scheduled, looked at after fusion: its loops, reductions and calls of kernels.

This is the last sight of a graph before its code is written, whatever passes and lowerings have
done to it. A reduction of floating-point numbers, an operation that is not exact, a template or a
call of an aten kernel that the rules do not know, raises: the promise cannot be lost unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor import custom_graph_pass

from batch_invariant.errors import UncoveredOpError
from batch_invariant.inductor.fusible import LOOP_OPS
from batch_invariant.inductor.rules import Device, Rules
from batch_invariant.places import kernel_name, traced_line


@dataclass(frozen=True)
class Scheduled:
    """One kernel of a compiled graph.

    kind: "generated", "call", or "triton" for a kernel of the user's, which only an audit judges.
    name: the operator or kernel that is called, or what a loop does. origins:
    the operators of the graph it is made of. loop: the operations of a generated loop. wrong: why
    it does not keep the promise, or "". place: the line of user code.
    """

    kind: str
    name: str
    device: str
    origins: tuple[str, ...]
    loop: tuple[str, ...]
    wrong: str
    place: str

    def error(self) -> UncoveredOpError:
        """What is raised where it does not keep the promise."""
        where = f". It is called at {self.place}" if self.place else ""
        return UncoveredOpError(
            " ".join(self.origins) or self.name,
            "in compiled code",
            self.wrong + where,
            "Look for a custom pass, lowering or template that brings it in, or run that function "
            "eagerly with torch.compiler.disable",
        )


_collecting: list[list[Scheduled]] = []


@contextmanager
def collected() -> Iterator[list[Scheduled]]:
    """The kernels of the graphs that are compiled inside, filled in as they are."""
    kernels: list[Scheduled] = []
    _collecting.append(kernels)
    try:
        yield kernels
    finally:
        _collecting.pop()


_Pass: Any = getattr(custom_graph_pass, "CustomSchedulerPass", custom_graph_pass.CustomGraphPass)


class Check(_Pass):  # type: ignore[misc]
    """Inductor's pass over the scheduled nodes: the user's own one first, then the check."""

    def __init__(self, rules: Rules, before: Any) -> None:
        self.rules = rules
        self.before = before

    def __call__(self, nodes: list[Any]) -> list[Any]:
        if self.before is not None:
            nodes = self.before(nodes)
        found = [kernel for node in nodes for kernel in look(node, self.rules)]
        if _collecting:
            _collecting[-1].extend(found)
        watcher = self.rules.watcher
        if watcher is not None:
            watcher.scheduled(found)
        wrong = next((kernel for kernel in found if kernel.wrong), None)
        if wrong is not None and (self.rules.enforced if watcher is None else watcher.strict):
            raise wrong.error()
        return nodes

    def uuid(self) -> Any:
        before = self.before.uuid() if hasattr(self.before, "uuid") else repr(self.before)
        return repr((self.rules.identity, before))

    def __reduce__(self) -> Any:
        return str, (self.uuid(),)


def look(node: Any, rules: Rules) -> Iterator[Scheduled]:
    """The kernels of one scheduled node, which may be a fusion of several."""
    from torch._inductor import ir, scheduler

    if isinstance(node, scheduler.NopKernelSchedulerNode):
        return
    parts = node.get_nodes()
    if len(parts) > 1 or parts[0] is not node:
        for part in parts:
            yield from look(part, rules)
        return
    buffer = node.node
    device_type = _device_type(node)
    origins, place = _origins(buffer)
    if isinstance(node, scheduler.SchedulerNode) and isinstance(buffer, ir.ComputedBuffer):
        loop = tuple(sorted(_loop_ops(node)))
        wrong = _wrong_loop(node, buffer, loop, device_type, rules)
        name = _loop_name(node, buffer, loop)
        yield Scheduled("generated", name, device_type, origins, loop, wrong, place)
        return
    if isinstance(buffer, ir.UserDefinedTritonKernel):
        name = kernel_name(buffer.get_kernel_and_metadata()[0])
        yield Scheduled("triton", name, device_type, origins, (), "", place)
        return
    func = getattr(buffer, "op_overload", None)
    name = func.name() if isinstance(func, torch._ops.OpOverload) else _extern_name(buffer)
    wrong = _wrong_call(buffer, func) or _past_dispatcher(name, device_type, rules)
    yield Scheduled("call", name, device_type, origins, (), wrong, place)


def _device_type(node: Any) -> str:
    device = node.get_device()
    return "cpu" if device is None else str(device.type)


def _origins(buffer: Any) -> tuple[tuple[str, ...], str]:
    """The operators of the graph that a buffer is made of, and the line of the last of them."""
    nodes = list(buffer.get_origins()) if buffer is not None else []
    nodes.sort(key=lambda node: str(node.name))
    last = getattr(buffer, "origin_node", None)
    names = {n.target.name() for n in nodes if isinstance(n.target, torch._ops.OpOverload)}
    stacks = [n.meta.get("stack_trace") for n in (*nodes, last) if n is not None]
    return tuple(sorted(names)), next((traced_line(s) for s in reversed(stacks) if s), "")


_BOOKKEEPING = frozenset(
    """load store store_reduction index_expr get_index output placeholder constant set_indirect
    check_bounds indirect_indexing""".split()
)


def _loop_name(node: Any, buffer: Any, loop: tuple[str, ...]) -> str:
    done = [name for name in loop if name not in _BOOKKEEPING and name != "reduction"]
    if node.is_reduction():
        done.append(f"reduced by {buffer.data.reduction_type}")
    return "loop: " + (", ".join(done) or "copy")


def _extern_name(buffer: Any) -> str:
    return str(getattr(buffer, "python_kernel_name", None) or type(buffer).__name__)


def _loop_ops(node: Any) -> set[str]:
    """The operations in the body of a loop, those of its branches included."""
    found: set[str] = set()
    for fx_node in node._body.get_nodes():
        if fx_node.op == "call_method":
            found.add(str(fx_node.target))
        elif fx_node.op == "call_module" and "masked_subblock" not in str(fx_node.target):
            found.add(str(fx_node.target).rstrip("0123456789"))
    return found


def _wrong_loop(
    node: Any, buffer: Any, loop: tuple[str, ...], device_type: str, rules: Rules
) -> str:
    device = rules.devices.get(device_type)
    if device is None:
        return f"there are no rules for {device_type!r}"
    if node.is_reduction():
        dtype, kind = buffer.data.src_dtype, buffer.data.reduction_type
        if dtype.is_floating_point or dtype.is_complex:
            return (
                f"Inductor generates a {kind} over {str(dtype).removeprefix('torch.')}, in an "
                "order that depends on shapes and threads"
            )
    elif node.is_split_scan() or isinstance(buffer.data, _scan()):
        return "Inductor generates a scan, in an order that depends on shapes and threads"
    unknown = [name for name in loop if name not in LOOP_OPS and not _elementwise(name, device)]
    if unknown:
        return (
            f"Inductor generates {', '.join(unknown)}, which may be computed differently in "
            "vectors and in tails"
        )
    if not rules.enforced and buffer.get_dtype() in (torch.bfloat16, torch.float16):
        return "Inductor rounds to low precision where a fusion ends, and fuses by sizes"
    return ""


def _scan() -> Any:
    from torch._inductor import ir

    return (ir.Scan, ir.Sort)


def _elementwise(name: str, device: Device) -> bool:
    """Whether the backend says that this device computes a function alike at any place."""
    base = name.removeprefix("libdevice_")
    return device.harmless.get(base) is not None or (
        base in ("fma", "relu", "square", "rand", "randn") and device.elementwise
    )


_OWN_KERNELS = frozenset({"mkl", "mkldnn", "onednn", "quantized", "_quantized"})
"""Namespaces of torch's fused products, which the mode does not override."""


def _wrong_call(buffer: Any, func: Any) -> str:
    from torch._inductor import ir

    if isinstance(buffer, ir.TemplateBuffer):
        return "Inductor generates it from a template, whose order depends on shapes"
    if isinstance(func, torch._ops.OpOverload) and func.namespace in _OWN_KERNELS:
        return "Inductor calls a fused kernel of torch's own"
    return ""


def _past_dispatcher(name: str, device_type: str, rules: Rules) -> str:
    """A C++ wrapper calls the kernels of aten themselves, where no override is seen."""
    from torch._inductor import config

    device = rules.devices.get(device_type)
    overload = name.removeprefix("aten::").removeprefix("extern_kernels.")
    if not config.cpp_wrapper or device is None or "::" in overload or rules.allows(overload):
        return ""
    bases = {known.split(".")[0] for known in (*device.overridden, *device.refused)}
    if overload.split(".")[0] not in bases:
        return ""
    return "Inductor's C++ wrapper calls torch's own kernel past the dispatcher"
