"""Plugins: found, checked, and named with both sides when they are wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import batch_invariant as bi
from batch_invariant import registry
from batch_invariant.backend import Kernel
from batch_invariant.order import serial
from plugin_source import PLUGIN, Install


def test_the_reference_backend_is_found() -> None:
    assert "cpu" in registry.installed()
    assert bi.backends()["cpu"].ok


def test_an_installed_plugin_is_found_and_loaded(install: Install) -> None:
    install(PLUGIN.format(name="mine"), name="mine")
    assert registry.load("mine").name == "mine"
    assert bi.backends()["mine"].ok


def test_an_unknown_name_lists_what_is_installed() -> None:
    with pytest.raises(bi.UnknownBackend, match=r"unknown backend 'asend'; installed: "):
        bi.use_backend("asend")


def test_two_packages_with_one_name_are_an_error_that_names_both(install: Install) -> None:
    install(PLUGIN.format(name="mine"), name="mine", dist="first")
    install(PLUGIN.format(name="mine"), name="mine", dist="second")
    with pytest.raises(bi.BatchInvariantError, match=r"(first|second) 1.0 .* (first|second) 1.0"):
        registry.installed()
    with bi.enabled(), pytest.raises(bi.BatchInvariantError, match="two packages provide"):
        torch.ones(3).sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("api_version = API_VERSION", "api_version = 0"), "api_version 0, and this .* has 1"),
        (("name = 'mine'", "name = 'other'"), "calls itself 'other'"),
        (
            ("def probe(self)", "def probe(self, now)"),
            r"probe\(self, now\); expected probe\(self\)",
        ),
        (("def kernels(self)", "def kernel(self)"), "does not define kernels"),
        (('device_type = "cpu"', "device_type = None"), "does not say its device_type"),
        (("class Plugin(Backend)", "class Plugin"), "is not a class derived from"),
    ],
)
def test_a_plugin_that_breaks_the_contract_is_refused(
    install: Install, change: tuple[str, str], message: str
) -> None:
    source = PLUGIN.format(name="mine")
    assert change[0] in source
    install(source.replace(*change), name="mine", dist="theirs")
    with pytest.raises(bi.InvalidBackend, match=f"'mine' of theirs 1.0 .*{message}"):
        bi.use_backend("mine")


def test_an_instance_as_entry_point_is_refused(install: Install) -> None:
    install(
        PLUGIN.format(name="mine") + "\n    plugin = Plugin()\n", name="mine", attribute="plugin"
    )
    with pytest.raises(bi.InvalidBackend, match="must name the class"):
        bi.use_backend("mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": "serial"}, r"Order of batch_invariant\.order, .*; got 'serial'"),
        ({"guarantee": "batch"}, "the guarantee of a kernel is a Guarantee; got 'batch'"),
    ],
)
def test_a_kernel_is_declared_in_types(change: dict[str, Any], message: str) -> None:
    sound = {
        "fn": torch.mm,
        "guarantee": bi.Guarantee.BATCH,
        "dtypes": frozenset((torch.float32,)),
        "order": serial(),
    }
    assert Kernel(**sound).order_of(torch.float32) == serial()
    with pytest.raises(TypeError, match=message):
        Kernel(**(sound | change))


def test_a_plugin_whose_constructor_fails_is_named(install: Install) -> None:
    source = PLUGIN.format(name="mine") + "\n        def __init__(self): raise OSError('no driver')"
    install(source, name="mine", dist="theirs")
    message = r"'mine' of theirs 1.0 cannot be constructed: OSError: no driver; .* probe\(\)"
    with pytest.raises(bi.InvalidBackend, match=message):
        bi.use_backend("mine")


def test_a_plugin_that_does_not_import_breaks_itself_only(install: Install) -> None:
    install("import no_such_sdk", name="mine", dist="theirs")
    message = "'mine' of theirs 1.0 does not import: ModuleNotFoundError.*no_such_sdk"
    with pytest.raises(bi.InvalidBackend, match=message):
        bi.use_backend("mine")
    assert "no_such_sdk" in bi.backends()["mine"].reason
    assert bi.current_backend("cpu").name == "cpu"
