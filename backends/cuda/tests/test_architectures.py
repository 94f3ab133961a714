"""Kernels compile for GPUs that are not there, and fit their shared memory.

Nothing is run: this says nothing about bits or speed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="compiles with Triton")

# KiB that one program may have (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability").
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_kernels_fit(capability: int) -> None:
    program = Path(__file__).with_name("architecture.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), str(capability)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (line.split(" ", 1) for line in done.stdout.splitlines())
    needs = {label: int(size) for size, label in lines}
    assert len(needs) > 30
    assert not {label: size for label, size in needs.items() if size > SHARED[capability] << 10}
