"""Tests against the real torch_npu wheel, with CANN stubbed: python job.py [--wheel FOLDER]

Installs the wheel into a temporary folder, beside whatever torch this Python has, so that nothing
else sees it: installed for good, it would break `import torch` here. Needs gcc and nm. Where the
wheel or the compiler cannot be had it says so and fails; it never skips.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
WHEEL = "2.13.0"
"""The torch_npu that the schemas are of; it goes with torch 2.13 only."""


def main() -> int:
    """The exit status of the tests; 2 where they could not be run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="a folder that has torch_npu already")
    arguments = parser.parse_args()
    started = time.monotonic()
    if version("torch").split(".")[:2] != WHEEL.split(".")[:2]:
        return _cannot(f"torch {version('torch')} is installed; torch_npu {WHEEL} needs its own")
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            return _cannot(f"{tool} is not installed; the stubs of CANN are compiled with it")
    with tempfile.TemporaryDirectory() as folder:
        site = arguments.wheel or Path(folder, "site")
        if arguments.wheel is None:
            pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile")
            done = subprocess.run([*pip, "--target", str(site), f"torch_npu=={WHEEL}"], check=False)
            if done.returncode:
                return _cannot(f"pip could not install torch_npu {WHEEL}")
        stubs = Path(folder, "stubs")
        sys.path.insert(0, str(site))
        import cann_stub

        print(f"{cann_stub.build(stubs)} functions of CANN stubbed")
        status = _without_cann(site) or _by_environment(site, stubs) or _pytest(site, stubs)
    print(f"torch_npu {WHEEL}: {time.monotonic() - started:.0f} s")
    return status


def _cannot(why: str) -> int:
    print(f"the tests on the real torch_npu were NOT run: {why}", file=sys.stderr)
    return 2


def _environment(site: Path, **more: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("LD_LIBRARY_PATH", *more)}
    paths = [os.environ.get("PYTHONPATH", ""), str(HERE), str(HERE.parent), str(site)]
    return {**inherited, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


def _without_cann(site: Path) -> int:
    """torch_npu without CANN breaks `import torch`; bi doctor must say so, and what to do."""
    done = subprocess.run(
        [sys.executable, "-m", "batch_invariant", "doctor"],
        env=_environment(site, VLLM_BATCH_INVARIANT="0"),
        capture_output=True,
        text=True,
        check=False,
    )
    wanted = (
        "torch does not import",
        "libhccl.so",
        f"torch_npu {WHEEL} is installed, but libhccl.so, libascendcl.so cannot be found",
        "source /usr/local/Ascend/ascend-toolkit/set_env.sh",
        "TORCH_DEVICE_BACKEND_AUTOLOAD=0",
    )
    missing = [text for text in wanted if text not in done.stdout]
    if missing or done.returncode != 1:
        print(f"bi doctor without CANN does not say {missing}:\n{done.stdout}\n{done.stderr}")
        return 1
    return 0


def _by_environment(site: Path, stubs: Path) -> int:
    """VLLM_BATCH_INVARIANT=1 and plain `import torch`, which here comes to us before torch_npu."""
    info = stubs / "first-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: first\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nfirst = batch_invariant:_autoload\n")
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-c"),
            "import sys, torch; assert 'torch_npu' in sys.modules\n"
            "for name in ('aten::mm', 'npu::npu_add_rms_norm'):\n"
            "    dump = torch._C._dispatch_dump(name).splitlines()\n"
            "    (kernel,) = (x for x in dump if x.startswith('PrivateUse1:'))\n"
            "    assert 'batch_invariant/mode.py' in kernel, kernel",
        ],
        env=_environment(
            site,
            LD_LIBRARY_PATH=str(stubs),
            TASK_QUEUE_ENABLE="0",
            TORCH_DEVICE_BACKEND_AUTOLOAD="1",
            VLLM_BATCH_INVARIANT="1",
            PYTHONPATH=os.pathsep.join((str(stubs), _environment(site)["PYTHONPATH"])),
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(f"VLLM_BATCH_INVARIANT=1 did not reach torch_npu:\n{done.stderr[-3000:]}")
    return done.returncode


def _pytest(site: Path, stubs: Path) -> int:
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={HERE}"),
            *("-p", "no:cacheprovider", "--import-mode=importlib", "-q", "-W", "ignore"),
            *("-p", "torch_npu_first", str(HERE / "check_wheel.py")),
        ],
        env=_environment(
            site,
            LD_LIBRARY_PATH=str(stubs),
            TASK_QUEUE_ENABLE="0",
            TORCH_DEVICE_BACKEND_AUTOLOAD="0",
            VLLM_BATCH_INVARIANT="0",
        ),
        cwd=HERE,
        check=False,
    ).returncode


if __name__ == "__main__":
    raise SystemExit(main())
