"""Which compiled graph may run: one compiled under the present setting of the mode, or a new one.

Dynamo keeps the graphs of a function in a list and runs the first one whose guards hold and whose
backend equals that of the call. While the mode is on, the backend of every call is a `Setting`:
the user's backend and the rules of the mode. So graphs of different settings live side by side,
turning the mode on and off costs no recompilation of what is there, and nothing stale is run.

Dynamo asks `_callback_from_stance` what to do before it runs any compiled function; that is where
the backend is exchanged. Without it (another torch), compiled functions run eagerly.
"""

from __future__ import annotations

import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import batch_invariant
from batch_invariant.errors import BatchInvariantError, ConfigurationError
from batch_invariant.inductor.rules import Rules


class Setting:
    """The backend of a call, as Dynamo compares it: the user's, and the rules that are held."""

    def __init__(self, backend: Callable[..., Any], rules: Rules) -> None:
        self.backend = backend
        self.rules = rules

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Setting)
            and self.rules.identity == other.rules.identity
            and bool(self.backend == other.backend)
        )

    def __hash__(self) -> int:
        return hash(self.rules.identity)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.backend(*args, **kwargs)


class InvariantCallback:
    """What Dynamo calls for a frame without a graph: the user's own callback, under a `Setting`."""

    def __init__(self, callback: Callable[..., Any], rules: Rules, compiles: bool) -> None:
        backend = callback
        while hasattr(backend, "_torchdynamo_orig_backend"):
            backend = backend._torchdynamo_orig_backend
        self._torchdynamo_orig_backend = Setting(backend, rules)
        self.rules = rules
        self._callback = callback
        self._compiles = compiles

    def __call__(self, frame: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_kernel(frame.f_code, self.rules):
            return _left_alone(skip=True)
        if not self._compiles:
            return _left_alone(skip=False)
        from torch._dynamo.exc import BackendCompilerFailed

        try:
            with self._compiling():
                return self._callback(frame, *args, **kwargs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, BatchInvariantError):
                raise error.inner_exception from None
            raise

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """Dynamo's own options for one compilation."""
        from torch._dynamo import config
        from torch.utils._python_dispatch import _disable_current_modes

        rules = self.rules
        options: dict[str, Any] = {}
        if rules.enforced and hasattr(config, "enable_dynamo_decompositions"):
            # It would write addcdiv_ and its like as FMAs, before any operator is seen.
            options["enable_dynamo_decompositions"] = False
        if rules.watcher is None:
            with config.patch(options):
                yield
            return
        # An audit compiles everything anew, and watches by a mode under which Dynamo would not.
        options |= {"recompile_limit": 1 << 16, "accumulated_recompile_limit": 1 << 16}
        with _disable_current_modes(), config.patch(options):
            yield


def install() -> Callable[[], None]:
    """Exchanges the backend of every call; returns what undoes it."""
    from torch._dynamo import eval_frame

    choose = getattr(eval_frame, "_callback_from_stance", None)
    if choose is None:
        warnings.warn(
            f"batch_invariant does not know how torch {torch.__version__} selects compiled graphs: "
            "while the mode is on, compiled functions run eagerly",
            stacklevel=2,
        )
        return run_eagerly()

    def invariant(callback: Any) -> Any:
        chosen = choose(callback)
        if chosen is None or isinstance(chosen, InvariantCallback):
            return chosen
        if chosen is False:
            # Dynamo would run any graph that fits, of any backend.
            return None if callback in (False, None) else _wrapped(callback, compiles=False)
        return _wrapped(chosen, compiles=True)

    eval_frame._callback_from_stance = invariant

    def undo() -> None:
        eval_frame._callback_from_stance = choose

    return undo


def refuse_inside_compiled_code() -> None:
    """Raises if the caller is run by a compiled function, directly or by what it left out."""
    from torch._dynamo import eval_frame

    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "compile_wrapper" and code.co_filename == eval_frame.__file__:
            raise ConfigurationError(
                "the mode or the backend was to change inside a compiled function, whose graphs "
                "are those of one setting; change it outside of torch.compile"
            )
        frame = frame.f_back  # type: ignore[assignment]


def _wrapped(callback: Any, compiles: bool) -> InvariantCallback:
    from batch_invariant.inductor import rules_held

    rules = rules_held()
    assert rules is not None
    if not compiles:
        return InvariantCallback(callback, rules, compiles)
    # Kept on the callback, so that it lives as long, and a call costs no new one.
    found = getattr(callback, "_batch_invariant", None)
    if found is None or found._callback is not callback or found.rules is not rules:
        found = callback._batch_invariant = InvariantCallback(callback, rules, compiles)
    return found


_CORE = os.path.dirname(os.path.abspath(batch_invariant.__file__)) + os.sep
_OPS = os.path.join(_CORE, "ops") + os.sep


def _is_kernel(code: types.CodeType, rules: Rules) -> bool:
    """Whether a frame is ours or a backend's, below the dispatcher.

    Between two graphs operators run eagerly, and Dynamo sees the Python of their kernels.
    """
    file = code.co_filename
    if file.startswith(_OPS):
        return code.co_name.startswith("_")  # what is public is called by programs
    return file.startswith((_CORE, *(d.code for d in rules.devices.values() if d.code)))


def _left_alone(skip: bool) -> Any:
    """The answer to Dynamo: run this frame eagerly now, and ask again the next time.

    skip: the functions that it calls are not asked for either.
    """
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy
    from torch._dynamo.types import ConvertFrameReturn

    action = _FrameAction.SKIP if skip else _FrameAction.DEFAULT
    return ConvertFrameReturn(
        frame_exec_strategy=_FrameExecStrategy(action, action), apply_to_code=not skip
    )


def run_eagerly() -> Callable[[], None]:
    """Compiled functions run eagerly from now on; returns what undoes it."""
    stance = torch.compiler.set_stance("force_eager")
    return lambda: stance.__exit__(None, None, None)
