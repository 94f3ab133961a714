"""What the backend says where it cannot run: each reason, with its remedy, and nothing imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import batch_invariant as bi
from batch_invariant_ascend import installation, tiers


def _package(folder: Path, version: str, body: str = "") -> None:
    """A torch_npu that is installed in `folder`, and whose import does `body`."""
    info = folder / f"torch_npu-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    (folder / "torch_npu").mkdir()
    (folder / "torch_npu" / "__init__.py").write_text(body or "raise AssertionError('imported')\n")


def _here() -> str:
    import torch

    return ".".join(torch.__version__.split(".")[:2])


@pytest.fixture
def npu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch_npu for this torch, CANN's libraries and a device node: everything but a device."""
    _package(tmp_path, f"{_here()}.0")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("libhccl.so", "libascendcl.so"):
        (tmp_path / name).touch()
    (tmp_path / "davinci0").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setattr(installation, "_DEVICE_NODES", tmp_path)
    for home in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        monkeypatch.delenv(home, raising=False)
    return tmp_path


def _refused(*texts: str) -> None:
    with pytest.raises(bi.BackendUnavailable) as error:
        bi.use_backend("ascend")
    for text in texts:
        assert text in str(error.value)
    assert "torch_npu" not in sys.modules, "a look imports nothing"


def test_everything_there(npu: Path) -> None:
    assert installation.availability().ok
    assert "torch_npu" not in sys.modules


def test_torch_npu_is_not_installed() -> None:
    _refused("torch_npu is not installed", f"pip install 'torch_npu=={_here()}.*'")


def test_a_torch_npu_for_another_torch(npu: Path) -> None:
    (npu / f"torch_npu-{_here()}.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.10.0.post4\n"
    )
    _refused(
        "torch_npu 2.10.0.post4 is made for torch 2.10",
        f"pip install 'torch_npu=={_here()}.*'",
        "or install torch==2.10.*",
    )


def test_no_cann(npu: Path) -> None:
    (npu / "libhccl.so").unlink()
    _refused(
        "libhccl.so cannot be found: CANN is not installed or not set up",
        "`import torch` itself fails",
        "source /usr/local/Ascend/ascend-toolkit/set_env.sh",
        "TORCH_DEVICE_BACKEND_AUTOLOAD=0",
    )


def test_cann_that_is_not_on_the_path(npu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    monkeypatch.setenv("ASCEND_HOME_PATH", "/opt/cann")
    _refused("CANN is at /opt/cann, but LD_LIBRARY_PATH", "source /opt/cann/set_env.sh")


def test_no_device(npu: Path) -> None:
    (npu / "davinci0").unlink()
    _refused("there is no /dev/davinci0", "npu-smi info")


def test_triton_of_somebody_else_is_no_tier() -> None:
    """Upstream Triton knows no NPU; where it is installed the tier is missing, not broken."""
    with pytest.raises(tiers.Missing, match="needs triton-ascend: pip install triton-ascend"):
        tiers.need_triton()


def test_a_batch_invariant_ops_of_somebody_else_is_no_tier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are two packages of that name on the package index, and neither is AscendC's."""
    (tmp_path / "batch_invariant_ops.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    tiers._ascendc_problem.cache_clear()
    try:
        with pytest.raises(tiers.Missing, match="another package of that name is installed"):
            tiers.ascendc("npu_mm_batch_invariant")
    finally:
        tiers._ascendc_problem.cache_clear()
        sys.modules.pop("batch_invariant_ops", None)


def test_every_tier_missing_or_failing_is_an_error_with_all_reasons() -> None:
    def missing() -> None:
        raise tiers.Missing("needs the moon")

    with pytest.raises(bi.OpNotSupported, match=r"has tides: A needs the moon; B is not batch-inv"):
        tiers.choose(
            "tides",
            (
                tiers.Candidate(tiers.Tier.A, missing),
                tiers.Candidate(tiers.Tier.B, lambda: print, lambda fn: "rows 1 to 2 differ"),
            ),
        )


def test_doctor_shows_a_torch_npu_for_another_torch(tmp_path: Path) -> None:
    _package(tmp_path, "2.10.0.post4", "def _autoload(): pass\n")
    done = _child("import sys; from batch_invariant.cli import main; main(['doctor'])", tmp_path)
    assert "torch_npu 2.10.0.post4 is made for torch 2.10" in done.stdout
    assert "or install torch==2.10.*" in done.stdout


def _child(code: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "LD_LIBRARY_PATH": "",
            "VLLM_BATCH_INVARIANT": "0",
            **more,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_doctor_where_torch_npu_breaks_import_torch(tmp_path: Path) -> None:
    _package(
        tmp_path,
        f"{_here()}.0",
        "raise ImportError('libhccl.so: cannot open shared object file')\n",
    )
    done = _child(
        "import sys; from batch_invariant.cli import main; sys.exit(main(['doctor', '--json']))",
        tmp_path,
    )
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert "libhccl.so" in report["torch"]["error"]
    assert not report["ready"]
    (ascend,) = (b for b in report["backends"] if b["name"] == "ascend")
    assert not ascend["ok"]
    assert "libhccl.so, libascendcl.so cannot be found" in ascend["reason"]
    assert "set_env.sh" in ascend["remedy"]
    (cpu,) = (b for b in report["backends"] if b["name"] == "cpu")
    assert cpu["ok"], "the other backends are shown all the same"


def test_importing_the_package_imports_no_sdk(tmp_path: Path) -> None:
    _package(tmp_path, f"{_here()}.0")
    done = _child(
        "import sys, batch_invariant_ascend as a; a.AscendBackend().probe()\n"
        "assert not {'torch_npu', 'triton', 'batch_invariant_ops'} & set(sys.modules)",
        tmp_path,
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert done.returncode == 0, done.stderr
