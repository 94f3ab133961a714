"""The kernels in Pallas's interpreter, under transforms of the batch, bit for bit.

    python -m batch_invariant_tpu.interpreter_check

Three ways of interpreting: `plain`, as ordinary jax operations; `memory`, with simulated memories
in which what nobody wrote is NaN and a read out of bounds is an error; `races`, with the parallel
axes of the grid in random order and conflicting accesses reported. The bits are those of jax's CPU
compiler: this checks indexing, masks, padding and schedule, and nothing about a TPU's arithmetic.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from batch_invariant.errors import BatchInvariantError
from batch_invariant_tpu import jax as bi
from batch_invariant_tpu.processes import JOBS, spread

MODES = ("plain", "memory", "races")
ROWS = 16
FEWER = (1, 3)
MORE = 70
K, N = 1100, 200

Run = Callable[[jax.Array], jax.Array]


def interpret_of(mode: str) -> Any:
    """The value of `interpret` for a mode."""
    if mode == "plain":
        return True
    if mode == "memory":
        return pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
    return pltpu.InterpretParams(dma_execution_mode="eager", detect_races=True, random_seed=0)


def bits(array: Any) -> np.ndarray:
    """The integer view of an array's elements."""
    found = np.asarray(array)
    return found.view({2: np.uint16, 4: np.uint32}[found.itemsize])


def inputs(dtype: str) -> np.ndarray:
    """[ROWS, K] values with one huge pair in each row that cancels, which shows any other order."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((ROWS, K)).astype(np.float32)
    for row in x:
        first, second = generator.choice(K, 2, replace=False)
        row[first], row[second] = 2.0**20, -(2.0**20)
    return np.asarray(jnp.asarray(x, dtype))


def kernels(dtype: str, mode: str) -> dict[str, Run]:
    """By name, functions of rows [M, K] that are one kernel each; fp32 results where they exist."""
    how = interpret_of(mode)
    generator = np.random.default_rng(1)
    signs = generator.choice(np.float32([0.5, 1.0, 2.0]), size=N)  # powers of two: pairs cancel
    w = jnp.asarray(np.broadcast_to(signs, (K, N)), dtype)
    scale = jnp.asarray(generator.standard_normal(K), dtype)
    bias = jnp.asarray(generator.standard_normal(N), dtype)
    key = jnp.asarray(generator.standard_normal((1, 1, 300, 64)), dtype)

    def attend(x: jax.Array) -> jax.Array:
        q = x[:, : 2 * 64].reshape(-1, 2, 1, 64)
        k = jnp.broadcast_to(key, (len(x), *key.shape[1:]))
        return bi.attention(q, k, k[:, :, ::-1], causal=False, interpret=how).reshape(len(x), -1)

    wide = jnp.float32
    return {
        "matmul": lambda x: bi.matmul(x, w, dtype=wide, interpret=how),
        "matmul, batched": lambda x: bi.matmul(
            x[:, None, :600],
            jnp.broadcast_to(w[:600], (len(x), 600, N)),
            dtype=wide,
            interpret=how,
        )[:, 0],
        "linear, bias": lambda x: bi.linear(x, w.T, bias, dtype=wide, interpret=how),
        "rms_norm": lambda x: bi.rms_norm(x, scale, interpret=how),
        "rms_norm, residual": lambda x: jnp.concatenate(
            bi.rms_norm(x, residual=x[:, ::-1], interpret=how), 1
        ),
        "layer_norm": lambda x: bi.layer_norm(x, scale, scale, interpret=how),
        "softmax": lambda x: bi.softmax(x / 2**18, interpret=how),
        "log_softmax": lambda x: bi.log_softmax(x / 2**18, interpret=how),
        "logsumexp": lambda x: bi.logsumexp(x / 2**18, interpret=how)[:, None],
        "sum": lambda x: bi.sum(x, dtype=wide, interpret=how)[:, None],
        "mean, two segments": lambda x: bi.mean(jnp.tile(x, (1, 8)), dtype=wide, interpret=how)[
            :, None
        ],
        "attention": attend,
    }


def control(dtype: str) -> Run:
    """The product with its block of K taken from the number of rows: must be found to vary."""
    x_to_block = {True: (128, 128, 256), False: (128, 512, 256)}
    ones = jnp.ones((K, N), dtype)
    return lambda x: bi.matmul(
        x, ones, dtype=jnp.float32, block=x_to_block[len(x) == 1], interpret=True
    )


def variations(x: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Name, another batch, and which of its rows are which rows of x."""
    every = np.arange(ROWS)
    for count in FEWER:
        some = every[5 : 5 + count]
        yield f"{count} of {ROWS} rows", x[some], np.arange(count), some
    last = np.arange(MORE - ROWS, MORE)
    yield f"{ROWS} of {MORE} rows", x[np.arange(MORE) % ROWS], last, last % ROWS
    yield "reversed", x[::-1], every, every[::-1]
    padded = np.concatenate([x, np.zeros_like(x[:9])])
    yield "9 rows of zeros appended", padded, every, every
    kept = np.array([0, 7, 15])
    for name, value in (("NaN", np.nan), ("inf", np.inf), ("huge", 3e38)):
        others = np.full_like(x, value)
        others[kept] = x[kept]
        yield f"neighbours {name}", others, kept, kept


