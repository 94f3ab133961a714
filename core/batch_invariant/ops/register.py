"""Defines contracts as torch operators: schema, fake and autograd, once per process."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from batch_invariant.ops.contract import Op

NAMESPACE = "batch_invariant"

_library = torch.library.Library(NAMESPACE, "DEF")


def define(contracts: Iterable[Op]) -> None:
    """Registers schema, fake and autograd of every contract."""
    for op in contracts:
        name = f"{NAMESPACE}::{op.name}"
        _library.define(op.name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(name, op.fake, lib=_library)
        if op.backward is not None:
            torch.library.register_autograd(
                name, op.backward, setup_context=op.setup_context, lib=_library
            )
