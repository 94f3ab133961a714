"""The errors of measurements that cannot be made."""

from __future__ import annotations

from batch_invariant.errors import BatchInvariantError


class Unseen(BatchInvariantError):
    """The order of the additions cannot be seen from outside here; the message says why."""


class OutOfReach(Unseen):
    """It cannot be seen whatever the implementation: refused before anything is called."""
