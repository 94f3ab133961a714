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
import os, pathlib, sys
from batch_invariant_tpu.compile_check.compiler import Compiler, environment
dumps = pathlib.Path(sys.argv[1])
os.environ.update(environment(dumps))
from batch_invariant_tpu.compile_check.controls import controls
for name, plans in controls(Compiler("v6e", dumps), "bfloat16", (1, 8, 1024)):
    assert len(set(plans.values())) > 1, (name, plans)
    print("varies:", name)
from batch_invariant_tpu.compile_check import check
from batch_invariant_tpu.compile_check.cases import Case
import jax.numpy as jnp
def verdict(fn):
    case = Case("x", fn, lambda m: [((m, 4096), "float32")], (0,), float, fn)
    return check._case(Compiler("v6e", dumps), case, (1, 8))["faults"]
from batch_invariant_tpu import jax as bi
assert not verdict(bi.sum)
print("flagged:", verdict(lambda x: jnp.sum(x, -1)))
assert verdict(lambda x: jnp.sum(x, -1)) and verdict(lambda x: bi.sum(x) + jnp.sum(x, -1))
"""


def test_what_varies_is_found_to_vary(tmp_path) -> None:
    command = [sys.executable, "-c", CONTROL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("plain jnp.dot", "plain jnp.mean", "block of K taken from M", "plain psum"):
        assert name in done.stdout
