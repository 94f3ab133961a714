"""The vendor's switches on the emulated device: set by the mode, put back exactly, and checked."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
import torch_npu

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


@contextmanager
def _group(backend: str | None) -> Iterator[None]:
    """A real process group of one rank; gloo computes behind torch_npu's names."""
    init = torch.distributed.init_process_group
    init(backend, rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def _collectives() -> None:
    """As torch_npu registers them: HCCL is what NPU tensors get where nothing else is named."""
    backend = torch.distributed.Backend
    for name in ("lccl", "hccl"):
        backend.register_backend(
            name, lambda store, rank, size, timeout: gloo(store, rank, size), devices=["npu"]
        )
    gloo = torch.distributed.ProcessGroupGloo


@pytest.mark.parametrize("backend", ["hccl", "cpu:gloo,npu:hccl", None, "lccl", "npu:lccl"])
def test_hccl_that_has_started_is_an_error(
    backend: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from batch_invariant import cli

    said = r"HCCL has been initialised already, with HCCL_DETERMINISTIC=\(unset\)"
    remedy = "before torch.distributed.init_process_group"
    for name in installation.HCCL:
        monkeypatch.delenv(name, raising=False)
    with _group(backend):
        with pytest.raises(bi.BackendUnavailable, match=f"{said}.*{remedy}"):
            bi.use_backend("ascend")
        with bi.enabled(), pytest.raises(bi.BackendUnavailable, match=said):
            X.npu().sum()
        with bi.enabled(), pytest.raises(bi.BackendUnavailable, match=said):
            torch.ops.npu.npu_swiglu(X.npu())  # a fault stops the vendor's operators as well
        if backend == "hccl":
            assert cli.main(["doctor"]) == 1
            shown = capsys.readouterr().out
            assert re.search(said, shown)
            assert remedy in shown
        monkeypatch.setenv("HCCL_DETERMINISTIC", "strict")
        with (
            bi.enabled(),
            pytest.raises(bi.BackendUnavailable, match=r"LCCL_DETERMINISTIC=\(unset"),
        ):
            X.npu().sum()
        monkeypatch.setenv("LCCL_DETERMINISTIC", "1")
        with bi.enabled():  # started with the right variables
            X.npu().sum()


def test_other_collectives_are_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in installation.HCCL:
        monkeypatch.delenv(name, raising=False)
    with _group("cpu:gloo"), bi.enabled():
        X.npu().sum()


def test_hccl_that_starts_under_us_may_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in installation.HCCL:
        monkeypatch.delenv(name, raising=False)
    with ExitStack() as group:
        with bi.enabled():
            X.npu().sum()
            group.enter_context(_group("hccl"))
        with bi.enabled():
            X.npu().sum()
    unprepared = pytest.raises(bi.BackendUnavailable, match="HCCL has been initialised")
    with _group("hccl"), bi.enabled(), unprepared:
        X.npu().sum()


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


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("aten::mm", "NPU"),
        ("aten::mm", "PrivateUse1"),
        ("aten::linear", "AutogradNPU"),
        ("npu::npu_add_rms_norm", "NPU"),
    ],
)
def test_an_override_that_comes_second_is_an_error(name: str, key: str) -> None:
    """As vllm-ascend's mode makes them when ours is on already: torch lets the later one win."""
    library = torch.library.Library(name.split("::")[0], "IMPL")
    later = pytest.raises(bi.OverrideClash, match=f"{name}: overridden by another library while")
    before = _recorded()
    bi.enable()
    try:
        torch_npu.npu_rms_norm(X.npu(), X[0].npu())
        library.impl(name, lambda *args, **kwargs: None, key)
        with later:
            torch_npu.npu_rms_norm(X.npu(), X[0].npu())  # the next operator of torch_npu
        with later:
            bi.enable()  # and the next look at the mode
        bi.disable()
        if name.startswith("aten"):
            with pytest.raises(bi.OverrideClash, match=f"{name} is already overridden"):
                bi.enable()
    finally:
        bi.disable()
        library._destroy()
    assert _recorded() == before
    with bi.enabled():
        torch_npu.npu_rms_norm(X.npu(), X[0].npu())
    assert _recorded() == before


def _recorded() -> set[str]:
    """What torch has noted of overrides of aten and of torch_npu."""
    return {key for key in torch.library._impls if key.startswith(("aten/", "npu/"))}


def _refused(capsys: pytest.CaptureFixture[str], reason: str, remedy: str) -> None:
    """The same words at `use_backend`, at the first call with the mode on, and in `bi doctor`."""
    from batch_invariant import cli

    with pytest.raises(bi.BackendUnavailable) as error:
        bi.use_backend("ascend")
    with bi.enabled(), pytest.raises(bi.BackendUnavailable) as later:
        X.npu().sum()
    assert cli.main(["doctor"]) == 1
    for text in (str(error.value), str(later.value), capsys.readouterr().out):
        assert reason in text
        assert remedy in text


def test_310p_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(npu, "name", "Ascend310P3")
    _refused(capsys, "Ascend310P3: the 310P has no bfloat16", "use an Atlas A2 or A3")


def test_wrong_pair(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(installation, "torch_npu_version", lambda: "2.10.0.post4")
    reason = "torch_npu 2.10.0.post4 is made for torch 2.10"
    _refused(capsys, reason, "or install torch==2.10.*")


def test_doctor_shows_tiers_and_what_would_be_better(capsys: pytest.CaptureFixture[str]) -> None:
    from batch_invariant import cli

    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "D: composed of elementwise operators" in shown
    assert "better: A needs CANN >= 9.2.0" in shown
    assert "better: B needs the AscendC package batch_invariant_ops" in shown
    assert "better: C needs triton-ascend" in shown
    assert "npu_fused_infer_attention_score: D: composed of elementwise operators" in shown
    assert "npu_fused_infer_attention_score_v2: D" in shown
    assert "dtypes bfloat16, float16, float32, norms of torch_npu with 1 to 8 dimensions" in shown
