"""rms_norm, layer_norm and group_norm, in the order of `rows.py`.

Lane sums of rounded squares, divided by n; one over the root; multiplications left to right; one
rounding. Without a weight there is none: no ones are read or multiplied.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from batch_invariant.errors import OpNotSupported
from batch_invariant_tpu.jax.launch import Interpret, check_dtype
from batch_invariant_tpu.jax.reduce import sum as row_sum
from batch_invariant_tpu.jax.rows import RowProgram, Statistic, divided, rounded, run


def _reciprocal_root(n: int, eps: float, squares: jax.Array) -> jax.Array:
    """1 / sqrt(squares / n + eps), each step rounded: not the `rsqrt` that XLA would make of it."""
    return 1.0 / rounded(jnp.sqrt(divided(squares, n) + eps))


@functools.cache
def _rms_program(size: int, eps: float, weight: bool, residual: bool, stats: bool) -> RowProgram:
    def total(tiles: Any) -> jax.Array:
        return tiles[0] + tiles[1] if residual else tiles[0]

    def square(tiles: Any, found: Any) -> jax.Array:
        s = total(tiles)
        return rounded(s * s)

    def result(tiles: Any, found: Any, shared: Any) -> list[jax.Array]:
        s = total(tiles)
        out = s * found[0]
        out = out * shared[0] if weight else out
        return [out, s] if residual else [out]

    rstd = Statistic(square, functools.partial(_reciprocal_root, size, eps), first=size)
    if stats:
        return RowProgram("rms_rstd", (rstd,), lambda t, found, s: [found[0]], reduces=True)
    return RowProgram("rms_norm", (rstd,), result)


@functools.cache
def _layer_program(n: int, eps: float, weight: bool, bias: bool, which: str) -> RowProgram:
    def result(tiles: Any, found: Any, shared: Any) -> list[jax.Array]:
        out = (tiles[0] - found[0]) * found[1]
        out = rounded(out * shared[0]) if weight else rounded(out)
        return [out + shared[-1] if bias else out]

    def square(tiles: Any, found: Any) -> jax.Array:
        centred = tiles[0] - found[0]
        return rounded(centred * centred)

    average = Statistic(lambda tiles, found: tiles[0], lambda sums: divided(sums, n))
    rstd = Statistic(square, functools.partial(_reciprocal_root, n, eps))
    if which == "stats":
        return RowProgram("layer_stats", (average, rstd), lambda t, found, s: found, reduces=True)
    return RowProgram("layer_norm", (average, rstd), result)


def _flat(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else x.reshape(-1, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _rms_norm(
    x: jax.Array, weight: Any, residual: Any, eps: float, size: int, interpret: Interpret
) -> tuple[jax.Array, ...]:
    program = _rms_program(size, eps, weight is not None, residual is not None, False)
    rows = [x] if residual is None else [x, residual]
    vectors = [] if weight is None else [weight]
    flat = [r.reshape(-1, r.shape[-1]) for r in rows]
    outs = run(program, flat, vectors, [x.dtype] * len(rows), interpret)
    return tuple(out.reshape(x.shape) for out in outs)


def _rms_fwd(
    x: jax.Array, weight: Any, residual: Any, eps: float, size: int, interpret: Interpret
) -> tuple[tuple[jax.Array, ...], Any]:
    return _rms_norm(x, weight, residual, eps, size, interpret), (x, weight, residual)


def _rms_bwd(
    eps: float, size: int, interpret: Interpret, saved: Any, grads: Any
) -> tuple[Any, Any, Any]:
    x, weight, residual = saved
    n = x.shape[-1]
    s = x.astype(jnp.float32)
    rows = [_flat(x)]
    if residual is not None:
        s = s + residual.astype(jnp.float32)
        rows.append(_flat(residual))
    g = grads[0].astype(jnp.float32)
    program = _rms_program(size, eps, False, residual is not None, True)
    (r,) = run(program, rows, [], [jnp.float32], interpret)
    r = r.reshape(*x.shape[:-1], 1)
    gw = g if weight is None else g * weight.astype(jnp.float32)
    inner = row_sum(gw * s, interpret=interpret)[..., None] * r * r * r / size
    gs = gw * r - jnp.where(jnp.arange(n) < size, inner * s, 0.0)
    if residual is not None:
        gs = gs + grads[1].astype(jnp.float32)
    g_weight = None
    if weight is not None:  # over all rows, so it depends on the batch, and on nothing else
        terms = (g * s * r).reshape(-1, n)
        g_weight = row_sum(terms.T, interpret=interpret).astype(weight.dtype)
    return gs.astype(x.dtype), g_weight, None if residual is None else gs.astype(residual.dtype)


_rms_norm.defvjp(_rms_fwd, _rms_bwd)


def rms_norm(
    x: jax.Array,
    weight: jax.Array | None = None,
    eps: float | None = None,
    *,
    residual: jax.Array | None = None,
    variance_size: int | None = None,
    interpret: Interpret = False,
) -> Any:
    """`s / sqrt(mean(s^2) + eps) * weight` over the last dimension, with `s = x + residual`.

    x, residual: [..., n], float32 or bfloat16, weight: [n] or None, of either; eps None is the
    machine epsilon of fp32. The mean square is that of the first `variance_size` columns (None:
    all). Returns [..., n] in x's dtype; with a residual, the pair of that
    and `s` rounded. The norm uses the unrounded fp32 `s`.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """
    check_dtype("rms_norm", x, residual)
    check_dtype("rms_norm", weight)
    _check_shape("rms_norm", "weight", weight, x.shape[-1:])
    _check_shape("rms_norm", "residual", residual, x.shape)
    eps = float(jnp.finfo(jnp.float32).eps) if eps is None else float(eps)
    if not x.size:
        return x if residual is None else (x, residual)
    size = x.shape[-1] if variance_size is None else variance_size
    if not 0 < size <= x.shape[-1]:
        raise OpNotSupported(f"rms_norm: variance_size must be in 1..{x.shape[-1]}, got {size}")
    outs = _rms_norm(x, weight, residual, eps, size, interpret)
    return outs[0] if residual is None else outs


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(
    x: jax.Array, weight: Any, bias: Any, eps: float, interpret: Interpret
) -> jax.Array:
    n = x.shape[-1]
    program = _layer_program(n, eps, weight is not None, bias is not None, "result")
    vectors = [p for p in (weight, bias) if p is not None]
    return run(program, [x.reshape(-1, n)], vectors, [x.dtype], interpret)[0].reshape(x.shape)


def _layer_fwd(
    x: jax.Array, weight: Any, bias: Any, eps: float, interpret: Interpret
) -> tuple[jax.Array, Any]:
    return _layer_norm(x, weight, bias, eps, interpret), (x, weight, bias)


def _layer_bwd(eps: float, interpret: Interpret, saved: Any, g: jax.Array) -> tuple[Any, Any, Any]:
    x, weight, bias = saved
    n = x.shape[-1]
    mean, rstd = layer_norm_statistics(x, eps, interpret=interpret)
    normal = (x.astype(jnp.float32) - mean[..., None]) * rstd[..., None]
    g = g.astype(jnp.float32)
    gw = g if weight is None else g * weight.astype(jnp.float32)
    first = row_sum(gw, interpret=interpret)[..., None] / n
    second = row_sum(gw * normal, interpret=interpret)[..., None] / n
    gx = rstd[..., None] * (gw - first - normal * second)

    def over_rows(terms: jax.Array, like: Any) -> Any:
        if like is None:
            return None
        return row_sum(terms.reshape(-1, n).T, interpret=interpret).astype(like.dtype)

    return gx.astype(x.dtype), over_rows(g * normal, weight), over_rows(g, bias)


_layer_norm.defvjp(_layer_fwd, _layer_bwd)


def layer_norm(
    x: jax.Array,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    eps: float = 1e-5,
    *,
    interpret: Interpret = False,
) -> jax.Array:
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension; biased variance.

    x: [..., n], float32 or bfloat16; weight, bias: [n] or None. Two passes: the fp32 mean, then the
    lane sum of the rounded squares of what is left. One rounding.

    Source: Ba, Kiros and Hinton, Layer Normalization, 2016.
    """
    check_dtype("layer_norm", x)
    for name, p in (("weight", weight), ("bias", bias)):
        check_dtype("layer_norm", p)
        _check_shape("layer_norm", name, p, x.shape[-1:])
    if not x.size:
        return x
    return _layer_norm(x, weight, bias, float(eps), interpret)


