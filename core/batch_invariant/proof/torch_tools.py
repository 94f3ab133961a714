"""The kernel behind torch's own machinery: dispatcher, opcheck, torch.compile, CUDA graphs."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from batch_invariant import mode, selector
from batch_invariant.ops.bits import difference
from batch_invariant.ops.contract import Data
from batch_invariant.proof.log import Log, shapes
from batch_invariant.proof.subject import Outputs, Subject, draw

_FEW = 3
_OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
_AUTOGRAD = ("test_autograd_registration",)
"""Torch has this one for its own devices alone; elsewhere it fails with "NYI"."""


def dispatch(subject: Subject, log: Log) -> None:
    """`torch.ops.batch_invariant.<op>` on the device gives the kernel's bits; so with the mode on.

    With the mode on, what a kernel itself calls of torch is overridden or refused.
    """
    op = subject.op
    for case in subject.cases():
        selector.kernels(subject.backend.device_type)  # leaving the mode deactivates the backend
        args = draw(op, case, subject.dtype, Data.CANCELLING, _FEW)
        before = subject.run(args)
        found = difference(before, _through(subject, op.overload, args))
        log.compare(found, f"the registered operator at {shapes(args)}", case)
        try:
            with mode.enabled():
                after = _through(subject, op.overload, args)
            found = difference(before, after)
        except Exception as error:  # whatever the kernel meets there
            found = f"{type(error).__name__}: {error}"
        log.compare(found, f"with the mode on, the registered operator at {shapes(args)}", case)


def opcheck(subject: Subject, log: Log) -> None:
    """`torch.library.opcheck`: schema, autograd registration, fake tensors, AOT dispatch."""
    case = subject.op.cases[0]
    args = subject.native(draw(subject.op, case, subject.dtype, Data.NORMAL, _FEW))
    leaves = {
        name: value.clone().requires_grad_()
        if isinstance(value, torch.Tensor)
        and value.dtype.is_floating_point
        and subject.op.backward is not None
        else value
        for name, value in args.items()
    }
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    for argument in subject.op.overload._schema.arguments:
        if not argument.kwarg_only:
            positional.append(leaves[argument.name])
        elif argument.name in leaves:
            keywords[argument.name] = leaves[argument.name]
    own = subject.backend.device_type in ("cpu", "cuda", "xpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.library.opcheck(
            subject.op.overload,
            tuple(positional),
            keywords,
            test_utils=_OPCHECKS + (_AUTOGRAD if own else ()),
            raise_exception=False,
        )
    for name, verdict in found.items():
        wrong = None if verdict == "SUCCESS" else str(verdict).strip().splitlines()[-1]
        log.compare(wrong, f"torch.library.opcheck, {name}", case)


def compiled(subject: Subject, log: Log) -> None:
    """Inside `torch.compile` the operator gives the bits that it gives in eager."""
    case = subject.op.cases[0]
    cuda = subject.backend.device_type == "cuda"
    # Inductor needs a C++ compiler on a CPU; what it does with an opaque operator is the same.
    through = "inductor" if cuda else "aot_eager"
    torch.compiler.reset()
    run = torch.compile(subject.op.overload, fullgraph=True, backend=through)
    for rows in (_FEW, 17):
        args = draw(subject.op, case, subject.dtype, Data.CANCELLING, rows)
        found = difference(subject.run(args), _through(subject, run, args))
        log.compare(found, f"compiled by {through} at {shapes(args)}", case)
    torch.compiler.reset()


def graph_replay(subject: Subject, log: Log) -> None:
    """A captured CUDA graph, replayed with other values, gives the bits of an eager call."""
    case = subject.op.cases[0]
    first = draw(subject.op, case, subject.dtype, Data.NORMAL)
    second = draw(subject.op, case, subject.dtype, Data.CANCELLING)
    native = subject.native(first)
    assert subject.kernel is not None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        subject.op.call(subject.kernel.fn, native)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = subject.op.call(subject.kernel.fn, native)
    for args in (second, first):
        for name, value in subject.native(args).items():
            if isinstance(value, torch.Tensor):
                native[name].copy_(value)
        graph.replay()
        out = tuple(subject.backend.to_torch(tensor) for tensor in captured)
        log.compare(difference(out, subject.run(args)), f"replayed at {shapes(args)}", case)


def _through(subject: Subject, fn: Any, args: dict[str, Any]) -> Outputs:
    out = subject.op.call(fn, subject.native(args))
    return tuple(subject.backend.to_torch(tensor) for tensor in out)
