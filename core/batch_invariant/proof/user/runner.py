"""Calls of a user's function that differ in nothing but their batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy
import torch

from batch_invariant.errors import ConfigurationError
from batch_invariant.ops.bits import mismatch
from batch_invariant.proof.user.record import Recorder
from batch_invariant.proof.user.rows import Batch, leaves, plain, readable

Outputs = dict[str, torch.Tensor]


class Runner:
    """Calls the function, every time from the same random state and the same buffers."""

    def __init__(self, fn: Callable[..., Any], seed: int, no_grad: bool) -> None:
        self._fn, self._seed, self._no_grad = fn, seed, no_grad
        self.calls = 0
        self.ignored: dict[str, str] = {}
        """what the function returns that cannot be compared, and why"""
        owner = fn if isinstance(fn, torch.nn.Module) else getattr(fn, "__self__", None)
        buffers = owner.buffers() if isinstance(owner, torch.nn.Module) else ()
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in buffers]

    def __call__(self, batch: Batch, shift: int = 0) -> Outputs:
        """The tensors that the function returns, by their path; `shift` changes the seed."""
        outputs: Outputs = self._call(batch, nullcontext(), shift, self._outputs)
        return outputs

    def recorded(self, batch: Batch, recorder: Recorder) -> Any:
        """What the function returns; the recorder is entered for the call alone."""
        return self._call(batch, recorder, 0, lambda result: result)

    def why_not_deterministic(self, batch: Batch, base: Outputs) -> str:
        """Why a call may differ from `base`, a call with the same batch; nothing if it does not."""
        if _same(base, self(batch, shift=1)):
            return ""
        if _same(base, self(batch)):
            return (
                "its result depends on the random seed: it draws random numbers, such as dropout "
                "in training mode"
            )
        return "two calls with the same batch and the same random seed gave different bits"

    def _call(
        self,
        batch: Batch,
        around: AbstractContextManager[Any],
        shift: int,
        read: Callable[[Any], Any],
    ) -> Any:
        self.calls += 1
        _seed(self._seed + shift)
        # New tensors for each call: the function may write to its arguments.
        batch = batch.take(range(batch.size))
        others = [(path, value, _version(value)) for path, value in batch.others()]
        try:
            with torch.no_grad() if self._no_grad else nullcontext(), around:
                result = batch.call(self._fn)
            found = read(result)
        finally:
            with torch.no_grad():
                # Not by version counters: batch_norm writes its statistics without counting.
                for buffer, original in self._buffers:
                    if not torch.equal(buffer, original):
                        buffer.copy_(original)
        for path, value, version in others:
            if _version(value) != version:
                raise ConfigurationError(
                    f"the function writes to the argument {path}, which holds no rows, so its "
                    "calls cannot be compared; copy it inside the function"
                )
        return found

    def _outputs(self, result: Any) -> Outputs:
        found: Outputs = {}
        for path, value in leaves(result):
            if not isinstance(value, torch.Tensor):
                if value is not None:
                    self.ignored[path] = f"an object of type {type(value).__name__}"
            elif not plain(value):
                self.ignored[path] = f"a tensor of layout {value.layout}"
            else:
                # A function may write its next result to the same memory.
                found[path] = readable(value).clone()
        return found


def _version(value: torch.Tensor) -> int | None:
    return None if value.is_inference() else value._version


def _same(one: Outputs, other: Outputs) -> bool:
    return one.keys() == other.keys() and all(
        value.shape == other[path].shape
        and value.dtype == other[path].dtype
        and mismatch(value, other[path]) is None
        for path, value in one.items()
    )


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restores the random states of torch on every device, of Python and of numpy."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = accelerator.type if accelerator is not None else "cuda"
    devices = range(torch.accelerator.device_count()) if accelerator is not None else ()
    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
