"""Loads the compiled CPU library that fits this machine and connects it to torch's threads."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent / "native"
_V3, _V4 = 1, 2  # bits of bi_cpu_features(), see native/cpu_features.h

# Codes of native/types.h.
DTYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
STATUS = {
    1: "unsupported dtype",
    2: "invalid argument",
    3: "out of memory",
}
BF16_ORDERS = {0: "amx", 1: "vdpbf16ps", 2: "serial"}


def _suffix() -> str:
    return ".dylib" if sys.platform == "darwin" else ".so"


def _path(level: str) -> Path:
    return _FOLDER / f"libbi_{level}{_suffix()}"


def _open(level: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(_path(level)))
    library.bi_cpu_features.restype = ctypes.c_uint32
    return library


@cache
def _probe() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason why there is none."""
    machine = platform.machine()
    level = {"x86_64": "x86_64_v3", "aarch64": "aarch64", "arm64": "aarch64"}.get(machine)
    if level is None or sys.platform not in ("linux", "darwin"):
        return None, (
            f"there are no native kernels for {sys.platform}/{machine}; "
            "supported: Linux and macOS on x86-64 (with AVX2 and FMA) and on arm64"
        )
    if not _path(level).exists():
        return None, (
            f"the native library {_path(level)} is missing; "
            "install the package again, or run `python hatch_build.py` in a source tree"
        )
    try:
        library = _open(level)
        features = int(library.bi_cpu_features())
        if level == "x86_64_v3":
            if not features & _V3:
                return None, "this CPU has no AVX2, FMA and F16C, which the native kernels need"
            if features & _V4 and _path("x86_64_v4").exists():
                library = _open("x86_64_v4")
    except OSError as error:
        return None, f"the native library does not load: {error}"
    return library, ""


def availability() -> str | None:
    """None if the native kernels can run here, else the reason and what to do about it."""
    library, reason = _probe()
    return None if library is not None else reason


def _gomp_parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch itself uses, so that our
    threads are torch's threads; None if this torch has another runtime: then one thread is used."""
    import torch

    name = "libtorch_cpu" + _suffix()
    handle = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", name))
    try:
        return ctypes.cast(handle.GOMP_parallel, ctypes.c_void_p).value
    except AttributeError:
        return None


@cache
def library() -> ctypes.CDLL:
    """The loaded library, ready to call; raises RuntimeError with the reason if there is none."""
    found, reason = _probe()
    if found is None:
        raise RuntimeError(reason)
    found.bi_init.argtypes, found.bi_init.restype = [ctypes.c_void_p], None
    found.bi_init(_gomp_parallel())
    # The pool's threads do not survive a fork: a child computes on its own thread, the same bits.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: found.bi_init(None))
    return found
