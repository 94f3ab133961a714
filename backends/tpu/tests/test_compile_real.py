"""The TPU compiler itself, on a few kernels of one generation; collected where libtpu is installed.

`python -m batch_invariant_tpu.compile_check --full` compiles everything.
"""

import json
import subprocess
import sys


def _check(tmp_path, *options: str) -> dict:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "batch_invariant_tpu.compile_check", "--report", str(report)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert report.exists(), done.stderr[-2000:]
    found = json.loads(report.read_text())
    assert (done.returncode == 0) == found["holds"], done.stdout
    return found


def test_kernels_have_one_program_for_every_batch(tmp_path) -> None:
    options = ("--dtype", "bfloat16", "--batches", "1,8,256")
    for generation, part in (("v6e", "norm"), ("v5e", "softmax"), ("tpu7x", "attention")):
        found = _check(tmp_path, "--generation", generation, "--only", part, *options)
        assert found["checks"]
        for entry in found["checks"]:
            assert entry["faults"] == []
            assert entry["compared"] == 3


CONTROL = """
import pathlib, sys
from batch_invariant_tpu.compile_check.compiler import Compiler, dump_folder
dumps = dump_folder(pathlib.Path(sys.argv[1]))
from batch_invariant_tpu.compile_check.controls import controls
for name, plans in controls("v6e").items():
    found = plans(Compiler("v6e", dumps), "bfloat16", (1, 8, 1024))
    assert len(set(found.values())) > 1, (name, found)
    print("varies:", name)
from batch_invariant_tpu.compile_check import check
from batch_invariant_tpu.compile_check.cases import Case
import jax, jax.numpy as jnp
def verdict(fn):
    case = Case("x", fn, lambda m: [((m, 4096), "float32")], (0,), float, fn)
    return check._case(Compiler("v6e", dumps), case, (1, 8))["faults"]
from batch_invariant_tpu import jax as bi
assert not verdict(bi.sum)
assert verdict(lambda x: jnp.sum(x, -1)) and verdict(lambda x: bi.sum(x) + jnp.sum(x, -1))
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
def large(x):
    def kernel(x_ref, o_ref, room_ref):
        room_ref[...] = jnp.zeros(room_ref.shape, jnp.float32)
        o_ref[...] = x_ref[...] + room_ref[:8]
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 4096), "float32"),
        scratch_shapes=[pltpu.VMEM((20000, 4096), jnp.float32)],
    )(jnp.broadcast_to(x[:1], (8, 4096)))
faults = verdict(large)
assert len(faults) == 2, faults
print("too large:", faults[0])
"""


def test_what_varies_is_found_to_vary(tmp_path) -> None:
    command = [sys.executable, "-c", CONTROL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("plain jnp.dot", "plain jnp.mean", "block of K taken from M", "plain psum"):
        assert name in done.stdout
    assert "too large: batch 1: does not compile" in done.stdout
    assert "vmem" in done.stdout
