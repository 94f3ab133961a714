"""Batch-invariant operators for PyTorch: a row's result has the same bits whatever is beside it.

    import batch_invariant as bi

    with bi.enabled():            # torch's own operators, made batch-invariant
        logits = model(tokens)

    y = bi.linear(x, weight)      # or one operator at a time

Everything is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from batch_invariant import env

__version__ = "0.1.0"

_HOME = {
    "errors": (
        "BackendUnavailable",
        "BatchInvariantError",
        "ConfigurationError",
        "InvalidBackend",
        "OpNotSupported",
        "OverrideClash",
        "UncoveredOpError",
        "UnknownBackend",
        "VarianceFound",
    ),
    "guarantee": ("Guarantee",),
    "auditing.audit": ("audit",),
    "proof.user.function": ("verify",),
    "mode": ("disable", "enable", "enabled", "is_enabled"),
    "selector": ("backends", "current_backend", "use_backend"),
    "ops.matmul": ("addmm", "baddbmm", "bmm", "linear", "matmul", "mm"),
    "ops.grouped": ("grouped_mm",),
    "ops.softmax": ("log_softmax", "softmax"),
    "ops.reduce": ("logsumexp", "mean", "norm", "prod", "std", "sum", "var"),
    "ops.scan": ("cumsum",),
    "ops.norm": ("group_norm", "layer_norm", "rms_norm"),
    "ops.attention": ("scaled_dot_product_attention",),
    "ops.varlen_attention": ("attention",),
    "ops.embedding": ("embedding",),
    "ops.select": ("argmax", "topk"),
    "ops.sample": ("sample",),
    "integrations.generation": ("SeededSampling",),
    "ops.elementwise": (
        "cos",
        "erf",
        "exp",
        "gelu",
        "log",
        "pow",
        "rsqrt",
        "sigmoid",
        "silu",
        "sin",
        "tanh",
    ),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *_MODULE]

if TYPE_CHECKING:
    from batch_invariant.errors import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Calling an operator needs the selector, which registers what runs it.
    importlib.import_module(f"{__name__}.selector")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _autoload() -> None:
    """Entry point of torch's backend autoloading: turns the mode on if the environment asks."""
    if not env.mode_off():
        from batch_invariant.mode import enable_from_environment

        enable_from_environment()


if not env.mode_off():
    # Importing torch turns the mode on, which imports this package: so torch comes first, whole.
    importlib.import_module("torch")
