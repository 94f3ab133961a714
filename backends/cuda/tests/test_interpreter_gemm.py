"""The matrix products in Triton's interpreter: wiring, not numerics, of "tile" and "tma" alone."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def found():
    """In a process of its own: Triton decides when it is imported whether to interpret."""
    script = Path(__file__).with_name("interpreter_gemm.py")
    path = os.pathsep.join([str(script.parents[1]), *filter(None, sys.path)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_tile_and_tma_schedules_compute_the_product(found):
    assert len(found["errors"]) == 18
    wrong = {case: error for case, error in found["errors"].items() if not error <= 1}
    assert not wrong


def test_chunks_are_added_in_ascending_order(found):
    for schedule, (ascending, would_show) in found["orders"].items():
        assert would_show, schedule
        assert ascending, schedule


def test_groups_are_found_on_the_device(found):
    assert len(found["groups"]) == 5
    assert not {ends: wrong for ends, wrong in found["groups"].items() if wrong != [0, 0]}


def test_chunks_of_groups_are_added_in_ascending_order(found):
    wrong, other_order = found["group order"]
    assert wrong == 0
    assert other_order > 100


def test_chunks_that_stand_apart_are_added_in_ascending_order(found):
    assert len(found["folds"]) == 5
    for case, (wrong, other_order) in found["folds"].items():
        assert wrong == 0, case
        assert other_order > 100, case
