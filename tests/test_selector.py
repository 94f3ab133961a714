"""Which backend runs: precedence, errors, and that every selection is undone."""

from __future__ import annotations

import pytest
import torch

import batch_invariant as bi
from plugin_source import PLUGIN, Install


def test_automatic_choice() -> None:
    assert bi.current_backend("cpu").name == "cpu"
    assert bi.current_backend(torch.device("cpu")).name == "cpu"


def test_use_backend_acts_at_once_and_is_a_context(install: Install, broken_mm: str) -> None:
    with bi.use_backend(broken_mm):
        assert bi.current_backend().name == broken_mm
        with bi.use_backend("cpu"):
            assert bi.current_backend().name == "cpu"
        assert bi.current_backend().name == broken_mm
    assert bi.current_backend().name == "cpu"
    bi.use_backend(broken_mm)
    assert bi.current_backend().name == broken_mm
    bi.use_backend(None)
    assert bi.current_backend().name == "cpu"


def test_the_kernels_follow_the_selection(broken_mm: str) -> None:
    x, w = torch.randn(64, 1024), torch.randn(1024, 64)
    ours = bi.mm(x, w)
    with bi.use_backend(broken_mm):
        theirs = bi.mm(x, w)
    assert not torch.equal(ours, theirs)
    assert torch.equal(ours, bi.mm(x, w))


def test_a_context_restores_after_an_exception(broken_mm: str) -> None:
    with pytest.raises(KeyError), bi.use_backend(broken_mm):
        raise KeyError
    assert bi.current_backend().name == "cpu"


def test_the_environment_names_a_backend(broken_mm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH_INVARIANT_BACKEND", broken_mm)
    bi.use_backend(None)
    assert bi.current_backend().name == broken_mm
    with bi.use_backend("cpu"):
        assert bi.current_backend().name == "cpu"


def test_named_but_unavailable_is_an_error_with_the_remedy(install: Install) -> None:
    source = PLUGIN.format(name="mine").replace(
        "Availability(True)", "Availability(False, 'no chip found', 'plug one in')"
    )
    install(source, name="mine")
    with pytest.raises(bi.BackendUnavailable, match=r"'mine' is not .* no chip found; plug one in"):
        bi.use_backend("mine")
    assert bi.current_backend().name == "cpu"


def test_tensors_of_another_device_are_an_error_not_a_fallback(install: Install) -> None:
    install(PLUGIN.format(name="mine").replace('"cpu"', '"xpu"'), name="mine")
    with (
        bi.use_backend("mine"),
        pytest.raises(
            bi.OpNotSupported, match="'mine' serves 'xpu' tensors, and this one is on 'cpu'"
        ),
    ):
        bi.sum(torch.ones(3))
    assert bi.sum(torch.ones(3)) == 3


def test_a_device_without_backend_is_an_error() -> None:
    with pytest.raises(bi.BackendUnavailable, match="no installed backend can run on 'xpu'"):
        bi.current_backend("xpu")


def test_an_operator_without_kernel_is_an_error(install: Install) -> None:
    install(PLUGIN.format(name="mine"), name="mine")
    with bi.use_backend("mine"), pytest.raises(bi.OpNotSupported, match="no kernel for 'sum'"):
        bi.sum(torch.ones(3))


def test_kernels_without_contract_are_an_error(install: Install) -> None:
    source = PLUGIN.format(name="mine").replace("return {}", 'return {"frobnicate": None}')
    install(source, name="mine")
    with bi.use_backend("mine"), pytest.raises(bi.BatchInvariantError, match="frobnicate"):
        bi.sum(torch.ones(3))


def test_activate_and_deactivate_are_paired(install: Install) -> None:
    module = install(
        PLUGIN.format(name="mine")
        + """
        switches = []

        def activate(self):
            self.switches.append("on")

        def deactivate(self):
            self.switches.append("off")
    """,
        name="mine",
    )
    with bi.use_backend("mine"):
        backend = bi.current_backend()
    assert type(backend).__module__ == module
    assert backend.switches == ["on", "off"]  # type: ignore[attr-defined]


def test_selection_follows_into_the_mode(broken_mm: str) -> None:
    x, w = torch.randn(64, 1024), torch.randn(1024, 64)
    with bi.enabled():
        ours = x @ w
        with bi.use_backend(broken_mm):
            theirs = x @ w
        assert torch.equal(ours, x @ w)
    assert not torch.equal(ours, theirs)
