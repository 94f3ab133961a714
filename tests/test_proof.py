"""The proof kit itself: every check finds what it is there to find, and plain torch fails it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from batch_invariant import registry, selector
from batch_invariant.backend import Gap
from batch_invariant.conformance.test_any_size import EXAMPLES, counterexample
from batch_invariant.errors import ConfigurationError
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops import CONTRACTS
from batch_invariant.ops.variant import Variant
from batch_invariant.proof import checks
from batch_invariant.proof.control import stock_varies
from batch_invariant.proof.invariance import compare
from batch_invariant.proof.log import Log
from batch_invariant.proof.subject import Subject
from batch_invariant.proof.transforms import ROWS
from plugin_source import PLUGIN, Install

Kernel = Callable[..., Any]


def _subject(
    op: str, wrap: Callable[[Kernel], Kernel], dtype: torch.dtype = torch.float32, **changes: Any
) -> Subject:
    """An operator of the CPU backend whose kernel is broken by `wrap`."""
    kernel = selector.kernels("cpu")[op]
    broken = replace(kernel, fn=wrap(kernel.fn), **changes)
    return Subject(registry.load("cpu"), CONTRACTS[op], dtype, broken, Guarantee.SCHEDULE)


def _breaks(check: str, subject: Subject) -> list[str]:
    return [str(found) for found in checks.run(checks.Item("cpu", check, subject, None)).breaks]


def _sound(fn: Kernel) -> Kernel:
    return fn


def _changed_when(condition: Callable[[torch.Tensor], Any]) -> Callable[[Kernel], Kernel]:
    """One bit of the results changes where the condition says so of the first argument."""

    def wrap(fn: Kernel) -> Kernel:
        def kernel(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            out = fn(x, *args, **kwargs)
            return torch.where(torch.as_tensor(condition(x)), out.nextafter(out + 1), out)

        return kernel

    return wrap


def _position(x: torch.Tensor) -> torch.Tensor:
    return (torch.arange(len(x)) % 2 == 0)[:, None]


def _returns(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Kernel], Kernel]:
    return lambda fn: lambda *args, **kwargs: change(fn(*args, **kwargs))


def _second(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Kernel], Kernel]:
    def wrap(fn: Kernel) -> Kernel:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            first, second, *rest = fn(*args, **kwargs)
            return (first, change(second), *rest)

        return kernel

    return wrap


def _counting(fn: Kernel) -> Kernel:
    calls = itertools.count()
    return lambda *args, **kwargs: fn(*args, **kwargs) + next(calls)


def _leaking(fn: Kernel) -> Kernel:
    return lambda x, *args, **kwargs: fn(x, *args, **kwargs) + (x * 0).sum()


def _mutating(fn: Kernel) -> Kernel:
    return lambda x, *args, **kwargs: fn(x.mul_(2), *args, **kwargs)


def _float64(fn: Kernel) -> Kernel:
    """Accurate and invariant, in another order."""
    return lambda a, b: (a.double()[:, None] @ b.double())[:, 0].float()


def _shuffled(fn: Kernel) -> Kernel:
    """The same sum in another order, one for every number of elements."""

    def kernel(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return fn(x[..., torch.randperm(x.size(-1), generator=generator)], *args, **kwargs)

    return kernel


def _lenient(fn: Kernel) -> Kernel:
    return lambda x, dim, dtype: fn(x, dim % 2, dtype)


_CONTROLS: list[tuple[str, str, Callable[[Kernel], Kernel], str]] = [
    (
        "result",
        "mm",
        _returns(torch.Tensor.double),
        "torch.float64[3, 512], and the contract says torch.float32",
    ),
    ("result", "mm", _mutating, "the argument self was changed"),
    ("result", "exp", lambda fn: lambda x: x, "shares memory with self"),
    ("repeat", "mm", _counting, "the same call"),
    ("T1 population", "mm", _changed_when(lambda x: len(x) == 3), "3 of 64 rows"),
    ("T1 population", "mm", _changed_when(lambda x: len(x) > 1000), "64 of 1040 rows"),
    ("T2 position", "linear", _changed_when(_position), "reversed"),
    ("T2 position", "linear", _changed_when(lambda x: x.storage_offset() == 1), "another address"),
    ("T3 neighbours", "mm", _leaking, "(nan)"),
    ("T4 padding", "mm", _changed_when(lambda x: len(x) == 65), "1 more rows"),
    ("T5 schedule", "linear", _changed_when(lambda x: len(x) == 1), "tokens 40 to 41"),
    ("T6 packing", "linear", _changed_when(lambda x: x.dim() == 3), "as 4 sequences of 16"),
    ("T7 prefix", "cumsum", _changed_when(lambda x: x.size(-1) < 1024), "the first 341"),
    ("accuracy", "mm", _returns(lambda out: out * 1.001), "beyond the bound"),
    ("accuracy", "embedding", _returns(torch.zeros_like), "against the definition"),
    ("accuracy", "argmax", _returns(torch.zeros_like), "against the definition"),
    ("accuracy", "layer_norm", _second(torch.zeros_like), "output 1 against float64"),
    ("golden", "mm", _float64, "and the golden one"),
    ("order", "sum", _shuffled, "the declared order of"),
    ("order", "mm", lambda fn: lambda a, b: torch.mm(a, b), "with 64 rows are"),
    ("bad input", "softmax", _lenient, "dim 7"),
    ("dispatch", "mm", _float64, "the registered operator"),
    ("compile", "mm", _float64, "compiled by"),
]


@pytest.mark.parametrize(
    ("check", "op", "wrap", "message"),
    _CONTROLS,
    ids=[f"{c[0]}-{c[1]}-{n}" for n, c in enumerate(_CONTROLS)],
)
def test_a_broken_kernel_is_found(
    check: str, op: str, wrap: Callable[[Kernel], Kernel], message: str
) -> None:
    assert not _breaks(check, _subject(op, _sound))
    found = _breaks(check, _subject(op, wrap))
    assert any(message in text for text in found), found


@pytest.mark.parametrize(
    ("check", "condition", "message"),
    [
        ("T5 schedule", lambda query, *_: query.size(1) == 7, "queries 0 to 7 of 17"),
        ("T6 packing", lambda query, *_: query.dim() == 3, "(packed)"),
        ("T6 packing", lambda query, key, *_: key.size(1) == 64, "pages of 64"),
        ("T6 packing", lambda query, key, *_: bool(key.isnan().any()), "keys of NaN before"),
        ("T7 prefix", lambda query, *_: query.size(1) == 9, "the first 9 of 17 tokens"),
    ],
)
def test_attention_that_follows_its_storage_is_found(
    check: str, condition: Callable[..., bool], message: str
) -> None:
    def wrap(fn: Kernel) -> Kernel:
        def kernel(*args: Any) -> Any:
            out, lse = fn(*args)
            return (out.nextafter(out + 1) if condition(*args) else out), lse

        return kernel

    assert not _breaks(check, replace(_subject("attention", _sound), full=False))
    found = _breaks(check, replace(_subject("attention", wrap), full=False))
    assert any(message in text for text in found), found


def test_a_gradient_that_should_be_refused_is_found() -> None:
    subject = _subject("mm", _sound)
    cases = tuple(replace(case, differentiable=False) for case in subject.op.cases)
    found = _breaks("gradients", replace(subject, op=replace(subject.op, cases=cases)))
    assert all("went through, and the case is declared to have no gradient" in f for f in found)
    assert len(found) == len(cases)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guarantee": Guarantee.RUN_TO_RUN}, "the declared guarantee is: run_to_run, and"),
        ({"dtypes": frozenset()}, "the kernel does not take torch.float32"),
        ({"portable": frozenset({torch.int8})}, "declares torch.int8 portable without taking"),
        ({"order": {}}, "declares no order of additions"),
        ({"supports": lambda *a: "too large"}, "and the call goes through"),
    ],
)
def test_an_untrue_declaration_is_found(changes: dict[str, Any], message: str) -> None:
    assert any(message in text for text in _breaks("kernel", _subject("mm", _sound, **changes)))


def test_a_missing_kernel_is_found() -> None:
    subject = Subject(
        registry.load("cpu"), CONTRACTS["mm"], torch.float32, None, Guarantee.SCHEDULE
    )
    assert _breaks("kernel", subject) == ["the backend 'cpu' has no kernel and declares no gap"]


def test_a_search_ends_with_the_smallest_counterexample() -> None:
    compared: list[int] = []
    counterexample(_subject("mm", _sound), compared)
    assert len(compared) == EXAMPLES
    with pytest.raises(AssertionError) as error:
        counterexample(_subject("mm", _changed_when(lambda x: len(x) >= 5 and x.size(1) >= 7)), [])
    text = str(error.value)
    assert "of 5, normal data, seed 0" in text
    assert "(k 7, n 1)" in text


_SOURCE = """
    from dataclasses import replace

    import torch

    from batch_invariant.cpu import CpuBackend

    def change(fn):
        {change}

    class Plugin(CpuBackend):
        name = "changed"

        def kernels(self):
            table = dict(super().kernels())
            table[{op!r}] = replace(table[{op!r}], fn=change(table[{op!r}].fn))
            return table

        def activate(self):
            {activate}