def layer_norm_statistics(
    x: jax.Array, eps: float = 1e-5, *, interpret: Interpret = False
) -> tuple[jax.Array, jax.Array]:
    """The mean and the reciprocal deviation over the last dimension, [...] in fp32 each."""
    check_dtype("layer_norm_statistics", x)
    n = x.shape[-1]
    if not x.size:
        nothing = jnp.full(x.shape[:-1], jnp.nan, jnp.float32)
        return nothing, nothing
    program = _layer_program(n, float(eps), False, False, "stats")
    outs = run(program, [x.reshape(-1, n)], [], [jnp.float32] * 2, interpret)
    mean, rstd = (out.reshape(x.shape[:-1]) for out in outs)
    return mean, rstd


_AFFINE = RowProgram(
    "affine", (), lambda tiles, found, shared: [rounded(tiles[0] * tiles[1]) + tiles[2]]
)
_SCALED = RowProgram("scaled", (), lambda tiles, found, shared: [tiles[0] * tiles[1]])
_SHIFTED = RowProgram("shifted", (), lambda tiles, found, shared: [tiles[0] + tiles[1]])


def group_norm(
    x: jax.Array,
    num_groups: int,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    eps: float = 1e-5,
    *,
    interpret: Interpret = False,
) -> jax.Array:
    """Each group of channels of [B, C, ...] normalised as by `layer_norm`; without a gradient.

    weight, bias: [C] or None. Rounded once, after weight and bias, which a second kernel applies.
    """
    check_dtype("group_norm", x)
    for name, p in (("weight", weight), ("bias", bias)):
        check_dtype("group_norm", p)
        _check_shape("group_norm", name, p, x.shape[1:2])
    if x.ndim < 2 or num_groups <= 0 or x.shape[1] % num_groups:
        raise OpNotSupported(
            "group_norm: expected [B, C, ...] with C a multiple of num_groups, got "
            f"{list(x.shape)} and num_groups={num_groups}"
        )
    if not x.size:
        return x
    rows = x.reshape(x.shape[0] * num_groups, -1)
    n = rows.shape[1]
    given = [p for p in (weight, bias) if p is not None]
    program = _layer_program(n, float(eps), False, False, "result")
    (out,) = run(program, [rows], [], [jnp.float32 if given else x.dtype], interpret)
    if given:
        spread = [
            jnp.broadcast_to(p.reshape(1, -1, *(1,) * (x.ndim - 2)), x.shape).reshape(rows.shape)
            for p in given
        ]
        last = _AFFINE if len(given) == 2 else _SHIFTED if weight is None else _SCALED
        (out,) = run(last, [out, *spread], [], [x.dtype], interpret)
    return out.reshape(x.shape)


def _check_shape(op: str, name: str, p: jax.Array | None, shape: tuple[int, ...]) -> None:
    if p is not None and p.shape != tuple(shape):
        raise OpNotSupported(f"{op}: expected {name} of shape {list(shape)}, got {list(p.shape)}")
