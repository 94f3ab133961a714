"""Inductor's entry point, while the mode is on: our decompositions, exact code, a check of it.

`torch._inductor.compile_fx.compile_fx` is where Dynamo, `torch._inductor.compile` and libraries
with a backend of their own hand over a graph. What is set here is given as patches of the
configuration to the call, which Inductor keeps for the backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from batch_invariant.inductor.rules import Rules
from batch_invariant.inductor.scheduled import Check
from batch_invariant.inductor.table import Table

_EXACT = {
    # Low precision is rounded after every operation, as in eager, and not where fusion ends.
    # On a GPU it also keeps the compiler from contracting a product and a sum into an FMA.
    "emulate_precision_casts": True,
    "eager_numerics.division_rounding": True,
    "cpp.enable_floating_point_contract_flag": "off",
    "cpp.enable_unsafe_math_opt_flag": False,
    # Random numbers are drawn by the operators that eager code calls.
    "fallback_random": True,
}
_CHECK = "_post_fusion_custom_pass"


def install() -> Callable[[], None]:
    """Exchanges Inductor's entry point; returns what undoes it."""
    from torch._inductor import compile_fx as module

    stock = module.compile_fx
    signature = inspect.signature(stock)

    def compile_fx(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        given = call.arguments
        # With patches, the stock function sets them and comes here once more.
        if given.get("config_patches") or isinstance(given.get("decompositions"), Table):
            return stock(*call.args, **call.kwargs)
        from batch_invariant.inductor import rules_held

        rules = rules_held()
        assert rules is not None
        given["decompositions"] = _table(rules, given.get("decompositions"))
        given["config_patches"] = _patches(rules)
        with _tagged(rules):
            return stock(*call.args, **call.kwargs)

    module.compile_fx = compile_fx

    def undo() -> None:
        module.compile_fx = stock

    return undo


_tables: dict[Any, Table] = {}


def _table(rules: Rules, given: Any) -> Table:
    from torch._inductor.decomposition import decompositions

    if given is not None:
        return Table(rules, given)
    if rules.identity not in _tables:
        _tables.clear()
        _tables[rules.identity] = Table(rules, decompositions)
    return _tables[rules.identity]


def _patches(rules: Rules) -> dict[str, Any]:
    from torch._inductor import config

    known = config.get_config_copy()
    patches = {name: value for name, value in _EXACT.items() if name in known}
    return {**patches, _CHECK: Check(rules, known[_CHECK])}


def _tagged(rules: Rules) -> Any:
    """Graphs in caches on disk are found again under the same rules alone."""
    import torch.compiler.config

    tag = f"{torch.compiler.config.cache_key_tag} batch_invariant {rules.identity!r}"
    return torch.compiler.config.patch(cache_key_tag=tag)
