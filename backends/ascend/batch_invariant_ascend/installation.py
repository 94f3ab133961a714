"""What is installed and can run: torch_npu, CANN, the device and HCCL, looked at without importing.

Importing torch_npu where CANN is missing fails, and through torch's autoload `import torch` fails
with it, so nothing here imports it: packages are looked up by their metadata, CANN by its files,
and the device by its node, or by `torch.npu` where somebody has imported torch_npu already.
"""

from __future__ import annotations

import os
import re
import sys
import weakref
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from batch_invariant.backend import Availability

_LIBRARIES = ("libhccl.so", "libascendcl.so")
_SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64")
_HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
_DEVICE_NODES = Path("/dev")
_OFF = "or start Python with TORCH_DEVICE_BACKEND_AUTOLOAD=0, or uninstall torch_npu"


def availability() -> Availability:
    """Whether kernels can run on an NPU here; if not, the first reason and its remedy."""
    for look in (_torch_npu, _cann, _device, _hccl):
        if (found := look()) is not None:
            return found
    return Availability(True)


def is_imported() -> bool:
    """Whether torch_npu is there and has been imported."""
    return "torch_npu" in sys.modules


def torch_npu_version() -> str | None:
    """The version of torch_npu by its metadata, or by itself where it is imported."""
    for name in ("torch_npu", "torch-npu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return getattr(sys.modules.get("torch_npu"), "__version__", None)


def _torch_npu() -> Availability | None:
    wanted = _minor(torch.__version__)
    install = f"pip install 'torch_npu=={wanted}.*' on a machine with CANN"
    if not is_imported() and util.find_spec("torch_npu") is None:
        return Availability(False, "torch_npu is not installed", install)
    version = torch_npu_version()
    if version is None:
        return Availability(False, "the installed torch_npu does not tell its version", install)
    if _minor(version) != wanted:
        return Availability(
            False,
            f"torch_npu {version} is made for torch {_minor(version)}, and torch is "
            f"{torch.__version__}",
            f"{install}, or install torch=={_minor(version)}.*",
        )
    return None


def _minor(version: str) -> str:
    return ".".join(re.findall(r"\d+", version)[:2])


def _cann() -> Availability | None:
    if is_imported():
        return None
    paths = [p for p in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if p]
    missing = [
        name for name in _LIBRARIES if not any(Path(p, name).exists() for p in (*paths, *_SYSTEM))
    ]
    if not missing:
        return None
    home = next((os.environ[h] for h in _HOMES if os.environ.get(h)), None)
    where = (
        f"CANN is at {home}, but LD_LIBRARY_PATH does not lead to its libraries"
        if home
        else "CANN is not installed or not set up"
    )
    script = f"{home or '/usr/local/Ascend/ascend-toolkit'}/set_env.sh"
    return Availability(
        False,
        f"torch_npu {torch_npu_version()} is installed, but {', '.join(missing)} cannot be found: "
        f"{where}; `import torch` itself fails so, since it loads torch_npu",
        f"run `source {script}` before Python starts, {_OFF}",
    )


def _device() -> Availability | None:
    if not is_imported():
        if any(_DEVICE_NODES.glob("davinci[0-9]*")):
            return None
        return Availability(
            False,
            "no NPU: there is no /dev/davinci0",
            "check the driver with `npu-smi info`; in a container, pass the devices on",
        )
    npu = getattr(torch, "npu", None)
    if npu is None or not npu.is_available():
        return Availability(
            False,
            "torch_npu is imported and finds no NPU (torch.npu.is_available() is False)",
            "check the driver with `npu-smi info`, and ASCEND_RT_VISIBLE_DEVICES",
        )
    name = str(npu.get_device_name())
    if "310P" in name:
        return Availability(
            False,
            f"{name}: the 310P has no bfloat16, returns no valid rstd from its norms, and none of "
            "the invariant kernels is made for it",
            "use an Atlas A2 or A3 (Ascend 910B, 910_93), or hide it with "
            "ASCEND_RT_VISIBLE_DEVICES and compute on the CPU",
        )
    return None


def hccl_groups() -> list[Any]:
    """The process groups over HCCL or LCCL: what those read when they start is no longer read."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return []
    # By device, such as "cpu:gloo,npu:hccl": where no backend was asked for its name says nothing.
    configs = distributed.distributed_c10d._world.pg_backend_config
    return [
        group
        for group, config in configs.items()
        if any(name in str(config) for name in ("hccl", "lccl"))
    ]


HCCL = {"HCCL_DETERMINISTIC": "strict", "LCCL_DETERMINISTIC": "1"}
"""What the collectives read when they start."""

_started_invariant: weakref.WeakSet[Any] = weakref.WeakSet()


def remember_hccl() -> None:
    """Notes the groups that have started with the right variables, which are about to be restored.

    A group that is there when they are set is one of those: `availability` refused every other.
    """
    _started_invariant.update(hccl_groups())


def _hccl() -> Availability | None:
    wrong = [name for name, value in HCCL.items() if os.environ.get(name) != value]
    if not wrong or all(group in _started_invariant for group in hccl_groups()):
        return None
    found = ", ".join(f"{name}={os.environ.get(name, '(unset)')}" for name in wrong)
    return Availability(
        False,
        f"HCCL has been initialised already, with {found}: it reads them only when it starts, so "
        "its reductions may depend on timing and sizes",
        "select the backend or enable the mode before torch.distributed.init_process_group, or "
        f"start Python with {' '.join(f'{n}={v}' for n, v in HCCL.items())}",
    )
