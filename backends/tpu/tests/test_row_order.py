"""Row statistics have the order of core's ops/row_order.py, and in the interpreter its bits."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import batch_invariant as core
from batch_invariant.ops import row_order
from batch_invariant_tpu import jax as bi
from batch_invariant_tpu.interpreter_check import bits, interpret_of
from batch_invariant_tpu.jax import rows

LENGTHS = (1, 70, 128, 129, 1000, 1025, 5000, 8193, 20011)


def _rows(n: int, count: int = 3) -> np.ndarray:
    generator = np.random.default_rng(n)
    x = generator.standard_normal((count, n)).astype(np.float32)
    if n >= 4:
        x[:, 1], x[:, n // 2] = 2.0**20, -(2.0**20)
    return x


def _same(ours: object, reference: torch.Tensor) -> bool:
    return bool((bits(ours) == bits(reference.numpy())).all())


def test_constants_are_those_of_core() -> None:
    assert (rows.LANES, rows.SEGMENT) == (row_order.LANES, row_order.SEGMENT)


@pytest.mark.parametrize("n", LENGTHS)
def test_sum_has_the_bits_of_the_reference(n: int) -> None:
    x = _rows(n)
    assert _same(bi.sum(jnp.asarray(x), interpret=True), row_order.lane_sum(torch.tensor(x)))


def test_another_order_has_other_bits() -> None:
    x = np.random.default_rng(1).standard_normal((12, 5000)).astype(np.float32)
    turned = jnp.asarray(x[:, ::-1])
    assert not _same(bi.sum(turned, interpret=True), row_order.lane_sum(torch.tensor(x)))


def test_simulated_memory_has_the_same_bits() -> None:
    x = _rows(8193)
    ours = bi.sum(jnp.asarray(x), interpret=interpret_of("memory"))
    assert _same(ours, row_order.lane_sum(torch.tensor(x)))


@pytest.mark.parametrize("n", [129, 5000, 8193])
def test_mean_and_norms_have_the_bits_of_the_reference(n: int) -> None:
    x = _rows(n)
    weight = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    j, t = jnp.asarray(x), torch.tensor(x)
    jw, tw = jnp.asarray(weight), torch.tensor(weight)
    assert _same(bi.mean(j, interpret=True), core.mean(t, -1))
    assert _same(bi.rms_norm(j, jw, interpret=True), core.rms_norm(t, tw))
    ours = bi.rms_norm(j, residual=j[::-1], variance_size=n // 2, interpret=True)
    theirs = core.rms_norm(t, residual=t.flip(0), variance_size=n // 2)
    assert all(_same(a, b) for a, b in zip(ours, theirs, strict=True))
    ours = bi.layer_norm(j, jw, jw[::-1], interpret=True)
    assert _same(ours, core.layer_norm(t, (n,), tw, tw.flip(0)))


def test_zeros_and_nans_are_the_reference_ones() -> None:
    x = np.zeros((3, 300), np.float32)
    x[0] = -0.0
    x[1, 7] = -np.nan
    x[2, 3], x[2, 200] = np.inf, -np.inf
    assert _same(bi.sum(jnp.asarray(x), interpret=True), row_order.lane_sum(torch.tensor(x)))


def test_exponentials_are_close_to_exact() -> None:
    x = np.random.default_rng(0).standard_normal((3, 9000)).astype(np.float32) * 4
    wide = torch.tensor(x).double()
    j = jnp.asarray(x)
    for ours, exact in (
        (bi.softmax(j, interpret=True), wide.softmax(-1)),
        (bi.log_softmax(j, interpret=True), wide.log_softmax(-1)),
        (bi.logsumexp(j, interpret=True), wide.logsumexp(-1)),
    ):
        error = np.abs(np.asarray(ours, np.float64) - exact.numpy())
        assert (error <= 2e-6 * np.maximum(np.abs(exact.numpy()), 1e-6)).all()


def test_logsumexp_of_infinities() -> None:
    x = np.full((2, 40), -np.inf, np.float32)
    x[1, 3] = np.inf
    assert np.asarray(bi.logsumexp(jnp.asarray(x), interpret=True)).tolist() == [-np.inf, np.inf]


def test_empty_rows() -> None:
    none = jnp.zeros((2, 0), jnp.float32)
    assert np.asarray(bi.sum(none, interpret=True)).tolist() == [0, 0]
    assert np.isnan(np.asarray(bi.mean(none, interpret=True))).all()
    assert bi.softmax(none, interpret=True).shape == (2, 0)
    assert bi.sum(jnp.zeros((0, 5), jnp.float32), interpret=True).shape == (0,)
