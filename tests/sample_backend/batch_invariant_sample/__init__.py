"""A complete backend to copy from: a few operators for CPU tensors, in plain torch.

Only the entry point in pyproject.toml connects it with batch-invariant, which is not changed for
it. It is written to be read, and slow.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from batch_invariant.backend import API_VERSION, Availability, Backend, Gap, Kernel
from batch_invariant.ops import CONTRACTS

SWITCH = "BATCH_INVARIANT_SAMPLE"
"""Set while the backend is selected. A vendor's would be a determinism level."""

_WHY = {
    "scaled_dot_product_attention": "not written yet: a chain over the keys would come first",
    "addmm": "not written yet: models call linear",
    "topk": "torch.topk breaks ties as it likes, and a stable sort is not written yet",
}


class SampleBackend(Backend):
    """Kernels for CPU tensors in fp32 and bf16: eight operators and the derivative of softmax."""

    name = "sample"
    device_type = "cpu"
    api_version = API_VERSION

    def __init__(self) -> None:
        self._switch_before: str | None = None

    def probe(self) -> Availability:
        # A vendor asks here whether its SDK is installed (importlib.util.find_spec) and its device
        # is there, and answers with what to do: Availability(False, "no device", "plug one in").
        return Availability(True)

    def kernels(self) -> Mapping[str, Kernel]:
        # Imported only now: a kernel module may need the SDK, which probe has found by this time.
        from batch_invariant_sample import elementwise, embedding, matmul, norm, reduce, softmax

        families = (matmul, reduce, softmax, norm, embedding, elementwise)
        return {name: kernel for family in families for name, kernel in family.KERNELS.items()}

    def gaps(self) -> Sequence[Gap]:
        missing = [name for name in CONTRACTS if name not in self.kernels()]
        reason = "not written: the sample shows one or two operators of each kind"
        return [
            *(Gap(op=op, check="kernel", reason=_WHY.get(op, reason)) for op in missing),
            # Of what there is, too: no operator is named, so this holds for all of them.
            Gap(dtype=torch.float16, check="kernel", reason="float16 has not been tried yet"),
        ]

    def activate(self) -> None:
        self._switch_before = os.environ.get(SWITCH)
        os.environ[SWITCH] = "1"

    def deactivate(self) -> None:
        # Exactly as it was: a variable that was not there is absent again, not empty.
        if self._switch_before is None:
            os.environ.pop(SWITCH, None)
        else:
            os.environ[SWITCH] = self._switch_before
