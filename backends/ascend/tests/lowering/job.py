"""Lowers every Triton kernel with triton-ascend, without CANN, and looks at the loops: python
job.py

triton-ascend installs itself as `triton`, over upstream's, so it goes into a temporary folder that
only the child sees. `npubin`, the last stage, needs CANN; the two before it, TTIR and linalg MLIR,
do not. CPython 3.11 on x86_64, as the wheel. Where it cannot be had the job says so and fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = ("triton-ascend==3.2.0", "pybind11")
"""The newest on the package index; it imports pybind11 without asking for it."""


def main() -> int:
    """The exit status of the checks; 2 where they could not be run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--site", type=Path, help="a folder that has triton-ascend already")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        site = arguments.site or Path(folder, "site")
        if arguments.site is None:
            pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target")
            done = subprocess.run([*pip, str(site), *PACKAGES], check=False)
            if done.returncode:
                print(f"the kernels were NOT lowered: no {PACKAGES[0]} here", file=sys.stderr)
                return 2
        paths = [str(site), os.environ.get("PYTHONPATH", "")]
        return subprocess.run(
            [sys.executable, str(HERE / "check_lowering.py")],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "TRITON_CACHE_DIR": str(Path(folder, "cache")),
                "TRITON_INTERPRET": "0",
            },
            check=False,
        ).returncode


if __name__ == "__main__":
    raise SystemExit(main())
