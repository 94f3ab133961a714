"""The mode: torch's own operators, made batch-invariant by overrides at the dispatcher.

Every aten overload that mixes elements is sent to its `batch_invariant` kernel, at the dispatch
key of the device, below autograd: torch's derivative formulas stay in charge and call overridden
operators themselves. Overloads that no kernel covers raise. Undone completely by `disable`.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch

from batch_invariant import clash, coverage, env, inductor, registry, selector, vendor
from batch_invariant.errors import (
    BatchInvariantError,
    ConfigurationError,
    UncoveredOpError,
)
from batch_invariant.ops import CONTRACTS
from batch_invariant.stock import capture, dispatch_key, stock


class Options(NamedTuple):
    """What a user asks of the mode beside turning it on."""

    allow: frozenset[str] = frozenset()
    eager_bits: bool = False


_lock = threading.RLock()
_installed: list[torch.library.Library] = []
_explicit = False
_contexts = 0
_options = Options()
_fault: BatchInvariantError | None = None


def enable(*, allow: Iterable[str] = (), eager_bits: bool = False) -> None:
    """Turns the mode on for the whole process; does nothing if it is on already.

    allow: names of aten operators, such as "fft_fft", or of a vendor's, such as "npu::npu_ffn",
    that may run their own kernels although no invariant one exists. eager_bits: compiled code has
    the bits of eager code on every device, at a cost (docs/compile.md); on CPUs it has them anyway.
    """
    global _explicit
    wanted = Options(_checked(allow), eager_bits)
    with _lock:
        _ensure(wanted)
        _explicit = True


def disable() -> None:
    """Turns the mode off: every override is undone and torch's own kernels are back."""
    global _explicit
    with _lock:
        _explicit = False
        _turn_off()


def is_enabled() -> bool:
    """Whether the mode is on."""
    return bool(_installed)


@contextmanager
def enabled(*, allow: Iterable[str] = (), eager_bits: bool = False) -> Iterator[None]:
    """Context manager and decorator: the mode is on inside, and what was found is restored.

    The overrides belong to the process. When contexts of several threads overlap, the mode stays
    on until the last of them is left.
    """
    global _contexts, _explicit
    wanted = Options(_checked(allow), eager_bits)
    with _lock:
        found, found_options = _explicit, _options
        _ensure(wanted)
        _contexts += 1
    try:
        yield
    finally:
        with _lock:
            _contexts -= 1
            _explicit = found
            if found or _contexts:
                _ensure(found_options)
            else:
                _turn_off()


def enable_from_environment() -> None:
    """What `import torch` runs when the environment asks for the mode; it never raises.

    A request that cannot be met is reported, and every operator that the mode would have made
    invariant raises the reason when it is first called.
    """
    try:
        if not env.mode_requested():
            return
        # A device that comes after the mode would run its own kernels, and nobody would know.
        registry.import_devices()
        enable()
    except BatchInvariantError as error:
        sys.stderr.write(f"batch_invariant: {error}\n")
        with _lock:
            _install(Options(), error)


def _ensure(options: Options) -> None:
    clash.check()
    if not _installed or options != _options or _fault is not None:
        _install(options, None)


def _checked(allow: Iterable[str]) -> frozenset[str]:
    if isinstance(allow, str):
        raise ConfigurationError(f"allow={allow!r}: expected a list of operator names")
    wanted = frozenset(name.removeprefix("aten::") for name in allow)
    if unknown := sorted(name for name in wanted if not _is_operator(name)):
        raise ConfigurationError(f"allow: no operator is named {', '.join(unknown)}")
    return wanted


def _is_operator(name: str) -> bool:
    """Whether torch knows an aten operator, or a `namespace::operator`."""
    namespace, _, operator = name.rpartition("::")
    return hasattr(getattr(torch.ops, namespace or "aten"), operator)


def device_types() -> list[str]:
    """The device types that the mode covers here."""
    accelerator = torch.accelerator.current_accelerator(check_available=False)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _install(options: Options, fault: BatchInvariantError | None) -> None:
    """Replaces whatever is installed; on an error everything is as torch made it."""
    global _options, _fault
    inductor.refuse_inside_compiled_code()
    _uninstall()
    for device_type in device_types():
        _missing_backend(device_type)  # chooses kernels while nothing is overridden or refused
    try:
        devices: dict[str, inductor.Device] = {}
        for device_type in device_types():
            libraries, devices[device_type] = _override(device_type, options.allow, fault)
            _installed.extend(libraries)
        clash.remember()
        _options, _fault = options, fault
        inductor.hold(inductor.Rules(devices, *options))
    except BaseException:
        _uninstall()
        raise