def broken(fn: Run, x: np.ndarray) -> list[str]:
    """The variations of the batch that change a bit of a row."""
    base = bits(fn(jnp.asarray(x)))
    found = []
    for name, batch, at, rows in variations(x):
        changed = bits(fn(jnp.asarray(batch)))[at]
        if (changed != base[rows]).any():
            found.append(f"{name}: {int((changed != base[rows]).sum())} values")
    return found


CONTROL = "control: block of K taken from M"

Task = tuple[str, str, str]
"""dtype, mode and kernel; the control by its name, in the plain mode."""


def tasks(
    modes: Sequence[str] = MODES,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    only: Sequence[str] = (),
) -> list[Task]:
    """All that is interpreted; with `only` these kernels, and the controls."""
    found: list[Task] = []
    for dtype in dtypes:
        found += [
            (dtype, mode, name)
            for mode in modes
            for name in kernels(dtype, mode)
            if not only or name in only
        ]
        found.append((dtype, "plain", CONTROL))
    return found


def check(
    todo: Sequence[Task],
    report: Callable[[str, bool, str], None] = lambda *what: None,
    jobs: int = 1,
) -> dict[str, Any]:
    """Every kernel under every variation of the batch; the findings as JSON values.

    jobs: processes; one is this one.
    """
    found: list[dict[str, Any]] = []
    each = map(_found, todo) if jobs == 1 else spread(_found, todo, jobs, on_cpu)
    for (dtype, mode, name), faults in zip(todo, each, strict=True):
        found.append({"dtype": dtype, "mode": mode, "kernel": name, "faults": faults})
        report(f"{mode:6} {dtype:9} {name}", not faults, "; ".join(faults))
    return {
        "variations": [name for name, *_ in variations(inputs("float32"))],
        "checks": found,
        "holds": bool(found) and not any(entry["faults"] for entry in found),
    }


def on_cpu() -> None:
    """Nothing here looks for a TPU."""
    jax.config.update("jax_platforms", "cpu")


def _found(task: Task) -> list[str]:
    dtype, mode, name = task
    x = inputs(dtype)
    if name == CONTROL:
        varies = broken(control(dtype), x)
        return [] if varies else ["does not vary: the comparison is blind"]
    faults, said = _run(kernels(dtype, mode)[name], x)
    return [*faults, "the interpreter reports a race"] if "RACE" in said.upper() else faults


def _run(fn: Run, x: np.ndarray) -> tuple[list[str], str]:
    """What varies, or how the interpreter stopped; and what it printed, which is how it tells."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            return broken(fn, x), said.getvalue()
    except Exception as error:  # an out-of-bounds read is an exception of the interpreter's
        pltpu.reset_tpu_interpret_mode_state()
        return [f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"], said.getvalue()


def main() -> int:
    """0 if everything holds, else 1."""
    parser = argparse.ArgumentParser(prog="python -m batch_invariant_tpu.interpreter_check")
    parser.add_argument("--full", action="store_true", help="bfloat16 in the slow modes too")
    parser.add_argument("--jobs", type=int, default=JOBS, help="processes (default: %(default)s)")
    parser.add_argument("--report", type=Path, metavar="PATH", help="write the findings as JSON")
    args = parser.parse_args()
    on_cpu()
    todo = tasks() if args.full else tasks(("memory", "races"), ("float32",))
    try:
        found = check(todo, _say, args.jobs)
    except BatchInvariantError as error:
        sys.stderr.write(f"interpreter check: {error}\n")
        return 1
    if args.report:
        args.report.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["holds"] else 1


def _say(what: str, good: bool, more: str) -> None:
    sys.stdout.write(f"{'ok  ' if good else 'FAIL'} {what}{f': {more}' if more else ''}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
