"""What `bi verify --backend tpu` adds: the interpreter's hard modes, and the TPU compiler."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from batch_invariant.backend import Evidence
from batch_invariant_tpu.requirements import libtpu_problem

_TIMEOUT = 3600  # seconds


def gather(full: bool) -> Evidence:
    """Both checks, each in a process of its own: they set how jax and libtpu start."""
    parts = {
        "interpreter": _run("batch_invariant_tpu.interpreter_check", full),
        "compiler": _compiled(full),
    }
    lines = []
    for name, found in parts.items():
        entries = found.get("checks", [])
        bad = [entry for entry in entries if entry["faults"]]
        state = "holds" if found["holds"] else "FAILS"
        lines.append(f"  {name}: {state}, {len(entries) - len(bad)} of {len(entries)}")
        lines += [f"      {_what(entry)}: {fault}" for entry in bad for fault in entry["faults"]]
        lines += [f"      {found['error']}"] if "error" in found else []
    compiled = parts["compiler"]
    if "proves" in compiled:
        lines.append(f"  This proves: {compiled['proves']}.")
        lines.append(f"  This does not prove: {compiled['does_not_prove']}.")
    return Evidence(all(found["holds"] for found in parts.values()), lines, parts)


def _compiled(full: bool) -> dict[str, Any]:
    if (problem := libtpu_problem()) is not None:
        # Named and not run: without it nothing is known of a TPU, so this is no success.
        return {"holds": False, "error": f"{problem[0]}; {problem[1]}"}
    return _run("batch_invariant_tpu.compile_check", full)


def _run(module: str, full: bool) -> dict[str, Any]:
    """The report of one check; what it says meanwhile goes to standard error, as progress."""
    with tempfile.TemporaryDirectory() as folder:
        report, errors = Path(folder) / "report.json", Path(folder) / "errors"
        with (
            errors.open("w") as sink,
            subprocess.Popen(
                _command(module, report, full),
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
            ) as running,
        ):
            late = threading.Timer(_TIMEOUT, running.kill)
            late.start()
            for line in running.stdout or ():
                sys.stderr.write(f"{module.split('.')[-1]}: {line}")
            code = running.wait()
            in_time = late.is_alive()
            late.cancel()
        if report.exists():
            found: dict[str, Any] = json.loads(report.read_text())
            return found
        if not in_time:
            return {"holds": False, "error": f"{module} took longer than {_TIMEOUT} s"}
        last = errors.read_text().strip()[-400:]
        return {"holds": False, "error": f"{module} ended with {code}: {last}"}


def _command(module: str, report: Path, full: bool) -> list[str]:
    command = [sys.executable, "-m", module, "--report", str(report)]
    return command + (["--full"] if full else [])


def _what(entry: dict[str, Any]) -> str:
    keys = ("generation", "mode", "dtype", "case", "kernel", "control")
    return " ".join(str(entry[key]) for key in keys if key in entry)
