"""Which jax is needed and whether it is there, answered without importing it."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from importlib.util import find_spec

from batch_invariant.errors import BackendUnavailable

OLDEST_JAX = (0, 8, 1)
"""The first with `shape_invariant_numerics` of Mosaic on; an older one splits sums by shape."""

INSTALL_JAX = "pip install 'batch-invariant-tpu[runtime]'"
INSTALL_LIBTPU = "pip install 'batch-invariant-tpu[compile]' (Linux on x86-64, 0.5 to 0.7 GB)"


def jax_problem() -> tuple[str, str] | None:
    """Why jax cannot be used, and what to do; None if it can."""
    version = _version("jax")
    if version is None or find_spec("jax") is None:
        return "jax is not installed", INSTALL_JAX + _cap()
    if find_spec("jaxlib") is None:
        return f"jax {version} is installed without jaxlib", INSTALL_JAX + _cap()
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if found < OLDEST_JAX:
        needed = ".".join(map(str, OLDEST_JAX))
        return (
            f"jax {version} is installed; the kernels need {needed} or newer, the first whose TPU "
            "compiler adds in an order that does not follow the shape (shape_invariant_numerics)",
            f"pip install 'jax>={needed}'" + _cap(),
        )
    return None


def require_jax() -> None:
    """Raises `BackendUnavailable` with the remedy unless jax can be used."""
    if (problem := jax_problem()) is not None:
        raise BackendUnavailable("tpu", *problem)


def libtpu_problem() -> tuple[str, str] | None:
    """Why the TPU compiler cannot be used, and what to do; None if it can."""
    if (problem := jax_problem()) is not None:
        return problem
    if not sys.platform.startswith("linux"):
        return f"the TPU compiler (libtpu) exists for Linux only; this is {sys.platform}", (
            "run the compile check on Linux; no TPU is needed"
        )
    if find_spec("libtpu") is None:
        return "the TPU compiler (libtpu) is not installed", INSTALL_LIBTPU
    return None


def _cap() -> str:
    """What Python 3.11 users must know when they look for a newer jax."""
    if sys.version_info >= (3, 12):
        return ""
    return "; jax 0.10.2 is the newest for Python 3.11 and will do, a newer one needs Python 3.12"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
