"""Shared set-up: no user's cache is read or written, and no test leaves the mode on."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from plugin_source import Install

for _name, _prefix in (
    ("XDG_CACHE_HOME", "bi-cache-"),
    ("TORCHINDUCTOR_CACHE_DIR", "bi-inductor-"),
):
    os.environ[_name] = tempfile.mkdtemp(prefix=_prefix)
    atexit.register(shutil.rmtree, os.environ[_name], ignore_errors=True)
for _name in ("VLLM_BATCH_INVARIANT", "BATCH_INVARIANT_BACKEND"):
    os.environ.pop(_name, None)

import batch_invariant as bi  # noqa: E402
from batch_invariant import registry  # noqa: E402

collect_ignore = ["sample_backend"]
"""A distribution of its own, with its modules where pytest would not import them."""


@pytest.fixture(autouse=True)
def _untouched() -> Iterator[None]:
    """A test that leaves the mode on or a backend selected fails, and spoils no other."""
    yield
    left_on = bi.is_enabled()
    bi.disable()
    bi.use_backend(None)
    assert not left_on, "the test left the mode on"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a plugin distribution for the time of the test: `install(source, name=..., ...)`.

    It is found as any other: a module and a dist-info with an entry point on sys.path.
    """
    count = 0

    def make(source: str, *, name: str, attribute: str = "Plugin", dist: str = "") -> str:
        nonlocal count
        count += 1
        module = f"bi_test_plugin_{count}"
        folder = tmp_path / module
        folder.mkdir()
        (folder / f"{module}.py").write_text(textwrap.dedent(source))
        info = folder / f"{dist or module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {dist or module}\nVersion: 1.0\n"
        )
        (info / "entry_points.txt").write_text(
            f"[batch_invariant.backends]\n{name} = {module}:{attribute}\n"
        )
        monkeypatch.syspath_prepend(str(folder))
        registry.load.cache_clear()
        return module

    # stevedore keeps its list of entry points for the whole process
    from stevedore import extension

    monkeypatch.setattr(extension.ExtensionManager, "ENTRY_POINT_CACHE", {})
    yield make
    bi.disable()
    bi.use_backend(None)
    registry.load.cache_clear()
    for name in [n for n in sys.modules if n.startswith("bi_test_plugin_")]:
        del sys.modules[name]


@pytest.fixture
def broken_mm(install: Install) -> str:
    """A CPU backend like ours, but its matrix products are torch's own, on purpose."""
    install(
        """
        from dataclasses import replace

        import torch

        from batch_invariant.backend import API_VERSION
        from batch_invariant.cpu import CpuBackend
        from batch_invariant.stock import stock

        def mm(self, mat2):
            # Pairs of rows share their sums when the batch is even: as variant as it gets.
            out = stock("mm")(self, mat2)
            return out if len(self) % 2 else out + out.flip(0) * torch.finfo(out.dtype).eps

        class Plugin(CpuBackend):
            name = "brokenmm"

            def kernels(self):
                table = dict(super().kernels())
                table["mm"] = replace(table["mm"], fn=mm)
                return table
        """,
        name="brokenmm",
    )
    return "brokenmm"