def _uninstall() -> None:
    global _options, _fault
    inductor.release()
    while _installed:
        _installed.pop()._destroy()
    clash.forget()
    _options, _fault = Options(), None


def _turn_off() -> None:
    """Undoes overrides and vendor switches alike."""
    if _installed:
        _uninstall()
        selector.release()


def _reinstall() -> None:
    with _lock:
        if _installed:
            _install(_options, _fault)


selector.on_change(_reinstall)

# Dynamo need not look into these: inside a compiled function they raise.
for _function in (_install, _uninstall):
    _function._torchdynamo_disable = True  # type: ignore[union-attr]


def _override(
    device_type: str, allow: frozenset[str], fault: BatchInvariantError | None
) -> tuple[list[torch.library.Library], inductor.Device]:
    key = dispatch_key(device_type)
    (plain, with_keyset, composite), device = _plan(device_type, fault)
    fault, refused = device.fault, device.refused
    special = vendor.overrides(device_type, key, fault)
    libraries = {
        namespace: torch.library.Library(namespace, "IMPL")
        for namespace in ("aten", *sorted({name.split("::")[0] for name in special}))
    }

    def impl(
        name: str, fn: Callable[..., Any], at: str, keyset: bool = False, of: str = "aten"
    ) -> None:
        if of == "aten" and (name.split(".")[0] in allow or coverage.base_of(name) in allow):
            return
        if f"{of}::{name.split('.')[0]}" in allow:
            return
        # A vendor's own operators may be written in Python: that is no second override.
        if of == "aten":
            clash.refuse_earlier(name, at)
        libraries[of].impl(name, fn, at, with_keyset=keyset, allow_override=of != "aten")

    before = set(clash.record())
    capture((*plain, *with_keyset, *refused), key)
    layouts = {layout: coverage.refused_layouts(layout) for layout in coverage.layout_keys(key)}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Oo]verrid")
            for name, fn in plain.items():
                impl(name, fn, key)
            for name, fn in with_keyset.items():
                impl(name, fn, key, True)
            for name, fn in composite.items():
                impl(name, fn, f"Autograd{key}")
            for name, reason in refused.items():
                impl(name, _refuse(name, reason, key, fault), key)
            for layout, names in layouts.items():
                for name, reason in names.items():
                    short = name.removeprefix("aten::")
                    impl(short, _refuse(short, reason, layout, fault), layout)
            for qualified, fn in special.items():
                namespace, _, name = qualified.partition("::")
                impl(name, clash.checking(fn), key, of=namespace)
        for library in libraries.values():
            clash.watch(library, before)
    except BaseException:
        for library in libraries.values():
            library._destroy()
        raise
    return list(libraries.values()), device


def plan(device_type: str) -> inductor.Device:
    """What the mode does, or would do, with the operators of a device."""
    return _plan(device_type, None)[1]


def _plan(
    device_type: str, fault: BatchInvariantError | None
) -> tuple[list[Overrides], inductor.Device]:
    key = dispatch_key(device_type)
    fault = fault or _missing_backend(device_type)
    tables = [
        {name: fn for name, fn in table.items() if _runs_on(name, key)}
        for table in overrides(device_type, fault)
    ]
    overridden = frozenset(name for table in tables for name in table)
    covered = {f"aten::{name}" for name in overridden}
    backend = None if fault else selector.current_backend(device_type)
    harmless = {} if backend is None else backend.aten_harmless()
    refused = {
        name.removeprefix("aten::"): reason
        for name, reason in coverage.refused_overloads(covered, key, harmless).items()
        if _runs_on(name.removeprefix("aten::"), key)
    }
    return tables, inductor.Device(
        backend="" if fault else _identity(device_type),
        code="" if fault else _code(device_type),
        overloads=frozenset(n.removeprefix("aten::") for n in coverage.aten_overloads(key)),
        overridden=overridden,
        refused=refused,
        harmless=harmless,
        fused=frozenset() if backend is None else frozenset(backend.fused_kernels()),
        fault=fault,
    )


def _code(device_type: str) -> str:
    backend = type(selector.current_backend(device_type))
    top = sys.modules.get(backend.__module__.partition(".")[0])
    if top is not None and hasattr(top, "__path__"):
        return os.path.dirname(os.path.abspath(str(top.__file__))) + os.sep
    return os.path.abspath(inspect.getfile(backend))


def _identity(device_type: str) -> str:
    name = selector.current_backend(device_type).name
    return f"{name} of {registry.distribution(name)}"


Overrides = dict[str, Callable[..., Any]]


