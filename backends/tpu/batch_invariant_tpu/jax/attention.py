"""Attention: the keys in fixed chunks by absolute position, ascending, with a running maximum.

One program computes the queries of one key head (all its query heads, so keys are read once), in
blocks of 128 rows. A key that takes no part adds exactly nothing, and chunks without any are passed
over, so a row does not depend on padding, on the queries beside it, nor on the keys behind its own:
prefill, chunked prefill and decode have one order. In a chunk: scores by the matrix unit; maximum
and sum over the 256 keys folded by halves as in `rows.py`; weights by values with the weights in
three bf16 parts (fp32: HIGHEST), so that no weight is rounded to bf16.
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
from batch_invariant_tpu.jax.blocks import LANE, VMEM
from batch_invariant_tpu.jax.launch import Interpret, check_dtype, launch, pad
from batch_invariant_tpu.jax.matmul import product
from batch_invariant_tpu.jax.reduce import sum as row_sum
from batch_invariant_tpu.jax.rows import fold

CHUNK = 256
"""Keys of a chunk; part of the order, so one number for all."""

ROWS = 128
"""Query rows of a block; constant because a flat block has another order on TPU7x."""


def _dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (contract,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _weighted(p: jax.Array, v: jax.Array) -> jax.Array:
    """p @ v, with p in fp32."""
    if v.dtype == jnp.float32:
        return _dot(p, v, 0)
    high = p.astype(jnp.bfloat16)
    rest = p - high.astype(jnp.float32)
    middle = rest.astype(jnp.bfloat16)
    low = (rest - middle.astype(jnp.float32)).astype(jnp.bfloat16)
    return (_dot(low, v, 0) + _dot(middle, v, 0)) + _dot(high, v, 0)


def _kernel(
    scale: float,
    causal: bool,
    group: int,
    chunks: int,
    masked: bool,
    lengths_ref: Any,
    offsets_ref: Any,
    *refs: Any,
) -> None:
    q_ref, k_ref, v_ref, *mask_refs, out_ref, lse_ref, top_ref, sum_ref, acc_ref = refs
    batch, block, chunk = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    length, offset = lengths_ref[batch], offsets_ref[batch]
    first = chunk * CHUNK

    @pl.when(chunk == 0)
    def _() -> None:
        top_ref[...] = jnp.full(top_ref.shape, -jnp.inf, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    end = length
    if causal:
        last_query = lax.div(block * ROWS + ROWS - 1, group) + offset
        end = jnp.minimum(end, last_query + 1)

    @pl.when(first < end)
    def _() -> None:
        scores = _dot(q_ref[...], k_ref[...], 1) * scale  # [ROWS, CHUNK]
        key = lax.broadcasted_iota(jnp.int32, scores.shape, 1) + first
        seen = key < length
        if causal:
            row = lax.broadcasted_iota(jnp.int32, scores.shape, 0) + block * ROWS
            seen = jnp.logical_and(seen, key <= lax.div(row, jnp.full_like(row, group)) + offset)
        if masked:
            mask = mask_refs[0][...]
            seen = jnp.logical_and(seen, mask != -jnp.inf)
            scores = scores + mask
        scores = jnp.where(seen, scores, -jnp.inf)
        top = jnp.maximum(top_ref[...], fold(scores, jnp.maximum))  # [ROWS, 128], all alike
        base = jnp.where(top == -jnp.inf, 0.0, top)
        keep = jnp.exp(top_ref[...] - base)
        weights = jnp.exp(scores - base[:, :1])
        total = fold(weights, lambda a, b: a + b)
        # A weight of zero times what happens to lie behind the last key must be zero.
        real = lax.broadcasted_iota(jnp.int32, v_ref.shape, 0) + first < length
        values = jnp.where(real, v_ref[...], jnp.zeros_like(v_ref[...]))
        top_ref[...] = top
        sum_ref[...] = sum_ref[...] * keep + total
        acc_ref[...] = acc_ref[...] * keep[:, :1] + _weighted(weights, values)

    @pl.when(chunk == chunks - 1)
    def _() -> None:
        total = sum_ref[...]
        none = total == 0
        whole = jnp.where(none, 1.0, total)
        out_ref[...] = (acc_ref[...] / whole[:, :1]).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(none, -jnp.inf, jnp.log(whole) + top_ref[...])


@functools.partial(jax.jit, static_argnums=(6, 7, 8, 9))
def _call(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    lengths: jax.Array,
    offsets: jax.Array,
    scale: float,
    causal: bool,
    group: int,
    interpret: Interpret,
) -> tuple[jax.Array, jax.Array]:
    """q [B, Hkv, R, E], k [B, Hkv, S, E], v [B, Hkv, S, Ev], padded; mask [1|B, 1|Hkv, R, S]."""
    batch, heads, rows, size = q.shape
    keys, value_size = v.shape[2:]
    chunks = keys // CHUNK
    if interpret is True and batch > 1:
        # As in `matmul.py`: the plain interpreter copies all of the operands at every step.
        each = mask is not None and mask.shape[0] > 1

        def one(sequence: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            *arrays, length, offset = (x[None] for x in sequence)
            own = arrays[3] if each else mask
            inputs = (*arrays[:3], own, length, offset)
            out, lse = _call(*inputs, scale, causal, group, True)
            return out[0], lse[0]

        masks = (mask,) if each else ()
        found: tuple[jax.Array, jax.Array] = lax.map(one, (q, k, v, *masks, lengths, offsets))
        return found

    def at_query(b: Any, h: Any, i: Any, c: Any, *scalars: Any) -> tuple[Any, ...]:
        return b, h, i, 0

    def at_key(b: Any, h: Any, i: Any, c: Any, *scalars: Any) -> tuple[Any, ...]:
        return b, h, c, 0

    specs = [
        pl.BlockSpec((None, None, ROWS, size), at_query),
        pl.BlockSpec((None, None, CHUNK, size), at_key),
        pl.BlockSpec((None, None, CHUNK, value_size), at_key),
    ]
    args = [lengths, offsets, q, k, v]
    if mask is not None:
        many, each = mask.shape[0] > 1, mask.shape[1] > 1

        def at_mask(b: Any, h: Any, i: Any, c: Any, *scalars: Any) -> tuple[Any, ...]:
            return b if many else 0, h if each else 0, i, c

        specs.append(pl.BlockSpec((None, None, ROWS, CHUNK), at_mask))
        args.append(mask)
    out, lse = launch(
        functools.partial(_kernel, scale, causal, group, chunks, mask is not None),
        args,
        name="bi_attention",
        grid=(batch, heads, rows // ROWS, chunks),
        semantics=("parallel", "parallel", "parallel", "arbitrary"),
        in_specs=specs,
        out_specs=[
            pl.BlockSpec((None, None, ROWS, value_size), at_query),
            pl.BlockSpec((None, None, ROWS, LANE), at_query),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, rows, value_size), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, rows, LANE), jnp.float32),
        ],
        scratch=[
            pltpu.VMEM((ROWS, LANE), jnp.float32),
            pltpu.VMEM((ROWS, LANE), jnp.float32),
            pltpu.VMEM((ROWS, value_size), jnp.float32),
        ],
        scalars=2,
        interpret=interpret,
    )
    return out, lse[..., 0]


def _in_groups(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, H, L, X] -> [B, Hkv, L * group, X]: the rows of one key head, by position."""
    batch, heads, length, size = x.shape
    x = x.reshape(batch, kv_heads, heads // kv_heads, length, size)
    return x.swapaxes(2, 3).reshape(batch, kv_heads, -1, size)


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    lengths: jax.Array,
    offsets: jax.Array,
    scale: float,
    causal: bool,
    interpret: Interpret,
) -> tuple[jax.Array, jax.Array]:
    batch, heads, length, _ = q.shape
    kv_heads, _, value_size = v.shape[1:]
    group = heads // kv_heads
    rows = length * group
    if mask is not None:
        shared = mask.shape[1] == 1
        mask = jnp.repeat(mask, group, axis=2) if shared else _in_groups(mask, kv_heads)
        mask = pad(pad(mask, 2, ROWS), 3, CHUNK)
    out, lse = _call(
        pad(_in_groups(q, kv_heads), 2, ROWS),
        pad(k, 2, CHUNK),
        pad(v, 2, CHUNK),
        mask,
        lengths,
        offsets,
        scale,
        causal,
        group,
        interpret,
    )
    out = out[:, :, :rows].reshape(batch, kv_heads, length, group, value_size)
    lse = lse[:, :, :rows].reshape(batch, kv_heads, length, group)
    return (
        out.swapaxes(2, 3).reshape(batch, heads, length, value_size),
        lse.swapaxes(2, 3).reshape(batch, heads, length),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attention(
    q: Any, k: Any, v: Any, mask: Any, lengths: Any, offsets: Any, scale: Any, causal: Any, how: Any
) -> tuple[jax.Array, jax.Array]:
    return _forward(q, k, v, mask, lengths, offsets, scale, causal, how)


def _fwd(*args: Any) -> tuple[Any, Any]:
    out, lse = _forward(*args)
    return (out, lse), (*args[:6], out, lse)


def _bwd(scale: float, causal: bool, interpret: Interpret, saved: Any, grads: Any) -> Any:
    """The derivative through whole score matrices, by the invariant products and sums."""
    q, k, v, mask, lengths, offsets, out, lse = saved
    g = grads[0].astype(jnp.float32)
    batch, heads, length, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[-2:]).astype(jnp.float32)

    def full(x: jax.Array) -> jax.Array:
        return flat(jnp.repeat(x, group, axis=1))

    def dot(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
        return product(a, b, transposed=transposed, interpret=interpret)

    key = jnp.arange(keys)
    seen = key < lengths[:, None, None, None]
    if causal:
        query = jnp.arange(length)[:, None] + offsets[:, None, None, None]
        seen = jnp.logical_and(seen, key <= query)
    scores = dot(flat(q), full(k), True).reshape(batch, heads, length, keys) * scale
    if mask is not None:
        scores = scores + mask
        seen = jnp.logical_and(seen, mask != -jnp.inf)
    safe = jnp.where(lse == -jnp.inf, 0.0, lse)[..., None]
    p = jnp.where(seen, jnp.exp(scores - safe), 0.0)
    weights, upstream = flat(p), flat(g)
    inner = row_sum(g * out.astype(jnp.float32), interpret=interpret)[..., None]
    if grads[1] is not None:
        inner = inner - grads[1].astype(jnp.float32)[..., None]
    each = dot(upstream, full(v), True).reshape(p.shape)
    slope = flat(p * (each - inner) * scale)

    def of_group(x: jax.Array, like: jax.Array) -> jax.Array:
        parts = x.reshape(batch, kv_heads, group, keys, -1)
        total = parts[:, :, 0]
        for which in range(1, group):  # query heads of one key head, in their order
            total = total + parts[:, :, which]
        return total.astype(like.dtype)

    return (
        dot(slope, full(k)).reshape(q.shape).astype(q.dtype),
        of_group(dot(slope.swapaxes(1, 2), flat(q)), k),
        of_group(dot(weights.swapaxes(1, 2), upstream), v),
        None if mask is None else jnp.zeros_like(mask),
        None,
        None,
    )


_attention.defvjp(_fwd, _bwd)


def _check_sizes(size: int, value_size: int, itemsize: int) -> None:
    """Raises `OpNotSupported` for heads whose blocks do not fit the memory of a TPU."""
    needed = itemsize * (ROWS + CHUNK) * (size + value_size)
    needed += 4 * ROWS * (value_size + 3 * CHUNK + 3 * LANE)
    if needed > VMEM:
        raise OpNotSupported(
            f"attention: heads of {size} and {value_size} need {needed / 2**20:.1f} MiB of a TPU's "
            f"vector memory, and {VMEM >> 20} MiB are there; split the heads"
        )


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    causal: bool = False,
    kv_lengths: jax.Array | None = None,
    q_offsets: jax.Array | None = None,
    scale: float | None = None,
    with_lse: bool = False,
    interpret: Interpret = False,
) -> Any:
    """softmax(q @ k.T * scale + mask) @ v for [B, H, L, E], [B, Hkv, S, E] and [B, Hkv, S, Ev].

    H is a multiple of Hkv. mask: bool (True takes part) or additive, broadcastable to [B, H, L, S];
    it has no gradient. causal: query i sees the keys up to i + q_offsets[b]. kv_lengths [B]: keys
    from there on take no part, whatever they hold; so a padded cache may be passed whole. Returns
    [B, H, L, Ev], with `with_lse` also the fp32 logarithms of the denominators, [B, H, L].

    Source: Vaswani et al., Attention Is All You Need, 2017; the running maximum: Milakov and
    Gimelshein, Online normalizer calculation for softmax, 2018.
    """
    check_dtype("attention", q, k, v)
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise OpNotSupported(f"attention: expected [batch, heads, length, size], got {shapes}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise OpNotSupported(f"attention: these do not fit together: {shapes}")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise OpNotSupported(f"attention: query heads are no multiple of the key heads: {shapes}")
    batch, heads, length, size = q.shape
    keys = k.shape[2]
    _check_sizes(size, v.shape[3], q.dtype.itemsize)
    if mask is not None:
        if mask.dtype == jnp.bool_:
            mask = jnp.where(mask, 0.0, -jnp.inf)
        mask = mask.astype(jnp.float32).reshape((1,) * (4 - mask.ndim) + mask.shape)
        lead = tuple(
            1 if n == 1 else full for n, full in zip(mask.shape[:2], q.shape[:2], strict=True)
        )
        mask = jnp.broadcast_to(mask, (*lead, length, keys))
    if not q.size or not v.size:
        out = jnp.zeros((batch, heads, length, v.shape[3]), q.dtype)
        lse = jnp.full((batch, heads, length), -jnp.inf, jnp.float32)
        return (out, lse) if with_lse else out
    lengths = jnp.full((batch,), keys, jnp.int32) if kv_lengths is None else kv_lengths
    offsets = jnp.zeros((batch,), jnp.int32) if q_offsets is None else q_offsets
    scale = 1 / math.sqrt(size) if scale is None else float(scale)
    out, lse = _attention(
        q,
        k,
        v,
        mask,
        jnp.minimum(lengths, keys).astype(jnp.int32),
        offsets.astype(jnp.int32),
        scale,
        causal,
        interpret,
    )
    return (out, lse) if with_lse else out
