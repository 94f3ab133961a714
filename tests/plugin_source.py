"""The source of a plugin that keeps the contract and has no kernels; tests break it on purpose."""

from __future__ import annotations

from collections.abc import Callable

Install = Callable[..., str]
"""The `install` fixture: `install(source, name=...)` returns the module's name."""

PLUGIN = """
    from batch_invariant.backend import API_VERSION, Availability, Backend, Kernel

    class Plugin(Backend):
        name = {name!r}
        device_type = "cpu"
        api_version = API_VERSION

        def probe(self):
            return Availability(True)

        def kernels(self):
            return {{}}
"""
