"""What `bi verify --backend tpu` adds: the interpreter's hard modes, and the TPU compiler."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
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
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", module, "--report", str(report)]
        try:
            done = subprocess.run(
                command + (["--full"] if full else []),
                capture_output=True,
                text=True,
                check=False,
                timeout=_TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return {"holds": False, "error": f"{module} took longer than {_TIMEOUT} s"}
        if not report.exists():
            last = done.stderr.strip()[-400:]
            return {"holds": False, "error": f"{module} ended with {done.returncode}: {last}"}
        found: dict[str, Any] = json.loads(report.read_text())
        return found


def _what(entry: dict[str, Any]) -> str:
    keys = ("generation", "mode", "dtype", "case", "kernel", "control")
    return " ".join(str(entry[key]) for key in keys if key in entry)
