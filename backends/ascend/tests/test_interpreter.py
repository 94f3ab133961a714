"""Runs the Triton kernels in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_in_the_interpreter() -> None:
    """Upstream Triton's interpreter; test of wiring, not of what a chip computes."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "interpreter_kernels.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "the interpreter agrees" in done.stdout