"""


def _changed(
    install: Install, op: str, change: str, activate: str = "pass"
) -> dict[tuple[str, str], checks.Outcome]:
    """The outcomes of a CPU backend with one kernel changed, by operator and check."""
    install(_SOURCE.format(op=op, change=change, activate=activate), name="changed")
    found = {}
    for item in checks.plan("changed", [op]):
        if item.subject is not None and item.subject.dtype == torch.float32:
            found[item.subject.op.name, item.check] = checks.run(item)
    return found


def test_a_wrong_gradient_is_found(install: Install) -> None:
    source = _SOURCE.format(
        op="softmax_backward",
        change="return lambda *a: fn(*a) * 1.01 * (1 if len(a[0]) == 64 else 1.0000001)",
        activate="pass",
    )
    install(source, name="changed")
    (item,) = [
        item
        for item in checks.plan("changed", ["softmax"])
        if item.check == "gradients" and item.subject and item.subject.dtype == torch.float32
    ]
    text = str(checks.run(item))
    assert "off by" in text
    assert "T1 population" in text


def test_outputs_that_share_memory_are_found_by_opcheck_too(install: Install) -> None:
    change = "return lambda *a: (lambda o, m, r: (o, *torch.stack([m, r])))(*fn(*a))"
    found = _changed(install, "layer_norm", change)
    assert "alias" in str(found["layer_norm", "opcheck"])
    assert "shares memory with output 1" in str(found["layer_norm", "result"])


def test_a_kernel_is_checked_while_its_backend_is_active(install: Install) -> None:
    change = (
        "return lambda *a: fn(*a) + (len(a[0]) == 3) * (torch.get_default_dtype() is torch.half)"
    )
    found = _changed(install, "mm", change, activate="torch.set_default_dtype(torch.half)")
    try:
        assert "3 of 64 rows" in str(found["mm", "T1 population"])
    finally:
        torch.set_default_dtype(torch.float32)


def test_declared_float64_is_checked_too() -> None:
    planned = {
        item.check
        for item in checks.plan("cpu", ["mm"])
        if item.subject and item.subject.dtype == torch.float64
    }
    assert {"kernel", "result", "repeat", "T1 population", "T7 prefix", "golden"} <= planned
    float64 = _subject("mm", _changed_when(lambda x: len(x) == 3), torch.float64)
    assert any("3 of 64 rows" in text for text in _breaks("T1 population", float64))


def test_a_patch_that_is_not_undone_is_found(install: Install) -> None:
    activate = "torch.nn.functional.relu = torch.sigmoid"
    install(_SOURCE.format(op="mm", change="return fn", activate=activate), name="changed")
    outcome = checks.run(checks.Item("changed", "restoration", None, None))
    assert "torch.nn.functional.relu was" in str(outcome)
    assert checks.run(checks.Item("cpu", "restoration", None, None)).ok


def test_every_check_has_a_control_here() -> None:
    controlled = {check for check, *_ in _CONTROLS}
    controlled |= {"kernel", "gradients", "opcheck", "restoration", checks.ANY_SIZE}
    # A captured graph needs a CUDA device, and so does its control.
    assert controlled | {"graph replay"} == set(checks.NAMES)


def test_a_check_that_compares_nothing_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checks.CHECKS, "repeat", (lambda subject, log: None, lambda s: True))
    assert _breaks("repeat", _subject("mm", _sound)) == ["the check compared nothing"]


def test_a_gap_is_expected_to_fail_and_fails_when_it_holds() -> None:
    gap = Gap(op="mm", check="T1 population", reason="split by rows")
    item = checks.Item("cpu", "T1 population", _subject("mm", _sound), gap)
    outcome = checks.run(item)
    assert not outcome.ok
    assert "holds, although a gap is declared: split by rows" in str(outcome)
    broken = _subject("mm", _changed_when(lambda x: len(x) == 3))
    assert checks.run(replace(item, subject=broken)).ok


@pytest.mark.parametrize("gap", ["op='no_such'", "check='T9'"])
def test_a_gap_in_nothing_is_an_error(install: Install, gap: str) -> None:
    source = PLUGIN.format(name="mine").replace("Kernel\n", "Kernel, Gap\n", 1)
    source += f"\n        def gaps(self):\n            return [Gap({gap}, reason='later')]\n"
    install(source, name="mine")
    with pytest.raises(ConfigurationError, match="mine declares a gap in an unknown"):
        checks.plan("mine")


def test_a_gap_needs_a_reason() -> None:
    with pytest.raises(ValueError, match="a gap without a reason"):
        Gap(op="mm", reason=" ")


def test_one_changed_bit_is_caught_and_named() -> None:
    out = torch.randn(ROWS, 5)
    changed = out.clone()
    changed.view(torch.int32)[17, 3] ^= 1
    rows = range(ROWS)
    variant = Variant("T2 position", "", {}, rows, rows)
    assert compare((out,), (out.clone(),), (0,), variant) is None
    found = compare((out,), (changed,), (0,), variant) or ""
    assert found.startswith("row 17 changed in 1 of 320 values, the first at [17, 3]")


def test_signed_zeros_and_nans_are_compared_by_their_bits() -> None:
    variant = Variant("T2 position", "", {}, range(4), range(4))
    zeros, nans = torch.zeros(4, 1), torch.full((4, 1), torch.nan)
    assert compare((zeros,), (-zeros,), (0,), variant) is not None
    assert compare((nans,), (nans.clone(),), (0,), variant) is None


@pytest.mark.parametrize(
    ("ops", "what"),
    [
        (("mm", "linear", "bmm"), "matrix products"),
        (("silu", "sigmoid", "gelu", "exp"), "elementwise functions"),
        (("sum", "mean", "softmax", "var"), "reductions, with their strided cases"),
    ],
)
def test_plain_torch_fails_the_same_checks(ops: tuple[str, ...], what: str) -> None:
    """The control of the whole kit, on the variance of plain torch that is known on x86."""
    varies = {op: stock_varies(_subject(op, _sound)) for op in ops}
    assert any(varies.values()), f"plain torch kept its bits on this machine in {what}"


def test_strided_rows_of_plain_torch_are_caught() -> None:
    subject = _subject("sum", lambda fn: torch.sum)
    log = Log()
    checks.CHECKS["T1 population"][0](subject, log)
    checks.CHECKS["T2 position"][0](subject, log)
    cases = {found.case for found in log.breaks}
    assert any("strided" in case or "dim 0" in case for case in cases), cases
