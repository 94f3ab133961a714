"""The certificate: what was checked on which machine and what was found, as JSON to keep.

Nothing in it changes from run to run on one machine but the date, so two of them can be compared:
by `git diff`, or by `bi verify --against`, which says what a new version or machine altered.
"""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from batch_invariant import registry
from batch_invariant.backend import Kernel
from batch_invariant.errors import ConfigurationError
from batch_invariant.ops import CONTRACTS
from batch_invariant.proof.checks import NAMES
from batch_invariant.proof.subject import short

FORMAT = "batch-invariant certificate 1"
_PACKAGES = ("batch-invariant", "torch", "triton", "jax", "torch-npu")


def text(made: Mapping[str, Any]) -> str:
    """The certificate as it is kept in a file."""
    return json.dumps(made, indent=1) + "\n"


def make(
    backend: str, scope: str, outcomes: Iterable[Mapping[str, Any]], level: str | None = None
) -> dict[str, Any]:
    """The certificate of some outcomes.

    scope: "full" or "quick": which cases were run; "partial": not all that was planned, so that
        what was left out is not vouched for, and `holds` is false.
    level: the guarantee up to which was checked, if not up to what each kernel declares.

    What a backend says of torch's own kernels (`aten_harmless`) is listed, and not checked here.
    """
    chosen = registry.load(backend)
    kernels = chosen.kernels()
    ops: dict[str, dict[str, Any]] = {}
    whole: dict[str, Any] = {}
    held = True
    for outcome in sorted(outcomes, key=_place):
        good = bool(outcome["breaks"]) == (outcome["gap"] is not None)
        held = held and good
        if outcome["op"] is None:
            _add(whole, outcome)
            continue
        op = ops.setdefault(outcome["op"], {})
        op.setdefault("cases", [case.label for case in CONTRACTS[outcome["op"]].cases])
        kernel = kernels.get(outcome["op"])
        dtype = getattr(torch, outcome["dtype"])
        found = op.setdefault(outcome["dtype"], {})
        if kernel is not None and dtype in kernel.dtypes:
            found["guarantee"] = level or str(kernel.guarantee)
            found["order"] = str(kernel.order_of(dtype))
            found["portable"] = dtype in kernel.portable
        _add(found, outcome)
    return {
        "format": FORMAT,
        "date": datetime.date.today().isoformat(),
        "backend": backend,
        "scope": scope,
        "holds": held and bool(ops) and scope != "partial",
        **({"level": level} if level else {}),
        "machine": machine(chosen.device_type),
        "versions": _versions(registry.distribution(backend)),
        "ops": ops,
        "unproved": {
            "aten_harmless": sorted(chosen.aten_harmless()),
            "dtypes": {
                name: rest for name in ops if (rest := _unproved(kernels.get(name), ops[name]))
            },
        },
        **({"whole": whole} if whole else {}),
    }


def _place(outcome: Mapping[str, Any]) -> tuple[int, str, int]:
    """Where an outcome stands in the certificate: pytest-xdist hands them on in any order."""
    op = list(CONTRACTS).index(outcome["op"]) if outcome["op"] else len(CONTRACTS)
    return op, outcome["dtype"] or "", NAMES.index(outcome["check"])


def _unproved(kernel: Kernel | None, checked: Mapping[str, Any]) -> list[str]:
    """The dtypes that a kernel declares and that were not checked."""
    declared = [] if kernel is None else sorted(short(dtype) for dtype in kernel.dtypes)
    return [dtype for dtype in declared if dtype not in checked]


def _add(entry: dict[str, Any], outcome: Mapping[str, Any]) -> None:
    """One outcome: how much was compared, what was measured, and what broke or was expected to."""
    check = outcome["check"]
    entry.setdefault("checks", {})[check] = outcome["looked_at"]
    if outcome["gap"] is not None:
        entry.setdefault("gaps", {})[check] = outcome["gap"]
    if outcome["breaks"]:
        entry.setdefault("broken", {})[check] = outcome["breaks"]
    entry.update(outcome["figures"])


def machine(device_type: str) -> dict[str, Any]:
    """The processor, and the device if the backend has another one."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }
    if device_type != "cpu" and torch.accelerator.is_available():
        index = torch.accelerator.current_device_index()
        module = getattr(torch, device_type, None)
        name = getattr(module, "get_device_name", None)
        found["device"] = name(index) if name is not None else device_type
    return found


def read(path: Path) -> dict[str, Any]:
    """A certificate from a file; `ConfigurationError` if it is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} is not a certificate: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ConfigurationError(f"{path} is not a certificate of the format {FORMAT!r}")
    return found


def _versions(plugin: str) -> dict[str, str]:
    found = {"python": platform.python_version(), "plugin": plugin}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
