"""The vendor's switches: set while the backend is selected, and put back exactly as they were."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch

from batch_invariant.errors import BackendUnavailable, OpNotSupported
from batch_invariant_ascend import installation

ENVIRONMENT = {
    **installation.HCCL,
    "ATB_MATMUL_SHUFFLE_K_ENABLE": "0",
    "ATB_LLM_LCOC_ENABLE": "0",
    "CLOSE_MATMUL_K_SHIFT": "1",
    "VLLM_ASCEND_ENABLE_NZ": "0",
    "VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE": "0",
}
"""Read by HCCL, ATB and vllm-ascend: collectives in one order, no fused or reformatted products."""

BATCH_CONSISTENCY = 3
_INTERNAL_FORMAT = "ALLOW_INTERNAL_FORMAT"
_HF32 = "ALLOW_MATMUL_HF32"


def torch_npu() -> Any:
    """The imported torch_npu; BackendUnavailable where importing it fails."""
    try:
        import torch_npu as module
    except (ImportError, RuntimeError, OSError) as error:
        raise BackendUnavailable(
            "ascend",
            f"torch_npu does not import: {error}",
            "source CANN's set_env.sh before Python starts",
        ) from error
    return module


@cache
def why_no_level_3() -> str | None:
    """Why batch consistency cannot be switched on here; None if it can. Tried, then undone."""
    try:
        _set_determinism(BATCH_CONSISTENCY)()
    except (RuntimeError, AttributeError, ValueError) as error:
        return str(error).split(". ")[0].splitlines()[0]
    return None


def check_level_3() -> None:
    """Raises if batch consistency, on which a kernel relies, has been switched off behind us."""
    if not torch.are_deterministic_algorithms_enabled():
        raise OpNotSupported(
            "batch consistency (deterministic level 3) is off: it ended when "
            "torch.use_deterministic_algorithms(False) was called; leave that setting alone, or "
            "select the backend again with use_backend('ascend')"
        )


class Switches:
    """What `set` has changed, to be undone by `restore`."""

    def __init__(self) -> None:
        self._undo = ExitStack()

    def set(self) -> None:
        """Sets every switch; on an error what was set is undone."""
        found = installation.availability()
        if not found.ok:
            raise BackendUnavailable("ascend", found.reason, found.remedy)
        level = 1 if why_no_level_3() is not None else BATCH_CONSISTENCY
        with ExitStack() as stack:
            stack.callback(_set_environment(ENVIRONMENT))
            stack.callback(_set_option(_INTERNAL_FORMAT, "disable"))
            stack.callback(_set_option(_HF32, "disable"))
            stack.callback(_set_determinism(level))
            stack.callback(installation.remember_hccl)
            self._undo = stack.pop_all()

    def restore(self) -> None:
        """Undoes `set`; does nothing when nothing is set."""
        self._undo.close()


Undo = Callable[[], None]


def _set_environment(values: Mapping[str, str]) -> Undo:
    """Sets environment variables; undone, those that were absent are absent again."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)

    def undo() -> None:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    return undo


def _set_option(name: str, value: str) -> Undo:
    """Sets an option of torch_npu. One that was never set is put back to `disable`, its default."""
    core = torch_npu()._C
    before = core._npu_getOption(name)
    core._npu_setOption({name: value})
    return lambda: core._npu_setOption({name: before.decode() if before else "disable"})


def _set_determinism(level: int) -> Undo:
    """Sets a deterministic level; undone, the level and torch's two flags are as before.

    A user's strict setting stays strict. Where torch's flag is off, it is set with `warn_only`:
    operators that torch calls nondeterministic are covered or refused by the mode anyway.
    """
    npu = torch_npu().npu
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    before = npu._get_deterministic_level()

    def undo() -> None:
        # The level first: setting it to 0 also turns torch's flag off.
        _quietly(npu.set_deterministic_level, before)
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)

    if not enabled:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        _quietly(npu.set_deterministic_level, max(level, before))
    except BaseException:
        undo()
        raise
    return undo


@contextmanager
def held_level_3() -> Iterator[None]:
    """Batch consistency inside, where it can be had at all."""
    with ExitStack() as stack:
        if why_no_level_3() is None:
            stack.callback(_set_determinism(BATCH_CONSISTENCY))
        yield


def _quietly(set_level: Callable[[int], None], level: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        set_level(level)
