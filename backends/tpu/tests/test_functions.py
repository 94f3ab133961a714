"""The kernels as functions of jax arrays: under jit, vmap and grad, and for input that is wrong."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batch_invariant.errors import OpNotSupported
from batch_invariant_tpu import jax as bi
from batch_invariant_tpu.interpreter_check import bits
from batch_invariant_tpu.jax.blocks import generation_of, matmul_block, row_block
from batch_invariant_tpu.jax.elementwise import FUNCTIONS


def _normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_they_import_without_torch() -> None:
    code = (
        "import sys, batch_invariant_tpu\n"
        "assert not {'torch', 'jax'} & set(sys.modules)\n"
        "import batch_invariant_tpu.jax\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_jit_and_vmap_keep_the_bits() -> None:
    x, w = _normal(3, 5, 300), _normal(300, 70, seed=1)

    def layer(x: jax.Array) -> jax.Array:
        return bi.rms_norm(bi.matmul(x, w, interpret=True), interpret=True)

    plain = bits(layer(x))
    assert (bits(jax.jit(layer)(x)) == plain).all()
    assert (bits(jax.vmap(layer)(x)) == plain).all()


_X, _W, _V = _normal(4, 130), _normal(130, 40, seed=1), _normal(130, seed=2)


@pytest.mark.parametrize(
    ("ours", "plain", "args"),
    [
        (lambda x, w: bi.matmul(x, w, interpret=True), jnp.dot, (_X, _W)),
        (
            lambda x, w, b: bi.linear(x, w, b, interpret=True),
            lambda x, w, b: x @ w.T + b,
            (_X, _W.T, _W[0]),
        ),
        (lambda x: bi.sum(x, interpret=True), lambda x: x.sum(-1), (_X,)),
        (lambda x: bi.mean(x, interpret=True), lambda x: x.mean(-1), (_X,)),
        (lambda x: bi.logsumexp(x, interpret=True), lambda x: jax.nn.logsumexp(x, -1), (_X,)),
        (lambda x: bi.softmax(x, interpret=True), jax.nn.softmax, (_X,)),
        (lambda x: bi.log_softmax(x, interpret=True), jax.nn.log_softmax, (_X,)),
        (
            lambda x, w, r: sum(bi.rms_norm(x, w, 1e-6, residual=r, interpret=True)),
            lambda x, w, r: (
                (x + r) / jnp.sqrt(jnp.mean((x + r) ** 2, -1, keepdims=True) + 1e-6) * w + x + r
            ),
            (_X, _V, _X[::-1]),
        ),
        (
            lambda x, w, b: bi.layer_norm(x, w, b, interpret=True),
            lambda x, w, b: (
                (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * w + b
            ),
            (_X, _V, _V[::-1]),
        ),
    ],
    ids="matmul linear sum mean logsumexp softmax log_softmax rms_norm layer_norm".split(),
)
def test_values_and_gradients_are_those_of_plain_jax(ours, plain, args) -> None:
    shape = plain(*args).shape
    probe = _normal(*shape, seed=9)
    every = tuple(range(len(args)))
    got = jax.value_and_grad(lambda *a: (ours(*a) * probe).sum(), every)(*args)
    want = jax.value_and_grad(lambda *a: (plain(*a) * probe).sum(), every)(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_a_rows_gradient_does_not_depend_on_the_batch() -> None:
    def loss(x: jax.Array) -> jax.Array:
        y = bi.softmax(
            bi.matmul(bi.rms_norm(x, interpret=True), _W, interpret=True), interpret=True
        )
        return (y * y).sum()

    x = _normal(9, 130, seed=4)
    assert (bits(jax.grad(loss)(x))[2] == bits(jax.grad(loss)(x[2:3]))[0]).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementwise_functions_do_not_see_how_many_rows_there_are(name: str) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((257, 1536)), jnp.float32) * 2
    whole = bits(bi.elementwise(name, x, interpret=True))
    for rows in (1, 3, 64):
        assert (bits(bi.elementwise(name, x[:rows], interpret=True)) == whole[:rows]).all(), rows


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementwise_functions_can_be_lowered_for_a_tpu(name: str) -> None:
    """Not every function of jax.numpy can be, where no TPU is."""
    x = jax.ShapeDtypeStruct((8, 1024), jnp.float32)
    traced = jax.jit(lambda x: bi.elementwise(name, x)).trace(x)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_erf_is_accurate_to_its_ends() -> None:
    x = np.concatenate([np.linspace(-5, 5, 20001), [np.inf, -np.inf]]).astype(np.float32)
    found = np.asarray(bi.elementwise("erf", jnp.asarray(x), interpret=True))
    exact = np.vectorize(math.erf)(x.astype(np.float64))
    assert (np.abs(found - exact) <= 8 * np.spacing(np.abs(exact).astype(np.float32))).all()
    assert (np.abs(found) <= 1).all()


def test_batched_and_empty_products() -> None:
    x, w = _normal(3, 4, 20), _normal(3, 20, 7, seed=1)
    np.testing.assert_allclose(bi.matmul(x, w, interpret=True), x @ w, rtol=1e-5, atol=1e-5)
    none = bi.matmul(jnp.zeros((2, 0)), jnp.zeros((0, 3)), jnp.ones(3), interpret=True)
    assert np.asarray(none).tolist() == [[1, 1, 1]] * 2
    assert bi.matmul(jnp.zeros((0, 5)), jnp.zeros((5, 3)), interpret=True).shape == (0, 3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: bi.matmul(_X.astype(jnp.float16), _W.astype(jnp.float16)), "float16"),
        (lambda: bi.matmul(_X, _W.astype(jnp.bfloat16)), "one dtype"),
        (lambda: bi.matmul(_X, _X), "cannot be multiplied"),
        (lambda: bi.matmul(_X[None], _W[None].repeat(2, 0)), "leading dimensions"),
        (lambda: bi.linear(_X, _W), r"\[N, K\]"),
        (lambda: bi.matmul(_X, _W, _V[:3]), r"bias of shape \[\d+\], got \[3\]"),
        (lambda: bi.linear(_X, _W.T, _W), "expected a bias of shape"),
        (lambda: bi.attention(*[jnp.zeros((1, 1, 1, 8192))] * 3), "heads of 8192 .* MiB"),
        (lambda: bi.rms_norm(_X, _V[:5]), "weight of shape"),
        (lambda: bi.rms_norm(_X, residual=_X[:1]), "residual of shape"),
        (lambda: bi.rms_norm(_X, variance_size=131), "variance_size"),
        (lambda: bi.sum(_X.astype(jnp.int32)), "int32"),
        (lambda: bi.attention(_X, _X, _X), "batch, heads, length, size"),
        (lambda: generation_of("TPU v99"), "unknown TPU 'TPU v99'"),
        (lambda: matmul_block(64, 64, "float32", "v99"), "known: v4, v5e"),
        (lambda: matmul_block(64, 64, "int8", "v5e"), "int8"),
    ],
)
def test_bad_input_says_what_is_wrong(call, says) -> None:
    with pytest.raises(OpNotSupported, match=says):
        call()


def test_a_block_that_does_not_fit_is_refused_before_it_is_compiled() -> None:
    for block in ((128, 512), (100, 512, 512), (128, 500, 512), (4096, 4096, 4096)):
        with pytest.raises(OpNotSupported, match="block"):
            bi.matmul(_X, _W, block=block, interpret=True)


def test_without_a_tpu_nothing_is_interpreted_unasked() -> None:
    with pytest.raises(ValueError, match=r"[Ii]nterpret"):
        bi.sum(_X)
    with pytest.raises(OpNotSupported, match="compile ahead of time, or interpret=True"):
        bi.matmul(_X, _W)


def test_blocks_do_not_know_the_batch_and_are_whole_tiles() -> None:
    for generation in ("v4", "v5e", "v5p", "v6e", "tpu7x", "interpreter"):
        for k, n in ((1, 1), (70, 300), (4096, 14336)):
            bm, bk, bn = matmul_block(k, n, "bfloat16", generation)
            assert not bm % 16
            assert not bk % 128
            assert not bn % 128
    for width in (128, 5 * 1024, 8192):
        assert not row_block(width) % 16
