"""`bi doctor` and `bi verify`: what they print, their JSON, their exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from batch_invariant.cli import main
from batch_invariant.ops import CONTRACTS
from plugin_source import PLUGIN, Install


def _bi(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "batch_invariant", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_no_command_and_unknown_commands_are_usage_errors() -> None:
    for arguments in ((), ("frobnicate",), ("verify", "--frobnicate")):
        done = _bi(*arguments)
        assert done.returncode == 2
        assert "usage: bi" in done.stderr


def test_version() -> None:
    assert _bi("--version").stdout == "batch-invariant 0.1.0\n"


def test_doctor_in_a_pipe() -> None:
    done = _bi("doctor")
    assert done.returncode == 0, done.stderr
    assert "ok  cpu" in done.stdout
    assert "* selected for cpu" in done.stdout
    assert "batch, portable: serial" in done.stdout
    assert "VLLM_BATCH_INVARIANT -> off; backend: auto; cpu -> cpu" in done.stdout
    assert "\x1b" not in done.stdout


def test_doctor_json() -> None:
    report = json.loads(_bi("doctor", "--json").stdout)
    assert report["ready"] is True
    (cpu,) = [b for b in report["backends"] if b["name"] == "cpu"]
    assert cpu["missing"] == []
    assert cpu["ops"]["mm"]["float16"] == {
        "guarantee": "schedule",
        "order": "serial",
        "portable": True,
    }


def test_doctor_survives_a_broken_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libhccl.so: cannot open shared object')")
    done = _bi("doctor", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "torch does not import" in done.stdout
    assert "libhccl.so" in done.stdout
    assert "next: torch does not import at all: install it again" in done.stdout
    assert "Traceback" not in done.stderr


def test_doctor_tells_a_broken_device_plugin_from_a_broken_torch(tmp_path: Path) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nbroken = broken_plugin:load\n")
    (tmp_path / "broken_plugin.py").write_text("raise ImportError('no CANN here')")
    done = _bi("doctor", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "no CANN here" in done.stdout
    assert "a device plugin breaks its import" in done.stdout


def test_doctor_reports_settings_that_mean_nothing() -> None:
    done = _bi("doctor", VLLM_BATCH_INVARIANT="yes")
    assert done.returncode == 1
    assert "VLLM_BATCH_INVARIANT='yes' means nothing" in done.stdout
    done = _bi("doctor", BATCH_INVARIANT_BACKEND="asend")
    assert done.returncode == 1
    assert "unknown backend 'asend'; installed: " in done.stdout


def test_doctor_shows_a_plugin_that_cannot_run(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    source = PLUGIN.format(name="mine").replace(
        "Availability(True)", "Availability(False, 'no chip found', 'plug one in')"
    )
    install(source, name="mine")
    install("import no_such_sdk", name="theirs")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "--  mine     not usable here\n        no chip found\n        plug one in" in out
    assert "ModuleNotFoundError: No module named 'no_such_sdk'" in out


def test_verify_some_operators() -> None:
    done = _bi("verify", "--op", "mm", "--op", "softmax")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 operators hold" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_verify_writes_a_certificate_and_compares_with_it(tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    first = _bi("verify", "--op", "sum", "--json", "--report", str(path))
    report = json.loads(first.stdout)
    assert report == json.loads(path.read_text())
    assert report["holds"] is True
    found = report["ops"]["sum"]
    assert set(found) == {"cases", "float32", "bfloat16", "float16"}
    entry = found["float32"]
    assert entry["guarantee"] == "schedule"
    assert entry["portable"] is True
    assert entry["checks"]["T1 population"] >= 6
    assert len(entry["fingerprint"]) == 12

    again = _bi("verify", "--op", "sum", "--against", str(path))
    assert again.returncode == 0, again.stdout
    assert "Nothing differs from" in again.stdout

    (case,) = entry["results"]
    entry["results"][case] = "0" * 16
    report["versions"]["torch"] = "2.0"
    path.write_text(json.dumps(report))
    changed = _bi("verify", "--op", "sum", "--against", str(path))
    assert changed.returncode == 1
    assert "versions, torch: 2.0 -> " in changed.stdout
    assert f"sum float32: other bits in 1 of 1 cases: {case}" in changed.stdout

    full = _bi("verify", "--op", "sum", "--full", "--against", str(path))
    assert full.returncode == 2
    assert "is a quick certificate, and this run is full" in full.stderr
    path.write_text("{}")
    assert _bi("verify", "--against", str(path)).returncode == 2


def test_verify_reports_a_broken_backend(
    broken_mm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "--backend", broken_mm, "--op", "mm"]) == 1
    out = capsys.readouterr().out
    assert "BREAKS" in out
    assert "T1 population" in out
    assert "0 of 1 operators hold" in out


def test_verify_usage_errors() -> None:
    done = _bi("verify", "--op", "frobnicate")
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown operator frobnicate; known: mm" in done.stderr
    done = _bi("verify", "--backend", "asend")
    assert done.returncode == 2
    assert "unknown backend 'asend'; installed: " in done.stderr


def test_verify_of_a_backend_that_cannot_run_is_not_a_success(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    source = PLUGIN.format(name="mine").replace("Availability(True)", "Availability(False, 'no')")
    install(source, name="mine")
    assert main(["verify", "--backend", "mine"]) == 1
    assert "backend 'mine' is not available: no" in capsys.readouterr().err


def test_verify_of_a_backend_without_kernels_is_not_a_success(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(PLUGIN.format(name="mine"), name="mine")
    assert main(["verify", "--backend", "mine"]) == 1
    out = capsys.readouterr().out
    assert "the backend 'mine' has no kernel and declares no gap" in out
    assert f"0 of {len(CONTRACTS)} operators hold" in out
