"""The interpreter's hard modes see what they are for, and the check passes on what they report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from batch_invariant_tpu import interpreter_check
from batch_invariant_tpu.interpreter_check import interpret_of


def _copied(x: jax.Array, mode: str, waits: bool) -> jax.Array:
    """A copy to vector memory and back; without waiting it reads what may not be there yet."""

    def kernel(x_ref, o_ref, room_ref, semaphore) -> None:
        copy = pltpu.make_async_copy(x_ref, room_ref, semaphore)
        copy.start()
        if waits:
            copy.wait()
        o_ref[...] = room_ref[...]
        if not waits:
            copy.wait()

    return pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=interpret_of(mode),
    )(x)


@pytest.mark.parametrize("waits", [True, False])
def test_a_race_is_reported(waits: bool) -> None:
    found, said = interpreter_check._run(
        lambda x: _copied(x, "races", waits), interpreter_check.inputs("float32")[:, :128]
    )
    assert found == []
    assert ("RACE" in said) is not waits


def test_memory_that_nobody_wrote_is_nan() -> None:
    def kernel(o_ref) -> None:
        o_ref[0, 0] = 1.0

    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        out_specs=pl.BlockSpec(memory_space=pltpu.SMEM),
        interpret=interpret_of("memory"),
    )()
    assert np.isnan(np.asarray(out)[1:]).all()


def test_the_check_holds_where_kernels_do() -> None:
    todo = interpreter_check.tasks(("memory", "races"), ("float32",), ("sum",))
    assert [name for *_, name in todo] == ["sum", "sum", interpreter_check.CONTROL]
    found = interpreter_check.check(todo)
    assert [entry["faults"] for entry in found["checks"]] == [[]] * 3
    assert found["holds"]


def test_a_kernel_that_looks_at_its_neighbours_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {"bad": lambda x: x + 0 * x.sum()}
    monkeypatch.setattr(interpreter_check, "kernels", lambda dtype, mode: bad)
    found = interpreter_check.check([("float32", "plain", "bad")])
    assert not found["holds"]
    assert any("neighbours NaN" in fault for fault in found["checks"][0]["faults"])


def test_a_control_that_does_not_vary_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter_check, "control", lambda dtype: lambda x: x)
    found = interpreter_check.check([("float32", "plain", interpreter_check.CONTROL)])
    assert not found["holds"]
    assert "blind" in found["checks"][0]["faults"][0]


def test_a_kernel_that_stops_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(x: jax.Array) -> jax.Array:
        raise ValueError("read out of bounds")

    monkeypatch.setattr(interpreter_check, "kernels", lambda dtype, mode: {"bad": stops})
    found = interpreter_check.check([("float32", "plain", "bad")])
    assert found["checks"][0]["faults"] == ["ValueError: read out of bounds"]
