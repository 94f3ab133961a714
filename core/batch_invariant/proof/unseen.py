"""The error of measurements that cannot be made."""

from __future__ import annotations

from batch_invariant.errors import BatchInvariantError


class Unseen(BatchInvariantError):
    """The order of the additions cannot be seen from outside here; the message says why."""
