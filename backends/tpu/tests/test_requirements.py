"""What is missing is said, with what to do; nothing of it needs jax."""

import importlib.metadata
import subprocess
import sys

import pytest

from batch_invariant.errors import BackendUnavailable
from batch_invariant_tpu import requirements
from batch_invariant_tpu.backend import TpuBackend


def _pretend(monkeypatch: pytest.MonkeyPatch, **found: str | None) -> None:
    """Other installed packages: versions by name, None for one that is not there."""
    version, find_spec = requirements.metadata.version, requirements.find_spec

    def other_version(name: str) -> str:
        if name in found:
            if (answer := found[name]) is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return answer
        return version(name)

    def other_spec(name: str) -> object:
        if name in found:
            return None if found[name] is None else object()
        return find_spec(name)

    monkeypatch.setattr(requirements.metadata, "version", other_version)
    monkeypatch.setattr(requirements, "find_spec", other_spec)


def test_without_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, jax=None)
    answer = TpuBackend().probe()
    assert not answer.ok
    assert answer.reason == "jax is not installed"
    assert "pip install 'batch-invariant-tpu[runtime]'" in answer.remedy
    with pytest.raises(BackendUnavailable, match="jax is not installed"):
        TpuBackend().kernels()


@pytest.mark.parametrize("version", ["0.8.0", "0.4.38"])
def test_a_jax_that_is_too_old(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    _pretend(monkeypatch, jax=version, jaxlib=version)
    reason, remedy = requirements.jax_problem() or ("", "")
    assert version in reason
    assert "shape_invariant_numerics" in reason
    assert "jax>=0.8.1" in remedy


@pytest.mark.parametrize("version", ["0.8.1", "0.10.2", "1.0.0.dev1"])
def test_a_jax_that_is_new_enough(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    _pretend(monkeypatch, jax=version, jaxlib=version)
    assert requirements.jax_problem() is None


def test_python_3_11_is_told_which_jax_it_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, jax="0.8.0", jaxlib="0.8.0")
    monkeypatch.setattr(requirements.sys, "version_info", (3, 11, 7))
    assert "0.10.2 is the newest for Python 3.11" in (requirements.jax_problem() or ("", ""))[1]
    monkeypatch.setattr(requirements.sys, "version_info", (3, 12, 0))
    assert "3.11" not in (requirements.jax_problem() or ("", ""))[1]


def test_jax_without_jaxlib(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, jax="0.10.2", jaxlib=None)
    assert "without jaxlib" in (requirements.jax_problem() or ("", ""))[0]


def test_without_the_tpu_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, jax="0.10.2", jaxlib="0.10.2", libtpu=None)
    reason, remedy = requirements.libtpu_problem() or ("", "")
    assert "libtpu) is not installed" in reason
    assert "batch-invariant-tpu[compile]" in remedy


def test_the_tpu_compiler_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, jax="0.10.2", jaxlib="0.10.2")
    monkeypatch.setattr(requirements.sys, "platform", "darwin")
    assert "this is darwin" in (requirements.libtpu_problem() or ("", ""))[0]


def test_a_look_imports_no_jax() -> None:
    code = (
        "import sys\n"
        "from batch_invariant_tpu.backend import TpuBackend\n"
        "TpuBackend().probe()\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
