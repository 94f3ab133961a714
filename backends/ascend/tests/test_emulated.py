"""Runs the tests on the emulated device, each scene in a process of its own: the rename is once.

Wiring only: the device's arithmetic is the CPU's. Two processes run at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from batch_invariant.ops import CONTRACTS
from batch_invariant_ascend import NOT_WRITTEN

HERE = Path(__file__).parent
SCENES = {
    "plain": ("check_aten.py", "check_reductions.py", "check_fused.py", "check_switches.py"),
    "level3": ("check_level3.py", "check_sdpa.py"),
    "ascendc": ("check_ascendc.py", "check_sdpa.py"),
    "broken": ("check_broken.py",),
    "triton": ("check_triton.py",),
    "attention": ("check_attention.py",),
}
"""Which files each device is for; attention is on a plain one."""

_KIT = ("--pyargs", "batch_invariant.conformance", "--bi-backend=ascend")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear")
_CHECKS = (
    *("kernel", "result", "population", "neighbours", "schedule", "packing", "prefix"),
    *("accuracy", "input", "dispatch"),
)
"""Of the kit's checks those that take seconds; the rest for one dtype, see `CONFORMANCE`."""

CONFORMANCE = {
    # Tier A, whose kernels are the CPU's own: every operator in every dtype.
    "rows": ("level3", f"({' or '.join(_CHECKS)}) and not scaled_dot"),
    "attention": ("level3", f"scaled_dot and ({' or '.join(_CHECKS)})"),
    "torch": ("level3", "float32 and (opcheck or compile or gradients)"),
    # Tier D, where a product takes a launch for each of its terms: the sums of rows. Finding the
    # order of a sum takes hundreds of calls: of one operator, for all that use it.
    "composed": (
        "plain",
        "(sum or rms_norm or softmax or argmax or embedding or exp) and float32 and not cumsum and "
        "(dispatch or population or neighbours or input or rms_norm and order)",
    ),
}
"""Which device, and which tests of the conformance kit run on it."""


def _child(scene: str, *arguments: str) -> str:
    """What pytest printed in a process with that device."""
    paths = [str(HERE), str(HERE / "emulated"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={HERE}"),
            *("-p", "no:cacheprovider", "-p", "emulated_npu", f"--npu={scene}"),
            *("--import-mode=importlib", "-o", "python_files=check_*.py test_*.py", "-q"),
            *arguments,
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            "VLLM_BATCH_INVARIANT": "0",
            "TRITON_INTERPRET": "1",  # no other Triton takes the emulated device's tensors
            "OMP_NUM_THREADS": "1",
        },
        cwd=HERE,  # pytest would load the conftest of a folder tests/ where it starts
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def _files(scene: str) -> tuple[str, ...]:
    files = [str(HERE / "emulated" / name) for name in SCENES[scene]]
    return ("plain" if scene == "attention" else scene, *files)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the conformance kit writes its certificates."""
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def children(request: pytest.FixtureRequest, reports: Path) -> Iterator[dict[str, Future[str]]]:
    """The processes of the selected tests, by name, started before the first is waited for."""
    calls = {
        f"kit {name}": (scene, *_KIT, "-k", checks, f"--bi-report={reports / name}.json")
        for name, (scene, checks) in CONFORMANCE.items()
    }
    calls |= {name: _files(name) for name in SCENES}
    wanted = " ".join(item.name for item in request.session.items)
    pool = ThreadPoolExecutor(2)
    try:
        yield {
            name: pool.submit(_child, *call)
            for name, call in calls.items()
            if f"[{name}]" in wanted
        }
    finally:
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", [f"kit {name}" for name in CONFORMANCE] + list(SCENES))
def test_on_the_emulated_device(name: str, children: dict[str, Future[str]]) -> None:
    printed = children[name].result()
    assert " passed" in printed
    assert "skipped" not in printed


def test_the_kit_met_every_operator_in_every_dtype(reports: Path) -> None:
    """What `-k` selects must not shrink unseen. Needs the tests above."""
    made = [json.loads((reports / f"{name}.json").read_text()) for name in ("rows", "attention")]
    ops = made[0]["ops"] | made[1]["ops"]
    assert set(ops) == set(CONTRACTS)
    least = {
        "kernel",
        "result",
        "T1 population",
        "T3 neighbours",
        "accuracy",
        "bad input",
        "dispatch",
    }
    for name, op in ops.items():
        for dtype in ("float32", "bfloat16", "float16"):
            if name in NOT_WRITTEN:
                assert set(op[dtype]["gaps"]) == {"kernel"}, f"{name} {dtype}"
                continue
            assert set(op[dtype]["checks"]) >= least, f"{name} {dtype}"
            assert "broken" not in op[dtype]