def overrides(
    device_type: str, fault: BatchInvariantError | None = None
) -> tuple[Overrides, Overrides, Overrides]:
    """The aten overloads that the mode sends elsewhere on a device, by name.

    Returns those at the device's key, those that also take the keyset, and those at its autograd
    key: composite ones, which are overridden at both. With `fault` they raise it.
    """
    kernels: Mapping[str, Any] = {}
    extra: Mapping[str, Callable[..., Any]] = {}
    if fault is None:
        kernels = selector.kernels(device_type)
        extra = selector.current_backend(device_type).aten_overrides()
    plain: Overrides = {}
    composite: Overrides = {}
    for op in CONTRACTS.values():
        kernel = kernels.get(op.name)
        direct = op.overload if kernel is None else kernel.fn
        for names, target, found in (
            (op.aten, direct, plain),
            (op.composite, direct, plain),
            (op.composite, op.overload, composite),
        ):
            for name, adapter in names.items():
                if not _exists(name):
                    continue
                fn = target if adapter is None else functools.partial(adapter, target)
                if fault is not None:
                    fn = _raise(fault)
                found[name] = fn
                if found is plain:
                    plain.update(_variants(name, fn))
    return plain, dict(extra), composite


def _missing_backend(device_type: str) -> BatchInvariantError | None:
    """Why no backend can run on a device, to be raised when something is computed there."""
    try:
        selector.kernels(device_type)
    except BatchInvariantError as error:
        return error
    return None


def _raise(fault: BatchInvariantError) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise fault.with_traceback(None)

    return refuse


def _exists(name: str) -> bool:
    """Whether this torch has the overload."""
    found: bool = torch._C._dispatch_has_kernel(f"aten::{name}")
    return found


def _runs_on(name: str, key: str) -> bool:
    """Whether a call of the overload can reach a device; CPU-only operators are not CUDA's."""
    found: bool = torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"aten::{name}", key)
    return found


@functools.cache
def _schemas() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("aten::"):
            found.setdefault(schema.name, []).append(schema)
    return found


def _shape_of(arguments: Iterable[Any]) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in arguments]


def _variants(name: str, fn: Callable[..., Any]) -> Overrides:
    """The out= and in-place overloads of a functional one, found by their schemas."""
    base, _, overload = name.partition(".")
    everything = _schemas()
    (own,) = [s for s in everything[f"aten::{base}"] if s.overload_name == overload]
    wanted = _shape_of(own.arguments)
    found: Overrides = {}
    for schema in everything[f"aten::{base}"]:
        outs = [a for a in schema.arguments if a.is_out and str(a.type) == "Tensor"]
        if outs and _shape_of(a for a in schema.arguments if not a.is_out) == wanted:
            found[f"{base}.{schema.overload_name}"] = _out(fn, [a.name for a in outs])
    for schema in everything.get(f"aten::{base}_", ()):
        if _shape_of(schema.arguments) == wanted:
            found[f"{base}_" + (f".{schema.overload_name}" if schema.overload_name else "")] = (
                _in_place(fn)
            )
    return found


def _out(fn: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    def write(*args: Any, **kwargs: Any) -> Any:
        outs = [kwargs.pop(name) for name in names]
        results = fn(*args, **kwargs)
        results = results if isinstance(results, (tuple, list)) else (results,)
        for out, result in zip(outs, results, strict=True):
            if not torch.can_cast(result.dtype, out.dtype):
                raise RuntimeError(
                    f"result type {result.dtype} can't be cast to the desired output type "
                    f"{out.dtype}"
                )
            if out.shape != result.shape:
                out.resize_(result.shape)
            out.copy_(result)
        return outs[0] if len(outs) == 1 else tuple(outs)

    return write


def _in_place(fn: Callable[..., Any]) -> Callable[..., Any]:
    def write(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = fn(self, *args, **kwargs)
        if result.shape != self.shape:
            raise RuntimeError(
                f"output with shape {list(self.shape)} doesn't match the broadcast shape "
                f"{list(result.shape)}"
            )
        return self.copy_(result)

    return write


def _refuse(
    name: str, reason: coverage.Refusal, key: str, fault: BatchInvariantError | None
) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        if reason.only_floating and not any(map(_is_inexact, _dtypes(values))):
            return stock(name, key)(*args, **kwargs)
        if fault is not None:
            raise fault.with_traceback(None)
        raise UncoveredOpError(f"aten::{name}", ", ".join(map(_describe, values)), reason.text)

    return refuse


def _dtypes(values: Iterable[Any]) -> Iterator[torch.dtype]:
    """The dtypes of the tensors among the arguments, and those that are asked for."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value.dtype
        elif isinstance(value, torch.dtype):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _dtypes(value)


def _is_inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_describe, value))}]"
    return repr(value)
