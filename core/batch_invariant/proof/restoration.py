"""That using a backend, and turning the mode on and off with it, leaves nothing changed behind."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from batch_invariant import env
from batch_invariant.proof.log import Log

_ABSENT = object()
_ANSWER = "batch_invariant found: "  # a plugin may print as well
_TIMEOUT = 600  # seconds

_ENVIRONMENT = dict(os.environ)
"""As it was before any plugin was loaded: what one leaves behind in this process must not pass for
what the next one starts with."""


def restoration(name: str, log: Log) -> None:
    """A process that loads, selects, uses and deselects the backend is as it was before.

    In a process of its own, so that what a plugin does while it is imported is seen too.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-m", __name__, name],
        env={**_ENVIRONMENT, "PYTHONPATH": paths, env.MODE: "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=_TIMEOUT,
    )
    log.looked_at += 1
    answers = [line for line in done.stdout.splitlines() if line.startswith(_ANSWER)]
    if done.returncode or not answers:
        log.broken(f"using the backend in a new process failed: {done.stderr.strip()[-400:]}")
        return
    for changed in json.loads(answers[0].removeprefix(_ANSWER)):
        log.broken(changed)


def _main(name: str) -> None:
    from batch_invariant import mode, registry, selector
    from batch_invariant.errors import BatchInvariantError

    before = dict(state())
    backend = registry.load(name)
    with selector.use_backend(name):
        selector.kernels(backend.device_type)
        # A backend without a kernel for this call raises; the check "kernel" is there for that.
        with mode.enabled(), contextlib.suppress(BatchInvariantError):
            one = backend.to_native(torch.ones(2, 3))
            if isinstance(one, torch.Tensor):
                one.sum(-1)
    found = [
        f"{change} after the backend was loaded, used and deselected"
        for change in changes(before, dict(state()))
    ]
    sys.stdout.write(f"\n{_ANSWER}{json.dumps(found)}\n")


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two states, in words."""
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key, _ABSENT), after.get(key, _ABSENT)
        if not (old is new or (isinstance(old, (str, int, bool)) and old == new)):
            yield f"{key} was {_text(old)} and is {_text(new)}"


def _text(value: Any) -> str:
    return "absent" if value is _ABSENT else repr(value)[:80]


def state() -> Iterator[tuple[str, Any]]:
    """What a backend may touch: environment, torch's switches, its functions, overrides."""
    for name, value in os.environ.items():
        yield f"os.environ[{name!r}]", value
    for name, read in _SWITCHES.items():
        yield name, read()
    for place, owner in _OWNERS.items():
        for name, value in vars(owner).items():
            if callable(value) and not name.startswith("__"):
                yield f"{place}.{name}", value
    for name in sorted(torch.library._impls):
        if not name.startswith("triton/"):  # torch's own, from its first use of sparse matrices
            yield f"dispatcher override {name}", True


def _matmul_switch(name: str) -> str:
    return str(getattr(torch.backends.cuda.matmul, name))


_SWITCHES: dict[str, Callable[[], Any]] = {
    "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled,
    "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision,
    "torch.get_num_threads()": torch.get_num_threads,
    "torch.get_default_dtype()": lambda: str(torch.get_default_dtype()),
    "torch.is_grad_enabled()": torch.is_grad_enabled,
    "torch.backends.cudnn.deterministic": lambda: torch.backends.cudnn.deterministic,
    "torch.backends.cudnn.benchmark": lambda: torch.backends.cudnn.benchmark,
    "torch.backends.cudnn.allow_tf32": lambda: torch.backends.cudnn.allow_tf32,
    **{
        f"torch.backends.cuda.matmul.{name}": functools.partial(_matmul_switch, name)
        for name in ("allow_bf16_reduced_precision_reduction", "allow_tf32")
    },
    **{
        f"torch.backends.cuda.{name}()": getattr(torch.backends.cuda, name)
        for name in (
            *("flash_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled"),
            "cudnn_sdp_enabled",
        )
    },
    "torch.is_deterministic_algorithms_warn_only_enabled()": (
        torch.is_deterministic_algorithms_warn_only_enabled
    ),
    "torch.utils.deterministic.fill_uninitialized_memory": (
        lambda: getattr(torch.utils.deterministic, "fill_uninitialized_memory", None)
    ),
}
_OWNERS = {
    "torch": torch,
    "torch.Tensor": torch.Tensor,
    "torch.nn.functional": torch.nn.functional,
    "torch.nn.Module": torch.nn.Module,
    "torch.linalg": torch.linalg,
    "torch.special": torch.special,
}

if __name__ == "__main__":
    _main(sys.argv[1])
