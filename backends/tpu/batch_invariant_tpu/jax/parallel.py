"""Tensor-parallel sums whose bits do not depend on the number of devices: gathered, never psum.

`psum` picks its algorithm, and with it the order of the additions, by the size of what is summed,
and adds in the dtype of the operand. Here K is cut into a fixed number of slices, whatever the
number of devices. Each slice is one fp32 product; slices are added as a balanced tree. A device
that has several slices adds its subtree, so one fp32 array per device is gathered.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from batch_invariant.errors import OpNotSupported
from batch_invariant_tpu.jax.launch import Interpret, check_dtype
from batch_invariant_tpu.jax.matmul import Block, matmul

SLICES = 8
"""The largest number of devices that share one product, and the number of slices on any of them."""


def _tree(parts: list[jax.Array]) -> jax.Array:
    """Neighbours added in pairs until one is left; the number of parts is a power of two."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def row_parallel_matmul(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    *,
    axis_name: str | None = None,
    slices: int = SLICES,
    dtype: Any = None,
    block: Block | None = None,
    interpret: Interpret = False,
) -> jax.Array:
    """`x @ w + bias` where K is split over the devices of a mesh axis, as after a sharded layer.

    Inside `jax.shard_map`: x [..., K / n], w [K / n, N], both the device's share, bias [N] whole;
    n devices, a divisor of `slices`, which is a power of two. Without `axis_name`: n = 1, with the
    same bits. The order is a function of (K, N, dtype, slices); so is the result, for every n.

    The sum of `slices` fp32 products in a balanced tree, plus the bias, rounded once to `dtype`
    (None: x's). block: that of a slice, as for `matmul`. Sends one fp32 [..., N] per device.
    """
    check_dtype("row_parallel_matmul", x, w, bias)
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    if slices < 1 or slices & (slices - 1) or slices % devices:
        raise OpNotSupported(
            f"row_parallel_matmul: {slices} slices on {devices} devices; slices must be a power "
            "of two and a multiple of the devices"
        )
    here = slices // devices
    share = x.shape[-1]
    if share % here or w.shape[0] != share:
        raise OpNotSupported(
            f"row_parallel_matmul: this device's x {list(x.shape)} and w {list(w.shape)} cannot "
            f"be cut into {here} slices of K; pad K with zeros to a multiple of {slices}"
        )
    size = share // here
    partial = _tree(
        [
            matmul(
                x[..., at : at + size],
                w[at : at + size],
                dtype=jnp.float32,
                block=block,
                interpret=interpret,
            )
            for at in range(0, share, size)
        ]
    )
    if axis_name is not None:
        gathered = lax.all_gather(partial, axis_name)
        partial = _tree([gathered[which] for which in range(devices)])
    if bias is not None:
        partial = partial + bias.astype(jnp.float32)
    return partial.astype(dtype or x.dtype)
