"""Negative controls: plain jax, which varies with the batch, must be found to vary."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from batch_invariant_tpu.compile_check.compiler import Compiler, fingerprint

DOT = (14336, 4096)
"""K and N: a K long enough to be tiled."""


def controls(
    compiler: Compiler, dtype: str, batches: Sequence[int]
) -> Iterator[tuple[str, dict[int, str]]]:
    """Name and, by size of the batch, how the compiler adds; the values must not all be equal."""
    import jax.numpy as jnp

    from batch_invariant_tpu.jax import matmul

    k, n = DOT

    def shapes(m: int) -> list[tuple[tuple[int, ...], str]]:
        return [((m, k), dtype), ((k, n), dtype)]

    yield (
        "plain jnp.dot",
        {m: _dot_plan(compiler.compile(jnp.dot, shapes(m)).hlo) for m in batches},
    )
    yield (
        "plain jnp.mean",
        {
            m: compiler.compile(lambda x: jnp.mean(x, -1), [((m, 4096), dtype)]).trees
            for m in batches
        },
    )
    largest = max(batches)
    yield (
        "our matmul with its block of K taken from M",
        {
            m: fingerprint(
                compiler.compile(
                    lambda x, w, bk=256 if m == largest else 512: matmul(
                        x, w, block=(128, bk, 512)
                    ),
                    shapes(m),
                ),
                (1,),
            )
            for m in batches
        },
    )
    if compiler.generation in ("v5p", "v6e"):  # where this can be read off the program's text
        yield "plain psum", {m: _psum_plan(compiler, m) for m in batches}


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
