"""On which route the kernels run here: a TPU through TorchTPU or jax, or the interpreter."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from batch_invariant_tpu.requirements import jax_problem

INTERPRETER = (
    "route: Pallas interpreter on the CPU, for checks alone; it shows wiring and order, never the "
    "bits of a TPU"
)
TPU_JAX = "route: jax on a TPU; torch tensors come and go as CPU tensors (dlpack)"
TORCHTPU = "route: TorchTPU; tensors on the device 'tpu' stay there"


def torchtpu_live() -> bool:
    """Whether TorchTPU has named torch's out-of-tree device `tpu` and has one to compute on."""
    return torch._C._get_privateuse1_backend_name() == "tpu" and torch.accelerator.is_available()


def torchax_problem() -> str | None:
    """Why a process that uses torchax is refused; None if none is in use."""
    if "torchax" not in sys.modules:
        return None
    return (
        "torchax is loaded in this process. It names torch's out-of-tree device 'jax', and its "
        "operators are looked up before torch's dispatcher, where this backend overrides them: "
        "linear would slip past. (Its release 0.0.13 cannot even be imported beside torch 2.13.) "
        "Call batch_invariant_tpu.jax from a torchax op (torchax.interop.torch_view) instead"
    )


def tpu_present() -> bool:
    """Whether jax computes on a TPU, or, before it is imported, whether one seems to be there."""
    if "jax" in sys.modules and jax_problem() is None:
        return bool(sys.modules["jax"].default_backend() == "tpu")
    devices = (*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*"))
    return bool(devices) and find_spec("libtpu") is not None


def describe() -> str:
    """The live route, in one line."""
    if torchtpu_live():
        return TORCHTPU
    return TPU_JAX if tpu_present() else INTERPRETER
