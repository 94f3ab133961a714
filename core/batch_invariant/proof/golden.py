"""Digests of results: those of portable kernels are the same on every machine, and kept here.

The inputs are drawn by exact integer arithmetic, so any device can check itself against the digests
that the CPU reference gave. `python -m batch_invariant.proof.golden` writes them anew, after a
change of a case or of an order; a diff of golden.json is a change of the contract.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from pathlib import Path

import torch

from batch_invariant import registry
from batch_invariant.ops import CONTRACTS
from batch_invariant.ops.bits import bits
from batch_invariant.proof.log import Log
from batch_invariant.proof.subject import Outputs, Subject, short

_FILE = Path(__file__).with_name("golden.json")


def golden(subject: Subject, log: Log) -> None:
    """The results of a portable kernel have the digests that are kept."""
    kept = _kept().get(subject.op.name, {}).get(short(subject.dtype), {})
    for case, data, args in subject.inputs():
        want = kept.get(f"{case.label}, {data}")
        if want is None:
            log.compare("there is none for this case; write golden.json anew", "golden", case, data)
            continue
        got = digest(subject.run(args))
        found = None if got == want else f"the result has digest {got}, and the golden one {want}"
        log.compare(found, "golden", case, data)


def digest(tensors: Outputs) -> str:
    """A short name of the dtypes, shapes and bits of some tensors."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(f"{short(tensor.dtype)} {list(tensor.shape)}".encode())
        whole.update(bits(tensor).numpy().tobytes())
    return whole.hexdigest()[:16]


@functools.cache
def _kept() -> dict[str, dict[str, dict[str, str]]]:
    found: dict[str, dict[str, dict[str, str]]] = json.loads(_FILE.read_text())
    return found


def main() -> None:
    """Writes the digests of every portable kernel of the CPU backend."""
    backend = registry.load("cpu")
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name, kernel in backend.kernels().items():
        op = CONTRACTS[name]
        for dtype in (*op.dtypes, torch.float64):
            if dtype in kernel.portable:
                subject = Subject(backend, op, dtype, kernel, kernel.guarantee)
                found.setdefault(name, {})[short(dtype)] = {
                    f"{case.label}, {data}": digest(subject.run(args))
                    for case, data, args in subject.inputs()
                }
    _FILE.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(f"{_FILE}: {sum(len(d) for d in found.values())} operators and dtypes\n")


if __name__ == "__main__":
    main()
