"""How every kernel is launched: compiled for a TPU, or interpreted where the caller says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from batch_invariant.errors import OpNotSupported
from batch_invariant_tpu.jax.blocks import generation_of

Interpret = Any
"""False: compile for the TPU; jax refuses that on a CPU. True or a `pltpu.InterpretParams`: compute
on the CPU, slowly, to test wiring. Nothing here interprets unless it is told to."""

DTYPES = ("float32", "bfloat16")


def launch(
    kernel: Callable[..., None],
    args: Sequence[jax.Array],
    *,
    name: str,
    grid: Sequence[int],
    semantics: Sequence[str],
    in_specs: Sequence[Any],
    out_specs: Sequence[Any],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any] = (),
    scalars: int = 0,
    interpret: Interpret,
) -> list[jax.Array]:
    """`pl.pallas_call` with the compiler options that the promise rests on.

    shape_invariant_numerics is stated and not left to its default: without it the compiler splits
    a sum into as many accumulators as suit the shape. scalars: how many of the first arguments
    are prefetched to scalar memory.
    """
    out: list[jax.Array] = pl.pallas_call(
        kernel,
        name=name,
        interpret=interpret,
        out_shape=tuple(out_shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=scalars,
            grid=tuple(grid),
            in_specs=tuple(in_specs),
            out_specs=tuple(out_specs),
            scratch_shapes=tuple(scratch),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=tuple(semantics), shape_invariant_numerics=True
        ),
    )(*args)
    return list(out)


def generation(interpret: Interpret) -> str:
    """The generation whose blocks are used: that of the TPU here, or the interpreter's own.

    Raises `OpNotSupported` where neither is: a block for another TPU than the one that will compute
    would be another order of additions.
    """
    if interpret:
        return "interpreter"
    if jax.default_backend() != "tpu":
        raise OpNotSupported(
            f"a matrix product for a TPU, and jax computes on {jax.default_backend()!r} here; pass "
            "block=matmul_block(K, N, dtype, generation) of batch_invariant_tpu.jax.blocks to "
            "compile ahead of time, or interpret=True to test on this machine"
        )
    return generation_of(jax.devices()[0].device_kind)


def check_dtype(op: str, *arrays: jax.Array | None) -> None:
    """Raises `OpNotSupported` unless all arrays are of one supported dtype."""
    names = [str(a.dtype) for a in arrays if a is not None]
    if any(name not in DTYPES for name in names):
        raise OpNotSupported(
            f"{op} on TPU takes {' and '.join(DTYPES)}; got {', '.join(sorted(set(names)))}"
        )
    if len(set(names)) > 1:
        raise OpNotSupported(f"{op}: expected arrays of one dtype, got {', '.join(names)}")


def pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Zeros at the end of `axis`, up to a multiple."""
    extra = -x.shape[axis] % multiple
    if not extra:
        return x
    return jnp.pad(x, [(0, extra if a == axis % x.ndim else 0) for a in range(x.ndim)])
