"""Inductor's entry point, while the mode is on: our decompositions, exact code, a check of it.

`torch._inductor.compile_fx.compile_fx` is where Dynamo, `torch._inductor.compile` and libraries
with a backend of their own hand over a graph. What is set here is given as patches of the
configuration to the call, which Inductor keeps for the backward pass.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from batch_invariant.errors import ConfigurationError
from batch_invariant.inductor.fuse import after
from batch_invariant.inductor.rules import Rules, Watcher
from batch_invariant.inductor.scheduled import Check, collected
from batch_invariant.inductor.table import Table

EXACT = {
    # Low precision is rounded after every operation, as in eager, and not where fusion ends.
    # On a GPU it also keeps the compiler from contracting a product and a sum into an FMA.
    "emulate_precision_casts": True,
    "eager_numerics.division_rounding": True,
    "cpp.enable_floating_point_contract_flag": "off",
    "cpp.enable_unsafe_math_opt_flag": False,
    # Random numbers are drawn by the operators that eager code calls.
    "fallback_random": True,
}
_NEEDED = ("emulate_precision_casts", "cpp.enable_floating_point_contract_flag")
_CHECK = "_post_fusion_custom_pass"
_PASS = "post_grad_custom_pre_pass"


def install() -> Callable[[], None]:
    """Exchanges Inductor's entry point; returns what undoes it."""
    from torch._inductor import compile_fx as module

    stock = module.compile_fx
    signature = inspect.signature(stock)

    def compile_fx(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        given = call.arguments
        # With patches, the stock function sets them and comes here once more.
        if given.get("config_patches") or _is_ours(given.get("decompositions")):
            return stock(*call.args, **call.kwargs)
        from batch_invariant.inductor import rules_held

        rules = rules_held()
        assert rules is not None
        given["decompositions"] = _table(rules, given.get("decompositions"))
        given["config_patches"] = _patches(rules)
        if rules.watcher is not None:
            inner = given.get("inner_compile", module.compile_fx_inner)
            given["inner_compile"] = functools.partial(_shown, rules.watcher, inner)
        with _tagged(rules):
            return stock(*call.args, **call.kwargs)

    converts_as_stock = _round_in_cpp()
    module.compile_fx = compile_fx

    def undo() -> None:
        module.compile_fx = stock
        converts_as_stock()

    return undo


def _round_in_cpp() -> Callable[[], None]:
    """Makes C++ code round where it is told to emulate casts; returns what undoes it.

    That of torch 2.11 remembers the number before a cast to low precision, and goes on with it.
    """
    from torch._inductor import config
    from torch._inductor.codegen import cpp

    if "emulate_precision_casts" in cpp.CppOverrides.to_dtype.__code__.co_names:
        return lambda: None
    kernel: Any = cpp.CppKernel
    stock = kernel.cache_dtype_convert

    def cache_dtype_convert(self: Any, *args: Any) -> None:
        if not config.emulate_precision_casts:
            stock(self, *args)

    kernel.cache_dtype_convert = cache_dtype_convert

    def undo() -> None:
        kernel.cache_dtype_convert = stock

    return undo


class _Stock(dict[Any, Any]):
    """Torch's own decompositions, for an audit while the mode is off."""


def _is_ours(decompositions: Any) -> bool:
    return isinstance(decompositions, (Table, _Stock))


_tables: dict[Any, Table] = {}


def _table(rules: Rules, given: Any) -> dict[Any, Any]:
    from torch._inductor.decomposition import decompositions, select_decomp_table

    if not rules.enforced:
        return _Stock(select_decomp_table() if given is None else given)
    if given is not None:
        return Table(rules, given)
    if rules.identity not in _tables:
        _tables.clear()
        _tables[rules.identity] = Table(rules, decompositions)
    return _tables[rules.identity]


def _patches(rules: Rules) -> dict[str, Any]:
    from torch._inductor import config

    known = config.get_config_copy()
    if missing := {_CHECK, *_NEEDED} - set(known):
        raise ConfigurationError(
            f"torch {torch.__version__} has no option {', '.join(sorted(missing))} of Inductor, so "
            "compiled code cannot be kept batch-invariant; run it eagerly, with "
            'torch.compiler.set_stance("force_eager")'
        )
    patches: dict[str, Any] = {_CHECK: Check(rules, known[_CHECK])}
    if rules.enforced:
        patches |= {name: value for name, value in EXACT.items() if name in known}
        if not _keeps_casts():
            patches["pattern_matcher"] = False
        if any(device.fused for device in rules.devices.values()):
            patches[_PASS] = after(known[_PASS], rules)
    if rules.watcher is not None:
        patches["force_disable_caches"] = True
    return patches


def _keeps_casts() -> bool:
    """Whether Inductor's patterns leave a cast to low precision and back alone, as it rounds.

    Those of torch 2.11 take it for pointless. What else they look for, the table has replaced.
    """
    from torch._inductor.fx_passes import joint_graph

    return hasattr(joint_graph, "_is_lossless_fp_widening_cast")


def _shown(watcher: Watcher, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compiles a graph, and shows the watcher each run of it."""
    with collected() as kernels:
        compiled = inner(*args, **kwargs)
    run = getattr(compiled, "current_callable", None)
    if run is not None:

        def shown(inputs: Any) -> Any:
            with watcher.runs(kernels):
                return run(inputs)

        compiled.current_callable = shown
    return compiled


def _tagged(rules: Rules) -> Any:
    """Graphs in caches on disk are found again under the same rules alone."""
    config: Any = importlib.import_module("torch.compiler.config")
    return config.patch(cache_key_tag=f"{config.cache_key_tag} batch_invariant {rules.identity!r}")
