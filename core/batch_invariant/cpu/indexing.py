"""index_put with accumulation on CPU: torch's kernel on one thread.

On several threads torch adds what meets in one place by atomics, in the order of timing; on one
thread in the order of the index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batch_invariant.stock import stock


def overrides() -> dict[str, Callable[..., Any]]:
    """The aten overloads that change, by name; each callable takes the keyset first."""
    kernel = stock("_index_put_impl_")

    def index_put(
        _keyset: Any,
        self: torch.Tensor,
        indices: Any,
        values: torch.Tensor,
        accumulate: bool = False,
        unsafe: bool = False,
    ) -> torch.Tensor:
        threads = torch.get_num_threads()
        if not accumulate or threads == 1:
            kernel(self, indices, values, accumulate, unsafe)
            return self
        torch.set_num_threads(1)
        try:
            kernel(self, indices, values, accumulate, unsafe)
        finally:
            torch.set_num_threads(threads)
        return self

    return {"_index_put_impl_": index_put}
