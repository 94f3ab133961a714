"""Matrix products: one kernel, one block of (K, N, dtype, generation), blocks of K ascending.

A block of K is added up by the matrix unit, in an order that is its own; the blocks are added to
the fp32 accumulator one after another. fp32 operands are multiplied in six bf16 passes
(`Precision.HIGHEST`), which is close to fp32 and not IEEE. M is padded to whole blocks, so the same
code computes a row whatever M is. Alpha, addend and bias are applied in fp32 before the one
rounding.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from batch_invariant.errors import OpNotSupported
from batch_invariant_tpu.jax.blocks import check_block, matmul_block
from batch_invariant_tpu.jax.launch import Interpret, check_dtype, generation, launch, pad
from batch_invariant_tpu.jax.reduce import sum as row_sum

Block = tuple[int, int, int]


def _kernel(
    alpha: float, beta: float, steps: int, transposed: bool, precision: Any, *refs: Any
) -> None:
    x_ref, w_ref, *addend, out_ref, acc_ref = refs
    k = pl.program_id(3)

    @pl.when(k == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    acc_ref[...] += lax.dot_general(
        x_ref[...],
        w_ref[...],
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )

    @pl.when(k == steps - 1)
    def _() -> None:
        y = acc_ref[...]
        y = y if alpha == 1 else y * alpha
        for ref in addend:
            extra = ref[...].astype(jnp.float32)
            y = y + (extra if beta == 1 else extra * beta)
        out_ref[...] = y.astype(out_ref.dtype)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7, 8))
def _product(
    x: jax.Array,
    w: jax.Array,
    addend: jax.Array | None,
    transposed: bool,
    block: Block,
    alpha: float,
    beta: float,
    dtype: str,
    interpret: Interpret,
) -> jax.Array:
    """[B, M, K] by [B, K, N], or [B, N, K] transposed, all multiples of their blocks."""
    bm, bk, bn = block
    batch, m, k = x.shape
    if interpret is True and batch > 1:
        # The plain interpreter copies whole operands at every step of the grid: one matrix at a
        # time takes a fiftieth of the time. Its other modes keep the batch in the grid.
        return _one_by_one(x, w, addend, transposed, block, alpha, beta, dtype)
    n = w.shape[1 if transposed else 2]
    specs = [pl.BlockSpec((None, bm, bk), lambda b, i, j, k: (b, i, k))]
    if transposed:
        specs.append(pl.BlockSpec((None, bn, bk), lambda b, i, j, k: (b, j, k)))
    else:
        specs.append(pl.BlockSpec((None, bk, bn), lambda b, i, j, k: (b, k, j)))
    args = [x, w]
    if addend is not None:
        args.append(addend)
        batched, high = addend.shape[0] > 1, addend.shape[1] > 1
        specs.append(
            pl.BlockSpec(
                (None, bm if high else 1, bn),
                lambda b, i, j, k: (b if batched else 0, i if high else 0, j),
            )
        )
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    (out,) = launch(
        functools.partial(_kernel, alpha, beta, k // bk, transposed, precision),
        args,
        name="bi_matmul",
        grid=(batch, m // bm, n // bn, k // bk),
        semantics=("parallel", "parallel", "parallel", "arbitrary"),
        in_specs=specs,
        out_specs=[pl.BlockSpec((None, bm, bn), lambda b, i, j, k: (b, i, j))],
        out_shape=[jax.ShapeDtypeStruct((batch, m, n), dtype)],
        scratch=[pltpu.VMEM((bm, bn), jnp.float32)],
        interpret=interpret,
    )
    return out


def _one_by_one(
    x: jax.Array,
    w: jax.Array,
    addend: jax.Array | None,
    transposed: bool,
    block: Block,
    alpha: float,
    beta: float,
    dtype: str,
) -> jax.Array:
    each = addend is not None and addend.shape[0] > 1

    def one(matrices: tuple[jax.Array, ...]) -> jax.Array:
        left, right, *own = (matrix[None] for matrix in matrices)
        added = own[0] if each else addend
        return _product(left, right, added, transposed, block, alpha, beta, dtype, True)[0]

    operands = (x, w) if addend is None or not each else (x, w, addend)
    out: jax.Array = lax.map(one, operands)
    return out


def _three(x: jax.Array) -> jax.Array:
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def product(
    x: jax.Array,
    w: jax.Array,
    addend: jax.Array | None = None,
    *,
    transposed: bool = False,
    alpha: float = 1,
    beta: float = 1,
    dtype: Any = None,
    block: Block | None = None,
    interpret: Interpret = False,
) -> jax.Array:
    """`alpha * (x @ w) + beta * addend` for [B, M, K] and [B, K, N], or [B, N, K] `transposed`.

    addend: [1 or B, 1 or M, N]. block: (bm, bk, bn), by default that of (K, N, dtype, generation).
    Not differentiable: `matmul` and `linear` are.
    """
    dtype = jnp.dtype(dtype or x.dtype).name
    (batch, m, k), n = x.shape, w.shape[1 if transposed else 2]
    if not batch * m * n or not k:
        nothing = jnp.zeros((batch, m, n), jnp.float32)
        if addend is not None:
            nothing = nothing + beta * addend.astype(jnp.float32)
        return nothing.astype(dtype)
    if block is None:
        block = matmul_block(k, n, str(x.dtype), generation(interpret))
    check_block(block, x.dtype.itemsize)
    bm, bk, bn = block
    x = pad(pad(x, 1, bm), 2, bk)
    w = pad(pad(w, 1, bn), 2, bk) if transposed else pad(pad(w, 1, bk), 2, bn)
    if addend is not None:
        addend = pad(addend, 2, bn)
        addend = pad(addend, 1, bm) if addend.shape[1] > 1 else addend
    out = _product(
        x, w, addend, transposed, (bm, bk, bn), float(alpha), float(beta), dtype, interpret
    )
    return out[:, :m, :n]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _matmul(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    transposed: bool,
    dtype: Any,
    block: Block | None,
    interpret: Interpret,
) -> jax.Array:
    lead = x.shape[:-1]
    if w.ndim == 2:
        left, right = x.reshape(1, math.prod(lead), x.shape[-1]), w[None]
    else:
        left, right = _three(x), _three(w)
    addend = None if bias is None else bias.reshape(1, 1, -1)
    out = product(
        left,
        right,
        addend,
        transposed=transposed,
        dtype=dtype,
        block=block,
        interpret=interpret,
    )
    return out.reshape(*lead, out.shape[-1])


def _fwd(
    x: jax.Array,
    w: jax.Array,
    bias: Any,
    transposed: bool,
    dtype: Any,
    block: Block | None,
    interpret: Interpret,
) -> tuple[jax.Array, Any]:
    return _matmul(x, w, bias, transposed, dtype, block, interpret), (x, w, bias)


def _bwd(
    transposed: bool, dtype: Any, block: Block | None, interpret: Interpret, saved: Any, g: Any
) -> tuple[Any, Any, Any]:
    x, w, bias = saved
    g = g.astype(x.dtype)
    grad_x = _matmul(g, w, None, not transposed, x.dtype, None, interpret)
    if w.ndim == 2:  # over all rows: it depends on the batch, and on nothing else
        flat_x, flat_g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    else:
        flat_x, flat_g = x, g
    left, right = (flat_g, flat_x) if transposed else (flat_x, flat_g)
    grad_w = _matmul(jnp.swapaxes(left, -1, -2), right, None, False, w.dtype, None, interpret)
    grad_bias = None
    if bias is not None:
        grad_bias = row_sum(g.reshape(-1, g.shape[-1]).T, interpret=interpret).astype(bias.dtype)
    return grad_x, grad_w, grad_bias


_matmul.defvjp(_fwd, _bwd)


def matmul(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    *,
    dtype: Any = None,
    block: Block | None = None,
    interpret: Interpret = False,
) -> jax.Array:
    """`x @ w + bias`, [..., M, K] by [K, N] or by [..., K, N] with the same leading dimensions.

    float32 or bfloat16, both alike; fp32 accumulation over blocks of K, ascending; the bias [N] is
    added in fp32; rounded once to `dtype` (None: the inputs'). block: (bm, bk, bn), None for that
    of (K, N, dtype, generation); one chosen from M breaks the promise.
    """
    check_dtype("matmul", x, w, bias)
    if w.ndim < 2 or x.ndim < 1 or x.shape[-1] != w.shape[-2]:
        raise OpNotSupported(f"matmul: {list(x.shape)} and {list(w.shape)} cannot be multiplied")
    if w.ndim > 2 and x.shape[:-2] != w.shape[:-2]:
        raise OpNotSupported(
            f"matmul: the leading dimensions of {list(x.shape)} and {list(w.shape)} differ; "
            "broadcast them first"
        )
    _check_bias("matmul", bias, w.shape[-1])
    return _matmul(x, w, bias, False, jnp.dtype(dtype or x.dtype), block, interpret)


def linear(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    dtype: Any = None,
    block: Block | None = None,
    interpret: Interpret = False,
) -> jax.Array:
    """`x @ weight.T + bias`: x [..., K], weight [N, K], bias [N] or None. As `matmul`."""
    check_dtype("linear", x, weight, bias)
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise OpNotSupported(
            f"linear: expected [..., K] and [N, K], got {list(x.shape)} and {list(weight.shape)}"
        )
    _check_bias("linear", bias, weight.shape[0])
    return _matmul(x, weight, bias, True, jnp.dtype(dtype or x.dtype), block, interpret)


def _check_bias(name: str, bias: jax.Array | None, n: int) -> None:
    if bias is not None and bias.shape != (n,):
        raise OpNotSupported(f"{name}: expected a bias of shape [{n}], got {list(bias.shape)}")
