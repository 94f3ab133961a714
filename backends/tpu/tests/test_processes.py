"""Work over processes: in order, each prepared once, and a death is an error with a remedy."""

import os
from functools import partial

import pytest

from batch_invariant.errors import BatchInvariantError
from batch_invariant_tpu.processes import spread
from process_work import doubled, prepare


def test_results_come_in_order_from_prepared_processes() -> None:
    found = list(spread(doubled, range(5), 2, partial(prepare, "yes")))
    assert found == [(2 * number, "yes") for number in range(5)]
    assert "PREPARED" not in os.environ


def test_a_process_that_dies_is_an_error() -> None:
    found = spread(doubled, [1, -1], 1, partial(prepare, "yes"))
    assert next(found) == (2, "yes")  # it was alive, and died of the second task
    with pytest.raises(BatchInvariantError, match="try fewer --jobs"):
        next(found)
