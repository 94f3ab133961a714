"""The only reader of the process environment.

`VLLM_BATCH_INVARIANT`: 1 or true turns the mode on when torch is imported; 0, false, empty or unset
leaves torch alone. `BATCH_INVARIANT_BACKEND`: the name of the backend to select.
"""

from __future__ import annotations

import os

from batch_invariant.errors import ConfigurationError

MODE = "VLLM_BATCH_INVARIANT"
BACKEND = "BATCH_INVARIANT_BACKEND"

_SWITCH = {"": False, "0": False, "false": False, "1": True, "true": True}


def mode_off() -> bool:
    """Whether `VLLM_BATCH_INVARIANT` leaves torch alone; an unknown value does not."""
    return not _SWITCH.get(os.environ.get(MODE, "").strip().lower(), True)


def mode_requested() -> bool:
    """Whether `VLLM_BATCH_INVARIANT` asks for the mode; `ConfigurationError` if it is neither."""
    value = os.environ.get(MODE, "")
    try:
        return _SWITCH[value.strip().lower()]
    except KeyError:
        raise ConfigurationError(
            f"{MODE}={value!r} means nothing: set it to 1 or true (on), 0 or false (off)"
        ) from None


def backend_requested() -> str | None:
    """The backend named by `BATCH_INVARIANT_BACKEND`, or None."""
    return os.environ.get(BACKEND, "").strip() or None
