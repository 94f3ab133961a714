"""What a kernel says about itself, and how it behaves as a function."""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from batch_invariant import selector
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.bits import difference, mismatch
from batch_invariant.ops.contract import Case, Data, Op
from batch_invariant.proof import restoration
from batch_invariant.proof.golden import digest
from batch_invariant.proof.log import Log, shapes
from batch_invariant.proof.subject import Subject, draw, short

_FEW = 3


def declared(subject: Subject, log: Log) -> None:
    """There is a kernel, and what it declares is coherent and true of the contract's cases."""
    kernel, op = subject.kernel, subject.op
    log.looked_at += 1
    if kernel is None:
        log.broken(f"the backend {subject.backend.name!r} has no kernel and declares no gap")
        return
    if subject.dtype not in kernel.dtypes:
        log.broken(f"the kernel does not take {subject.dtype}, and no gap is declared")
        return
    needed = max(subject.level, op.level)
    log.compare(
        None if kernel.guarantee >= needed else f"{kernel.guarantee}, and {needed} is asked",
        "the declared guarantee is",
    )
    if kernel.guarantee >= Guarantee.SCHEDULE and op.schedule is None:
        log.broken(f"declares {kernel.guarantee}, and the contract has no sequence to cut")
    if unknown := kernel.portable - kernel.dtypes:
        names = ", ".join(map(str, unknown))
        log.broken(f"declares {names} portable without taking them")
    try:
        kernel.order_of(subject.dtype)
    except KeyError:
        log.broken(f"declares no order of additions for {subject.dtype}")
    with _untouched(subject, log):
        for case in subject.cases():
            _supports(subject, case, log, asked=True)
        if subject.full and op.any_size is not None:
            largest = largest_sizes(op.any_size)
            for sizes in (dict.fromkeys(largest, 1), largest):
                _supports(subject, op.any_size(**sizes), log, asked=False)


@contextlib.contextmanager
def _untouched(subject: Subject, log: Log) -> Iterator[None]:
    """The calls inside leave the environment, torch's switches and its functions as they are."""
    if subject.on_torch:
        selector.kernels(subject.backend.device_type)  # what activating changes is no kernel's deed
    before = dict(restoration.state())
    yield
    touched = ", ".join(restoration.changes(before, dict(restoration.state())))
    log.compare(touched or None, "the calls changed")


def largest_sizes(make: Callable[..., Case]) -> dict[str, int]:
    """The sizes of `Op.any_size` by name, with the largest to be tried."""
    return {name: p.default for name, p in inspect.signature(make).parameters.items()}


def refusal(subject: Subject, args: Mapping[str, Any]) -> str | None:
    """Why the kernel says that it will refuse a call; None if it says that it takes it."""
    supports = subject.kernel.supports if subject.kernel else None
    if supports is None:
        return None
    reason: str | None
    (reason,) = subject.op.call(lambda *a, **k: (supports(*a, **k),), subject.native(args))
    return reason


def _supports(subject: Subject, case: Case, log: Log, asked: bool) -> None:
    """`supports` and the call itself say the same. What the contract asks for must be supported."""
    args = draw(subject.op, case, subject.dtype, Data.NORMAL, _FEW)
    reason = refusal(subject, args)
    error = raised(subject, args)
    log.looked_at += 1
    if reason is None and error is not None:
        log.broken(f"{shapes(args)} is supported, and raises {_text(error)}", case)
    if reason is not None and error is None:
        log.broken(f"supports says {reason!r} of {shapes(args)}, and the call goes through", case)
    if reason is not None and error is not None and asked:
        log.broken(f"{shapes(args)} is not supported ({reason}), and no gap is declared", case)


def result(subject: Subject, log: Log) -> None:
    """Shape, dtype and device are the contract's; arguments stay as they are and unshared."""
    op, backend = subject.op, subject.backend
    for case in subject.cases():
        args = draw(op, case, subject.dtype, Data.NORMAL, _FEW)
        on_meta = {
            name: value.to("meta") if isinstance(value, torch.Tensor) else value
            for name, value in args.items()
        }
        want = op.call(op.fake, on_meta)
        before = {n: v.clone() for n, v in args.items() if isinstance(v, torch.Tensor)}
        native = subject.native(args)
        assert subject.kernel is not None
        out = op.call(subject.kernel.fn, native)
        log.compare(
            None if len(out) == len(want) else f"{len(out)} outputs, and {len(want)} are declared",
            "the schema",
            case,
        )
        for which, (array, expected) in enumerate(zip(out, want, strict=False)):
            tensor = backend.to_torch(array)
            got = f"{tensor.dtype}{list(tensor.shape)}"
            contract = f"{expected.dtype}{list(expected.shape)}"
            found = None if got == contract else f"{got}, and the contract says {contract}"
            log.compare(found, f"output {which} of {shapes(args)} is", case)
            if isinstance(array, torch.Tensor):
                others = {f"output {n}": array for n, array in enumerate(out[:which])}
                found = _place(array, {**native, **others}, backend.device_type)
                log.compare(found, f"output {which}", case)
        for name, value in before.items():
            changed = mismatch(value, backend.to_torch(native[name]))
            log.compare(changed, f"the argument {name} was changed by the call in", case)


