"""Backward through the registered operator: a row's own gradient, and its accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from batch_invariant.ops.contract import Data, Op
from batch_invariant.proof.invariance import compare
from batch_invariant.proof.log import Log, shapes
from batch_invariant.proof.subject import Outputs, Subject, draw, widened
from batch_invariant.proof.transforms import variants

_TRANSFORMS = ("T1 population", "T3 neighbours")
_GRAD = "grad_output_{}"


def has_gradient(subject: Subject) -> bool:
    """Whether rows have a gradient of their own; that of an embedding's indices has none."""
    op = subject.op
    args = draw(op, op.cases[0], subject.dtype, Data.NORMAL, 1)
    return op.backward is not None and any(_floating(args.get(name)) for name in op.batch_axes)


def gradients(subject: Subject, log: Log) -> None:
    """The gradient of a row's own inputs keeps its bits, and every gradient is close to the exact.

    The bound is normwise: (N u32 + 8 eps) max |gradient|, with N the longest dimension, u32 the
    rounding of fp32 and eps that of the dtype.
    """
    op, backend = subject.op, subject.backend
    for case in subject.cases():
        args = draw(op, case, subject.dtype, Data.NORMAL)
        if not case.differentiable:
            log.compare(_refused(subject, args), f"backward at {shapes(args)}", case)
            continue
        out_axes = case.out_axes or op.out_axes
        axes = {**(case.batch_axes or op.batch_axes)}
        # The gradients of the outputs are rows too: they move with theirs.
        generator = torch.Generator().manual_seed(1)
        for which, out in enumerate(_differentiable(subject, args)):
            if out is not None:
                name = _GRAD.format(which)
                args[name] = torch.randn(out.shape, generator=generator).to(out.dtype)
                axes[name] = out_axes[which]
        leaves = [n for n, v in args.items() if _floating(v) and not n.startswith("grad_output_")]
        own = [n for n in leaves if n in axes]

        def run(call: Mapping[str, Any], names: list[str] = own) -> Outputs:
            found = _backward(op, op.overload, subject.native(call), names)
            return tuple(backend.to_torch(gradient) for gradient in found)

        base = run(args)
        for transform in _TRANSFORMS:
            for variant in variants(op, axes, args, transform):
                found = compare(base, run(variant.args), [axes[n] for n in own], variant)
                what = f"gradient of {', '.join(own)} at {shapes(args)}, {transform}"
                log.compare(found, f"{what}, {variant.label}", case, Data.NORMAL)
        exact = _backward(op, op.reference, widened(args), leaves)
        longest = max(
            size for v in args.values() if isinstance(v, torch.Tensor) for size in v.shape
        )
        unit = longest * 2.0**-24 + 8 * torch.finfo(subject.dtype).eps
        for name, got, want in zip(leaves, run(args, leaves), exact, strict=True):
            error = float((got.double() - want).abs().max())
            bound = unit * float(want.abs().max())
            found = None if error <= bound else f"off by {error:.3g}, and {bound:.3g} is allowed"
            log.compare(found, f"gradient of {name} at {shapes(args)}", case, Data.NORMAL)


def _refused(subject: Subject, args: Mapping[str, Any]) -> str | None:
    """None if backward raises with a message."""
    native = subject.native(args)
    for name, value in native.items():
        if _floating(value):
            native[name] = value.detach().requires_grad_()
    outputs = subject.op.call(subject.op.overload, native)
    try:
        outputs[0].sum().backward()
    except RuntimeError as error:
        return None if str(error).strip() else "raised without a word for the user"
    return "went through, and the case is declared to have no gradient"


def _differentiable(subject: Subject, args: Mapping[str, Any]) -> list[torch.Tensor | None]:
    """The outputs that have a gradient; None in the place of the others."""
    native = subject.native(args)
    for name, value in native.items():
        if _floating(value):
            native[name] = value.detach().requires_grad_()
    outputs = subject.op.call(subject.op.overload, native)
    return [out.detach() if out.requires_grad else None for out in outputs]


def _backward(
    op: Op, fn: Callable[..., Any], args: Mapping[str, Any], leaves: list[str]
) -> list[torch.Tensor]:
    call = {n: v for n, v in args.items() if not n.startswith("grad_output_")}
    for name in leaves:
        call[name] = call[name].detach().requires_grad_()
    outputs = op.call(fn, call)
    pairs = [
        (out, args[_GRAD.format(which)])
        for which, out in enumerate(outputs)
        if _GRAD.format(which) in args
    ]
    found = torch.autograd.grad(
        [out for out, _ in pairs],
        [call[name] for name in leaves],
        [gradient for _, gradient in pairs],
        allow_unused=True,
    )
    return [
        torch.zeros_like(call[n]) if g is None else g for n, g in zip(leaves, found, strict=True)
    ]


def _floating(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point
