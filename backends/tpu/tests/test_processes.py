"""Work over processes: in order, each prepared once, and a death is an error with a remedy."""

import os
from functools import partial

import pytest

from batch_invariant.errors import BatchInvariantError
from batch_invariant_tpu.processes import spread


def _prepare(value: str) -> None:
    os.environ["PREPARED"] = value


def _doubled(number: int) -> tuple[int, str]:
    if number < 0:
        os._exit(9)
    return 2 * number, os.environ["PREPARED"]


def test_results_come_in_order_from_prepared_processes() -> None:
    found = list(spread(_doubled, range(5), 2, partial(_prepare, "yes")))
    assert found == [(2 * number, "yes") for number in range(5)]
    assert "PREPARED" not in os.environ


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(BatchInvariantError, match="try fewer --jobs"):
        list(spread(_doubled, [1, -1], 1, partial(_prepare, "yes")))
