"""Kernels for tensors on the device `tpu` of TorchTPU: each call is one of its Pallas operators.

`torch.tpu.pallas.jax_op` turns a function of jax arrays into a torch operator whose program runs on
the device. What is not an array (dims, scales, dtypes) is bound before, so an operator is made once
for each such choice. Written after TorchTPU's interface and tried with a stand-in for it, never on
a TPU.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch

from batch_invariant.errors import BackendUnavailable
from batch_invariant_tpu.exchange import widened

_count = itertools.count()


def run(op: str, fn: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Calls `fn` on TorchTPU's tensors, on their device; compiled, never interpreted."""
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    if strange := {str(t.device) for t in tensors if t.device.type != "tpu"}:
        raise BackendUnavailable(
            "tpu",
            f"{op} got tensors on {', '.join(sorted(strange))}; it computes on 'tpu' tensors",
            "move them with .to('tpu'), or check on CPU tensors with `bi verify --backend tpu`",
        )
    spots = tuple(_TENSOR if isinstance(value, torch.Tensor) else _frozen(value) for value in args)
    bound = tuple((name, _frozen(value)) for name, value in sorted(keywords.items()))
    given = [t.to(torch.int32) if t.dtype == torch.int64 else t for t in tensors]  # indices
    out = _operator(op, fn, spots, bound)(*given)
    if isinstance(out, torch.Tensor):
        return widened(out)
    return tuple(widened(t) for t in out)


class _Tensor:
    """Marks where a tensor stands among the arguments."""


_TENSOR = _Tensor()


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@functools.cache
def _operator(
    op: str, fn: Callable[..., Any], spots: tuple[Any, ...], bound: tuple[tuple[str, Any], ...]
) -> Callable[..., Any]:
    module: Any = getattr(torch, "tpu", None)
    jax_op = getattr(getattr(module, "pallas", None), "jax_op", None)
    if jax_op is None:
        raise BackendUnavailable(
            "tpu",
            "this torch has no torch.tpu.pallas.jax_op, by which TorchTPU runs Pallas kernels",
            "install torch-tpu 0.2.0 or newer (Python 3.12 or newer)",
        )
    return jax_op(f"batch_invariant_tpu::{op}_{next(_count)}", _positional(fn, spots, bound))


def _positional(
    fn: Callable[..., Any], spots: tuple[Any, ...], bound: tuple[tuple[str, Any], ...]
) -> Callable[..., Any]:
    """`fn` as a function of its arrays alone, annotated as TorchTPU reads it."""
    import inspect

    import jax

    def of_arrays(*arrays: jax.Array) -> Any:
        given = iter(arrays)
        args = [next(given) if spot is _TENSOR else spot for spot in spots]
        return fn(*args, **dict(bound), how=False)

    names = [f"array{i}" for i, spot in enumerate(spots) if spot is _TENSOR]
    of_arrays.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=jax.Array)
            for name in names
        ]
    )
    of_arrays.__annotations__ = dict.fromkeys(names, jax.Array)
    return of_arrays
