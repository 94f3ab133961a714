"""The errors of batch-invariant: one base class, one subclass for each thing a user can mend."""

from __future__ import annotations

from collections.abc import Sequence


class BatchInvariantError(RuntimeError):
    """Base of every error that this library raises on purpose."""


class ConfigurationError(BatchInvariantError):
    """A setting (environment variable, argument) has a value that means nothing."""


class UnknownBackend(BatchInvariantError):
    """No installed package provides the backend that was named."""

    def __init__(self, name: str, installed: Sequence[str]) -> None:
        super().__init__(
            f"unknown backend {name!r}; installed: {', '.join(sorted(installed)) or 'none'}"
        )


class BackendUnavailable(BatchInvariantError):
    """The backend is installed, or is the one that is needed, but it cannot run here."""

    def __init__(self, name: str, reason: str, remedy: str) -> None:
        super().__init__(
            f"backend {name!r} is not available: {reason}" + (f"; {remedy}" if remedy else "")
        )


class InvalidBackend(BatchInvariantError):
    """A plugin does not keep the contract of `batch_invariant.backend.Backend`."""


class OpNotSupported(BatchInvariantError):
    """The selected backend has no batch-invariant kernel for this call."""


class OverrideClash(BatchInvariantError):
    """Another library has already overridden an operator that the mode must override."""


class VarianceFound(BatchInvariantError):
    """A function that was verified is not batch-invariant, or not deterministic."""


class UncoveredOpError(BatchInvariantError):
    """With the mode on, an operator was called that mixes elements and has no invariant kernel."""

    def __init__(self, op: str, call: str, reason: str, remedy: str = "") -> None:
        base = op.removeprefix("aten::").split(".")[0]
        remedy = remedy or (
            "Rewrite the call with covered operators, or accept stock numerics for this operator "
            f"alone with batch_invariant.enable(allow=[{base!r}])"
        )
        super().__init__(f"{op}({call}) has no batch-invariant kernel: {reason}. {remedy}")
