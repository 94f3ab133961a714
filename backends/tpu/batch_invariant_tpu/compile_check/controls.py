"""Negative controls: plain jax, which varies with the batch, must be found to vary."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from batch_invariant_tpu.compile_check.compiler import Compiler, fingerprint

DOT = (14336, 4096)
"""K and N: a K long enough to be tiled."""


Plans = dict[int, str]
Control = Callable[[Compiler, str, Sequence[int]], Plans]


def controls(generation: str) -> dict[str, Control]:
    """By name, what gives for every size of the batch how the compiler adds.

    The values must not all be equal.
    """
    found: dict[str, Control] = {
        "plain jnp.dot": _plain_dot,
        "plain jnp.mean": _plain_mean,
        "our matmul with its block of K taken from M": _block_from_batch,
    }
    if generation in ("v5p", "v6e"):  # where this can be read off the program's text
        found["plain psum"] = lambda compiler, dtype, batches: {
            m: _psum_plan(compiler, m) for m in batches
        }
    return found


def _product_shapes(m: int, dtype: str) -> list[tuple[tuple[int, ...], str]]:
    k, n = DOT
    return [((m, k), dtype), ((k, n), dtype)]


def _plain_dot(compiler: Compiler, dtype: str, batches: Sequence[int]) -> Plans:
    import jax.numpy as jnp

    return {m: _dot_plan(compiler.compile(jnp.dot, _product_shapes(m, dtype)).hlo) for m in batches}


def _plain_mean(compiler: Compiler, dtype: str, batches: Sequence[int]) -> Plans:
    import jax.numpy as jnp

    def mean(x: Any) -> Any:
        return jnp.mean(x, -1)

    return {m: compiler.compile(mean, [((m, 4096), dtype)]).trees for m in batches}


def _block_from_batch(compiler: Compiler, dtype: str, batches: Sequence[int]) -> Plans:
    from batch_invariant_tpu.jax import matmul

    def fingerprint_of(m: int) -> str:
        block = (128, 256 if m == max(batches) else 512, 512)
        made = compiler.compile(lambda x, w: matmul(x, w, block=block), _product_shapes(m, dtype))
        return fingerprint(made, (1,))

    return {m: fingerprint_of(m) for m in batches}


def _dot_plan(hlo: str) -> str:
    """How XLA adds over K in a plain product: the unit, and the tile of K and its steps."""
    if "convolution(" not in hlo:
        return "vector unit, multiply and reduce"
    for config in re.findall(r"backend_config=(\{.*\})\s*$", hlo, re.M):
        window = json.loads(config).get("window_config") or {}
        if len(window.get("iteration_bounds", ())) == 3:
            tile = 128 * int(window["input_window_bounds"][1])
            return f"matrix unit, {tile} x {window['iteration_bounds'][2]}"
    return "matrix unit, no window"


def _psum_plan(compiler: Compiler, m: int) -> str:
    """The algorithm that XLA chooses for an all-reduce of [m, 4096] bfloat16."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(compiler.devices), ("x",))
    nowhere = PartitionSpec()
    fn = jax.shard_map(
        lambda x: jax.lax.psum(x, "x"),
        mesh=mesh,
        in_specs=nowhere,
        out_specs=nowhere,
        check_vma=False,
    )
    shape = jax.ShapeDtypeStruct((m, 4096), "bfloat16", sharding=NamedSharding(mesh, nowhere))
    hlo = compiler.compile_lowered(jax.jit(fn).lower(shape)).hlo
    found = re.search(r'all-reduce\(.*"strategy":"(\w+)","debug":"\\n\w+\{(colors:\d+)', hlo)
    return " ".join(found.groups()) if found else "no all-reduce in the program"
