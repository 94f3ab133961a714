"""`VLLM_BATCH_INVARIANT=1 python anything.py`: on without an import, off without a trace."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_SCRIPT = """
import torch
g = torch.Generator().manual_seed(0)
x, w = torch.randn(64, 1024, generator=g), torch.randn(1024, 512, generator=g)
alone, together = x[:1].clone() @ w, (x @ w)[:1]
print(torch.equal(alone.view(torch.int32), together.view(torch.int32)))
"""


def _run(script: str = _SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize("value", ["1", "true", "True"])
def test_on(value: str) -> None:
    done = _run(VLLM_BATCH_INVARIANT=value)
    assert done.stdout.strip() == "True", done.stderr
    assert done.stderr == ""


def test_off_is_stock_torch() -> None:
    done = _run("import torch; print(torch.library._impls)", VLLM_BATCH_INVARIANT="0")
    assert "aten/mm/CPU" not in done.stdout


def test_an_unknown_value_fails_closed_at_first_use() -> None:
    done = _run(VLLM_BATCH_INVARIANT="yes")
    assert done.returncode == 1
    assert "VLLM_BATCH_INVARIANT='yes' means nothing: set it to 1 or true" in done.stderr
    assert "ConfigurationError" in done.stderr.splitlines()[-1]


def test_torch_still_imports_with_an_unknown_value() -> None:
    done = _run("import torch; print(torch.ones(2).tolist())", VLLM_BATCH_INVARIANT="yes")
    assert (done.returncode, done.stdout.strip()) == (0, "[1.0, 1.0]")
    assert done.stderr.startswith("batch_invariant: VLLM_BATCH_INVARIANT='yes'")


def test_a_named_backend_that_does_not_exist_fails_closed() -> None:
    done = _run(VLLM_BATCH_INVARIANT="1", BATCH_INVARIANT_BACKEND="asend")
    assert done.returncode == 1
    assert "UnknownBackend: unknown backend 'asend'; installed: " in done.stderr


def test_a_named_backend_is_selected() -> None:
    script = "import batch_invariant as bi; print(bi.current_backend().name, bi.is_enabled())"
    done = _run(f"import torch; {script}", VLLM_BATCH_INVARIANT="1", BATCH_INVARIANT_BACKEND="cpu")
    assert done.stdout.strip() == "cpu True", done.stderr


@pytest.mark.parametrize(
    "first",
    [
        "import batch_invariant as bi, torch",
        "import batch_invariant as bi",
        "import batch_invariant as bi; bi.use_backend('cpu')",
        "import batch_invariant.selector, batch_invariant as bi",
        "from batch_invariant.proof import checks; import batch_invariant as bi",
        "import batch_invariant.cli.verify, batch_invariant as bi; bi.mm",
    ],
)
def test_on_whichever_is_imported_first(first: str) -> None:
    done = _run(f"{first}; print(bi.is_enabled())", VLLM_BATCH_INVARIANT="1")
    assert done.stdout.strip() == "True", done.stderr