def _place(out: torch.Tensor, others: Mapping[str, Any], device_type: str) -> str | None:
    if out.device.type != device_type:
        return f"is on {out.device}, and the backend serves {device_type}"
    for name, value in others.items():
        if (
            isinstance(value, torch.Tensor)
            and out.numel()
            and out.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
        ):
            return f"shares memory with {name}"
    return None


def repeat(subject: Subject, log: Log) -> None:
    """The same call again, in other memory and with other numbers of threads, has the same bits.

    Writes down their digests, by which two certificates are compared.
    """
    results = log.figures.setdefault("results", {})
    for case, data, args in subject.inputs():
        first = subject.run(args)
        results[f"{case.label}, {data}"] = digest(first)
        for what in _circumstances(subject):
            log.compare(difference(first, subject.run(args)), f"the same call {what}", case, data)


def _circumstances(subject: Subject) -> Iterator[str]:
    _dirty(subject)
    yield "after freed memory was filled with NaN"
    if subject.backend.device_type != "cpu":
        return
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            yield f"on {count} threads"
    finally:
        torch.set_num_threads(threads)


def _dirty(subject: Subject) -> None:
    """Leaves NaN in memory that the allocator is likely to hand out next."""
    rooms = [
        subject.backend.to_native(torch.full((size,), torch.nan))
        for size in (16, 1000, 70_000, 300_000)
    ]
    del rooms
    gc.collect(0)


def bad_input(subject: Subject, log: Log) -> None:
    """What the contract refuses, the kernel refuses with a message, and then it works as before."""
    op = subject.op
    case = op.cases[0]
    args = draw(op, case, subject.dtype, Data.NORMAL, _FEW)
    before = subject.run(args)
    for what, wrong in _wrong_calls(subject, args):
        error = raised(subject, wrong)
        found = None
        if error is None:
            found = f"{shapes(wrong)} went through without an error"
        elif isinstance(error, AssertionError) or not str(error).strip():
            found = f"raised {type(error).__name__} without a word for the user: {error}"
        log.compare(found, what, case)
    log.compare(difference(before, subject.run(args)), "a good call after bad ones", case)


def has_wrong_calls(subject: Subject) -> bool:
    """Whether there is anything that the contract refuses; an elementwise function takes all."""
    args = draw(subject.op, subject.op.cases[0], subject.dtype, Data.NORMAL, _FEW)
    return next(_wrong_calls(subject, args), None) is not None


def _wrong_calls(subject: Subject, args: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Calls that the contract's shape function or definition refuses, or of an undeclared dtype."""
    kernel = subject.kernel
    assert kernel is not None
    tensors = {name: v for name, v in args.items() if isinstance(v, torch.Tensor)}
    candidates: list[tuple[str, dict[str, Any]]] = []
    for name, value in tensors.items():
        longer = torch.cat([value, value[..., :1]], -1)
        candidates.append((f"{name} one longer", {**args, name: longer}))
        candidates.append((f"{name} with one more dimension", {**args, name: value[None]}))
        if value.dtype.is_floating_point:
            other = torch.float16 if value.dtype != torch.float16 else torch.float32
            label = f"{name} in {other} beside {value.dtype}"
            candidates.append((label, {**args, name: value.to(other)}))
    if isinstance(args.get("dim"), int):
        candidates.append(("dim 7", {**args, "dim": 7}))
    by_contract = [subject.op.fake]
    if not _raises(subject.op, subject.op.reference, args):
        by_contract.append(subject.op.reference)
    for what, wrong in candidates:
        if any(_raises(subject.op, fn, wrong) for fn in by_contract):
            yield what, wrong
    if any(v.dtype.is_floating_point for v in tensors.values()):
        for dtype in {torch.complex64, torch.float64} - kernel.dtypes:
            cast = {n: v.to(dtype) if v.dtype.is_floating_point else v for n, v in tensors.items()}
            yield f"{short(dtype)}, which is not declared,", {**args, **cast}


def _raises(op: Op, fn: Callable[..., Any], args: Mapping[str, Any]) -> bool:
    device = "meta" if fn is op.fake else "cpu"
    there = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in args.items()}
    try:
        op.call(fn, there)
    except Exception:  # whatever shape function or definition raise, they refuse
        return True
    return False


def raised(subject: Subject, args: Mapping[str, Any]) -> Exception | None:
    """What the call raises, if anything."""
    try:
        subject.run(args)
    except Exception as error:  # a kernel may raise anything
        return error
    return None


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
