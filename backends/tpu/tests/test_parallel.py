"""Sums over devices: the same bits on 1, 2, 4 and 8 of them, where psum has others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from batch_invariant.errors import OpNotSupported
from batch_invariant_tpu import jax as bi
from batch_invariant_tpu.interpreter_check import bits

K, N = 1040, 96
_GENERATOR = np.random.default_rng(0)
_X = _GENERATOR.standard_normal((5, K)).astype(np.float32)
_X[:, 3], _X[:, 900] = 2.0**20, -(2.0**20)
X = jnp.asarray(_X)
W = jnp.asarray(np.broadcast_to(_GENERATOR.choice(np.float32([0.5, 1, 2]), N), (K, N)))
BIAS = jnp.asarray(_GENERATOR.standard_normal(N), jnp.float32)


def _sharded(fn, devices: int, x: jax.Array) -> np.ndarray:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("model",))
    spec = PartitionSpec
    run = jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=(spec(None, "model"), spec("model", None)),
        out_specs=spec(),
        check_vma=False,
    )
    return bits(jax.jit(run)(x, W))


def _ours(x: jax.Array, w: jax.Array) -> jax.Array:
    return bi.row_parallel_matmul(x, w, BIAS, axis_name="model", interpret=True)


def _psum(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.psum(bi.matmul(x, w, interpret=True), "model") + BIAS


def test_the_bits_do_not_depend_on_the_number_of_devices() -> None:
    assert jax.device_count() == 8
    alone = bits(bi.row_parallel_matmul(X, W, BIAS, interpret=True))
    for devices in (1, 2, 4, 8):
        assert (_sharded(_ours, devices, X) == alone).all()
    assert (_sharded(_ours, 4, X[2:3]) == alone[2:3]).all()


def test_psum_has_other_bits_on_another_number_of_devices() -> None:
    assert (_sharded(_psum, 2, X) != _sharded(_psum, 8, X)).any()


def test_a_column_parallel_product_has_the_bits_of_the_whole_one() -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    spec = PartitionSpec
    w = jnp.concatenate([W, -W], 1)
    block = (16, 512, 128)
    run = jax.shard_map(
        lambda x, w: bi.matmul(x, w, block=block, interpret=True),
        mesh=mesh,
        in_specs=(spec(), spec(None, "model")),
        out_specs=spec(None, "model"),
        check_vma=False,
    )
    assert (bits(run(X, w)) == bits(bi.matmul(X, w, block=block, interpret=True))).all()


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(OpNotSupported, match="pad K with zeros to a multiple of 8"):
        bi.row_parallel_matmul(X[:, :100], W[:100], interpret=True)
    with pytest.raises(OpNotSupported, match="power of two"):
        bi.row_parallel_matmul(X, W, slices=6, interpret=True)
