"""Where in the user's code something happens: from the running stack, or from a traced one.

And the names of Triton kernels, which stand there as well.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Any

import torch

import batch_invariant

_OURS = os.path.dirname(os.path.abspath(batch_invariant.__file__)) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep

_triton = find_spec("triton")
_TRITON = [folder + os.sep for folder in (_triton and _triton.submodule_search_locations) or ()]


def running_line() -> tuple[str, int]:
    """File and line of the innermost running frame that is not of torch, Triton or ourselves."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_OURS, _TORCH, *_TRITON, "<frozen ")):
            return file, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return "", 0


def traced_line(stack: str) -> str:
    """`file:line  code` of the innermost frame of a formatted stack that is not torch's."""
    lines = [line.strip() for line in stack.strip().splitlines()]
    frames = [i for i, line in enumerate(lines) if line.startswith('File "')]
    if not frames:
        return ""
    users = [i for i in frames if not lines[i].startswith(f'File "{_TORCH}')]
    at = (users or frames)[-1]
    file, line = lines[at].split('"')[1], lines[at].split("line ")[1].split(",")[0]
    code = f"  {lines[at + 1]}" if at + 1 < len(lines) else ""
    return f"{file}:{line}{code}"


def kernel_name(kernel: Any) -> str:
    """The name of a `@triton.jit` function, tuned or not."""
    while not hasattr(kernel, "__name__") and hasattr(kernel, "fn"):
        kernel = kernel.fn
    return str(getattr(kernel, "__name__", kernel))
