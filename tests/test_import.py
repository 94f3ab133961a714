"""What importing costs: nothing vendor-specific, and no torch where none is needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_importing_the_package_loads_no_torch_and_no_vendor_sdk() -> None:
    done = _python(
        "-c",
        "import sys, batch_invariant\n"
        "print([m for m in ('torch', 'triton', 'torch_npu', 'jax', 'stevedore', 'rich') "
        "if m in sys.modules])",
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_using_an_operator_loads_no_vendor_sdk() -> None:
    done = _python(
        "-c",
        "import sys, torch, batch_invariant as bi\n"
        "bi.sum(torch.ones(3))\n"
        "print([m for m in ('triton', 'torch_npu', 'jax') if m in sys.modules])",
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_help_does_not_import_torch() -> None:
    done = _python("-X", "importtime", "-m", "batch_invariant", "--help")
    assert done.returncode == 0
    assert "doctor" in done.stdout
    assert not [line for line in done.stderr.splitlines() if line.split("|")[-1].strip() == "torch"]


@pytest.mark.parametrize("value", [None, "0", "false", ""])
def test_mode_off_imports_only_the_entry_point(value: str | None) -> None:
    environment = {} if value is None else {"VLLM_BATCH_INVARIANT": value}
    script = "import sys, torch; print(*(m for m in sys.modules if m.startswith('batch_inv')))"
    done = _python("-X", "importtime", "-c", script, **environment)
    assert done.returncode == 0, done.stderr
    ours = set(done.stdout.split())
    assert ours == {"batch_invariant", "batch_invariant.env", "batch_invariant.errors"}
    # Microseconds that our modules take, against the seconds of torch itself.
    spent = sum(
        int(line.split(":")[1].split("|")[0])
        for line in done.stderr.splitlines()
        if line.split("|")[-1].strip() in ours
    )
    assert 0 < spent < 50_000


def test_all_public_names_exist() -> None:
    import batch_invariant as bi

    for name in bi.__all__:
        assert getattr(bi, name) is not None
    assert set(bi.__all__) <= set(dir(bi))
    with pytest.raises(AttributeError, match="no attribute 'nothing_like_this'"):
        _ = bi.nothing_like_this
