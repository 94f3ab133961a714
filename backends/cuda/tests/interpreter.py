"""Programs in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_PACKAGES = Path(__file__).resolve().parents[1]


def printed(program: str, *arguments: str) -> list[str]:
    """The lines that a program prints, in a process of its own.

    Triton decides when it is imported whether to interpret.
    """
    path = os.pathsep.join([str(_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter does not work with NumPy 2.4")
    assert done.returncode == 0, done.stderr[-2000:]
    return [line for line in done.stdout.split("\n") if line]
