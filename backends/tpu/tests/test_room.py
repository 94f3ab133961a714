"""Compiled programs do not fill a process that checks kernels."""

import pytest
import torch

from batch_invariant import registry
from batch_invariant_tpu import room


def grown(shapes: range) -> int:
    """How many memory mappings one kernel at these numbers of rows adds."""
    backend = registry.load("tpu")
    softmax = backend.kernels()["softmax"].fn
    before = room.mappings()
    for rows in shapes:
        softmax(backend.to_native(torch.ones(rows, 5)), -1, None)
    return room.mappings() - before


@pytest.mark.skipif(not room.MAPS.exists(), reason="/proc/self/maps is Linux's")
def test_programs_are_dropped_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    grown(range(1, 2))  # what is loaded once
    kept = grown(range(2, 32))
    monkeypatch.setattr(room, "EVERY", 20)
    assert grown(range(32, 92)) > kept  # few enough
    monkeypatch.setattr(room, "MOST", room.mappings())
    assert grown(range(92, 152)) < kept
