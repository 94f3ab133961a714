"""The checks' work spread over processes that start afresh, since jax and libtpu load once each."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from batch_invariant.errors import BatchInvariantError

Task = TypeVar("Task")
Found = TypeVar("Found")

JOBS = os.cpu_count() or 1


def spread(
    work: Callable[[Task], Found], tasks: Sequence[Task], jobs: int, start: Callable[[], None]
) -> Iterator[Found]:
    """`work(task)` for every task, in order, in so many processes, each after one `start()`.

    `BatchInvariantError` if a process dies, which mostly means that memory ran out.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(jobs, len(tasks))), context, start) as pool:
        try:
            yield from pool.map(work, tasks)
        except BrokenProcessPool as error:
            raise BatchInvariantError(
                f"a process of the check died, probably out of memory: {error}; try fewer --jobs"
            ) from error
