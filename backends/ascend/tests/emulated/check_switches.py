"""The vendor's switches on the emulated device: set by the mode, put back exactly, and checked."""

from __future__ import annotations

import os

import pytest
import torch

import batch_invariant as bi
import fakes
from batch_invariant_ascend import installation
from batch_invariant_ascend.switches import ENVIRONMENT
from npu_device import npu

X = torch.ones(3, 3)


def _state() -> object:
    return (
        {name: os.environ.get(name) for name in ENVIRONMENT},
        npu.level,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        fakes.options.get("ALLOW_INTERNAL_FORMAT") == "enable",
        fakes.options.get("ALLOW_MATMUL_HF32") == "enable",
    )


@pytest.mark.parametrize("flags", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("error", [False, True])
def test_switches_are_set_and_restored(
    flags: tuple[bool, bool], error: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HCCL_DETERMINISTIC", "false")
    monkeypatch.delenv("LCCL_DETERMINISTIC", raising=False)
    fakes.options["ALLOW_INTERNAL_FORMAT"] = "enable"
    torch.use_deterministic_algorithms(flags[0], warn_only=flags[1])
    npu._get_deterministic_level()
    before = _state()
    try:
        try:
            with bi.enabled():
                assert all(os.environ[name] == value for name, value in ENVIRONMENT.items())
                assert fakes.options["ALLOW_INTERNAL_FORMAT"] == "disable"
                assert torch.are_deterministic_algorithms_enabled()
                # A strict setting of the user's is not weakened.
                assert torch.is_deterministic_algorithms_warn_only_enabled() == (
                    flags != (True, False)
                )
                if error:
                    raise KeyError
        except KeyError:
            assert error
        assert _state() == before
    finally:
        torch.use_deterministic_algorithms(False)
        npu._get_deterministic_level()
        fakes.options.clear()


def test_hccl_that_has_started_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "hccl_started", lambda: True)
    with pytest.raises(
        bi.BackendUnavailable, match=r"HCCL has been initialised.*init_process_group"
    ):
        bi.use_backend("ascend")
    with bi.enabled(), pytest.raises(bi.BackendUnavailable, match="HCCL has been initialised"):
        X.npu().sum()
    with bi.enabled(), pytest.raises(bi.BackendUnavailable, match="HCCL has been initialised"):
        torch.ops.npu.npu_swiglu(X.npu())  # a fault stops the vendor's operators as well
    monkeypatch.setenv("HCCL_DETERMINISTIC", "strict")
    monkeypatch.setenv("LCCL_DETERMINISTIC", "1")
    with bi.enabled():  # started with the right variables
        X.npu().sum()


def test_hccl_that_starts_under_us_may_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    with bi.enabled():
        X.npu().sum()
        monkeypatch.setattr(installation, "hccl_started", lambda: True)
    try:
        with bi.enabled():
            X.npu().sum()
    finally:
        monkeypatch.setattr(installation, "_started_invariant", False)


@pytest.mark.parametrize("key", ["NPU", "PrivateUse1"])
def test_an_override_of_somebody_else_is_an_error(key: str) -> None:
    """As vllm-ascend's mode makes them, by the device's own name."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm", lambda a, b: a, key, allow_override=True)
    try:
        with pytest.raises(bi.OverrideClash, match="aten::mm is already overridden"):
            bi.enable()
        assert not bi.is_enabled()
    finally:
        library._destroy()
    with bi.enabled():
        X.npu().sum()


def test_310p_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npu, "name", "Ascend310P3")
    with pytest.raises(bi.BackendUnavailable, match=r"Ascend310P3.*no bfloat16.*Atlas A2"):
        bi.use_backend("ascend")


def test_wrong_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "torch_npu_version", lambda: "2.10.0.post4")
    with pytest.raises(
        bi.BackendUnavailable, match=r"torch_npu 2.10.0.post4 is made for torch 2.10"
    ):
        bi.use_backend("ascend")


def test_doctor_shows_tiers_and_what_would_be_better(capsys: pytest.CaptureFixture[str]) -> None:
    from batch_invariant import cli

    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "D: composed of elementwise operators" in shown
    assert "better: A needs CANN >= 9.2.0" in shown
    assert "better: B needs the AscendC package batch_invariant_ops" in shown
    assert "better: C needs triton-ascend" in shown
