"""What holds without a GPU: the backend says why it cannot run, and imports nothing to find out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batch_invariant.errors import ConfigurationError
from batch_invariant_cuda import CudaBackend
from batch_invariant_cuda.schedules import parse, read

FOLDER = Path(__file__).parents[1] / "batch_invariant_cuda" / "schedules"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_probe_says_so_and_what_to_do():
    found = CudaBackend().probe()
    assert not found.ok
    assert "CUDA" in found.reason
    assert found.remedy


def test_an_old_gpu_and_a_missing_triton_are_reasons(monkeypatch):
    import batch_invariant_cuda

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (7, 5))
    found = CudaBackend().probe()
    assert not found.ok
    assert "Old GPU has compute capability 7.5" in found.reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (8, 0))
    monkeypatch.setattr(batch_invariant_cuda, "find_spec", lambda name: None)
    found = CudaBackend().probe()
    assert found.reason == "Triton is not installed"
    assert "batch-invariant-cuda[runtime]" in found.remedy
    monkeypatch.setattr(batch_invariant_cuda, "find_spec", lambda name: object())
    monkeypatch.setattr(batch_invariant_cuda.metadata, "version", lambda name: "3.5.1")
    found = CudaBackend().probe()
    assert found.reason == "Triton 3.5.1 is installed; the kernels need 3.6 or newer"
    assert "batch-invariant-cuda[runtime]" in found.remedy
    for version in ("3.6.0", "3.10.0+git1", "4.0"):
        monkeypatch.setattr(
            batch_invariant_cuda.metadata, "version", lambda name, version=version: version
        )
        assert CudaBackend().probe().ok


def test_kernels_without_triton_say_what_to_do():
    code = (
        "import sys; sys.modules['triton'] = None; import batch_invariant_cuda as b\n"
        "from batch_invariant.errors import BackendUnavailable\n"
        "try: b.CudaBackend().kernels()\n"
        "except BackendUnavailable as e: sys.exit('[runtime]' not in str(e))\n"
        "sys.exit(2)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_harmless_operators_take_back_what_reduces():
    from batch_invariant_cuda.harmless import HARMLESS

    assert HARMLESS["_foreach_max"] is None
    assert HARMLESS["_foreach_maximum"] is not None
    assert "undefined" in str(HARMLESS["scatter.src"])


def test_looking_imports_no_triton():
    code = (
        "import sys; from batch_invariant_cuda import CudaBackend; CudaBackend().probe(); "
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_shipped_tables_are_well_formed():
    for path in sorted(FOLDER.glob("*.json")):
        for dtype, k, n, _, schedule in read(json.loads(path.read_text()), path.name):
            assert hasattr(torch, dtype)
            assert min(k, n) > 0
            assert parse(str(schedule)) == schedule


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tma 128x128", "expected e.g."),
        ("tma 96x128x64 w4 s3", "bm=96 is no power of two"),
        ("tma 128x128+24x64 w4 s3", "24 columns"),
        ("tile 128x128+32x64 w4 s3", "two widths"),
        ("ring 64x128x64 w8 s3", "64 rows for each 4"),
        ("ring 128x128x64 w8 s3 swap", "only split, hybrid"),
        ("tma 128x128x64 w8 s3 hybrid", "only 'ring' and 'fma' take hybrid"),
        ("fma 64x64x32 w4 s4 swap", "only split, hybrid"),
        ("ring 64x64x64 w4 s4 split early", "only what is apart"),
    ],
)
def test_a_schedule_that_means_nothing_is_refused(text, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        parse(text)


@pytest.mark.parametrize(
    "data",
    [
        [],
        {"entries": {"bfloat16": {"4096": []}}},
        {"entries": {"bfloat16": {"64x64": []}}},
        {
            "entries": {
                "bfloat16": {"64x64": [[8, "tile 64x64x64 w4 s3"], [4, "tile 64x64x64 w4 s3"]]}
            }
        },
        {"entries": {"bfloat61": {"64x64": [[4, "tile 64x64x64 w4 s3"]]}}},
        {"entries": {"bfloat16": {"64x0": [[4, "tile 64x64x64 w4 s3"]]}}},
        {"entries": {"bfloat16": []}},
        {"entries": {"bfloat16": {"64x64": 3}}},
        {"entries": {"bfloat16": {"64x64": [[4]]}}},
        {"entries": {"bfloat16": {"64x64": [["4", "tile 64x64x64 w4 s3"]]}}},
        {"entries": {"bfloat16": {"64x64": [[0, "tile 64x64x64 w4 s3"]]}}},
        {"entries": {"bfloat16": {"64x64": [[4, None]]}}},
    ],
    ids=[
        *("no object", "no shape", "empty", "descending"),
        *("no dtype", "nothing to multiply"),
        *("no shapes", "no lines", "no pair", "no number", "no rows", "no text"),
    ],
)
def test_a_table_that_means_nothing_is_refused(data):
    with pytest.raises(ConfigurationError, match="mine"):
        read(data, "mine")
