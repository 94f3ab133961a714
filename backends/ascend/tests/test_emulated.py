"""Runs the tests on the emulated device, each scene in a process of its own: the rename is once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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

CONFORMANCE = ("sum", "rms_norm", "softmax", "embedding", "argmax", "exp")


def _run(scene: str, *arguments: str) -> None:
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
        },
        cwd=HERE,  # pytest would load the conftest of a folder tests/ where it starts
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("scene", SCENES)
def test_on_the_emulated_device(scene: str) -> None:
    """Wiring only: the arithmetic is the CPU's."""
    files = [str(HERE / "emulated" / name) for name in SCENES[scene]]
    _run("plain" if scene == "attention" else scene, *files)


def test_the_conformance_kit_on_the_emulated_device() -> None:
    """A part of the kit; the whole of it takes minutes: `--bi-backend=ascend` without `--bi-op`."""
    _run(
        "plain",
        *("--pyargs", "batch_invariant.conformance", "--bi-backend=ascend"),
        *(f"--bi-op={name}" for name in CONFORMANCE),
        # Finding the order of a sum takes hundreds of calls: of one operator, for all that use it.
        *("-k", "float32 and (dispatch or population or neighbours or bad or rms_norm and order)"),
    )
