"""The order of additions measured from outside: known orders, CPU kernels, stock torch, `bi`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from batch_invariant import selector
from batch_invariant.cli import main
from batch_invariant.ops import CONTRACTS
from batch_invariant.order import (
    Order,
    Tree,
    by_size,
    chunked,
    digest,
    fused,
    lanes,
    reversed_groups,
    serial,
    undeclared,
)
from batch_invariant.proof.order.describe import describe
from batch_invariant.proof.order.fingerprint import (
    Fingerprint,
    OutOfReach,
    Run,
    Unseen,
    fingerprint,
    kernel_run,
    order_of,
    stock_run,
)
from batch_invariant.proof.order.masks import masks
from plugin_source import Install

SUM, MM, LSE, NORM = (CONTRACTS[name] for name in ("sum", "mm", "logsumexp", "norm"))
ODD = (1, 2, 3, 17, 64, 129, 300)
Rows = Callable[[torch.Tensor], torch.Tensor]

# Sums of the rows of [rows, n], in plain torch additions.


def add_serial(x: torch.Tensor) -> torch.Tensor:
    total = x[:, 0]
    for i in range(1, x.size(1)):
        total = total + x[:, i]
    return total


def add_backwards(x: torch.Tensor) -> torch.Tensor:
    return add_serial(x.flip(1))


def add_pairs(x: torch.Tensor) -> torch.Tensor:
    while x.size(1) > 1:
        even = x.size(1) // 2 * 2
        x = torch.cat([x[:, :even:2] + x[:, 1:even:2], x[:, even:]], 1)
    return x[:, 0]


def add_chunks(x: torch.Tensor) -> torch.Tensor:
    return add_serial(torch.stack([add_serial(part) for part in x.split(32, 1)], 1))


def add_lanes(x: torch.Tensor) -> torch.Tensor:
    parts = [add_serial(x[:, lane::8]) for lane in range(min(8, x.size(1)))]
    parts += [torch.zeros_like(parts[0])] * (8 - len(parts))
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [a + b for a, b in zip(parts[:half], parts[half:], strict=True)]
    return parts[0]


def add_fused(x: torch.Tensor) -> torch.Tensor:
    """Steps of 16 terms and the accumulator, aligned to the largest, cut off, rounded once."""
    total = torch.zeros(len(x))
    for part in x.split(16, 1):
        step = torch.cat([total[:, None], part], 1).double()
        kept = step.abs() >= step.abs().amax(1, keepdim=True) * 2.0**-25
        total = torch.where(kept, step, 0).sum(1).float()
    return total


KNOWN: dict[str, tuple[Rows, Order]] = {
    "serial": (add_serial, serial()),
    "chunked": (add_chunks, chunked(32, serial())),
    "lanes": (add_lanes, lanes(8, 4096)),
    "fused": (add_fused, fused(16)),
}


def rows_of(add: Rows) -> Run:
    def run(args: Any) -> tuple[torch.Tensor, ...]:
        x = args["self"]
        return (add(x.float()).to(args.get("dtype") or x.dtype),)

    return run


def measure(add: Rows, n: int, **how: Any) -> Fingerprint:
    how = {"rows": 64, "row": None, **how}
    return fingerprint(SUM, rows_of(add), how.pop("dtype", torch.float32), n, **how)


def arities(tree: Tree) -> set[int]:
    found, stack = set(), [tree]
    while stack:
        part = stack.pop()
        if isinstance(part, tuple):
            found.add(len(part))
            stack += part
    return found


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("n", ODD)
def test_known_orders_are_recovered(name: str, n: int) -> None:
    add, order = KNOWN[name]
    tree = order.tree(n)
    assert tree is not None
    found = measure(add, n)
    assert found.digest == digest(tree)
    if name != "fused":
        assert found.replay is not None
        assert (found.replay.equal, found.replay.accumulator) == (16, "float32")
        assert found.limits == ()


@pytest.mark.parametrize("n", ODD)
def test_pairs_are_recovered(n: int) -> None:
    found = measure(add_pairs, n)
    assert found.text == ("one term" if n == 1 else f"serial({n})" if n < 4 else f"pairwise({n})")
    # The tree is no other than the one that adds like this.
    assert found.replay is not None
    assert found.replay.accumulator == "float32"


def test_backwards_is_another_order_and_costs_little() -> None:
    forwards, backwards = measure(add_serial, 300), measure(add_backwards, 300)
    assert forwards.digest != backwards.digest
    assert digest(_mirrored(300)) == backwards.digest
    assert backwards.calls < 100


def _mirrored(n: int) -> Tree:
    tree: Tree = n - 1
    for i in range(n - 2, -1, -1):
        tree = (tree, i)
    return tree


def test_the_digest_tells_orders_apart_and_not_their_spelling() -> None:
    found = {name: measure(add, 129).digest for name, (add, _) in KNOWN.items()}
    assert len(set(found.values())) == len(KNOWN)
    swapped = measure(lambda x: add_serial(torch.cat([x[:, 1:2], x[:, :1], x[:, 2:]], 1)), 129)
    assert swapped.digest == found["serial"]  # 1 + 0 is 0 + 1


def test_steps_of_several_terms_are_one_addition() -> None:
    found = measure(add_fused, 100)
    assert arities(found.tree) == {16, 17, 5}
    assert found.text == "fused(16)"
    assert "how a step of several terms rounds is not seen" in found.limits
    assert found.replay is not None
    assert not found.replay.refuted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_counted_in_pieces(dtype: torch.dtype) -> None:
    # A layout without `wide`, so that nothing helps: the result has 8 or 11 digits.
    assert SUM.probe is not None
    narrow = replace(SUM, probe=replace(SUM.probe, wide=None))
    found = fingerprint(narrow, rows_of(add_chunks), dtype, 500, rows=64, row=None)
    tree = chunked(32, serial()).tree(500)
    assert tree is not None
    assert found.digest == digest(tree)
    assert found.replay is not None
    assert found.replay.accumulator == "float32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_replay_refutes_a_wrong_tree(dtype: torch.dtype) -> None:
    """Adds in one order where it is probed, and in another on other data."""

    def add(x: torch.Tensor) -> torch.Tensor:
        masked = x.abs().amax() >= (2.0**15 if dtype == torch.float16 else 2.0**100)
        return add_serial(x) if masked else add_lanes(x)

    found = measure(add, 129, dtype=dtype, rows=8)
    assert found.replay is not None
    assert found.replay.refuted
    assert any("does not reproduce the bits" in limit for limit in found.limits)


def test_replay_detects_a_wider_accumulator() -> None:
    found = measure(lambda x: add_serial(x.double()), 129)
    assert found.digest == measure(add_serial, 129).digest
    assert found.replay is not None
    assert (found.replay.accumulator, found.replay.wider) == ("float64", True)
    assert found.notes == ("it adds in float64, wider than fp32",)


def test_an_accumulator_that_holds_masks_and_units_is_refused() -> None:
    assert SUM.probe is not None
    narrow = replace(SUM, probe=replace(SUM.probe, wide=None))
    run = rows_of(lambda x: add_serial(x.double()))
    with pytest.raises(Unseen, match="the accumulator is so wide"):
        fingerprint(narrow, run, torch.float16, 129, rows=8, row=None)


def test_what_is_no_sum_is_refused() -> None:
    with pytest.raises(Unseen, match="no sum of the terms"):
        measure(lambda x: x.abs().sum(1), 33)


def test_rows_that_add_otherwise_are_found() -> None:
    def add(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([add_lanes(x[:1]), add_serial(x[1:])])

    found = measure(add, 129, rows=8)
    assert found.digest == measure(add_serial, 129).digest
    assert found.faults[0].startswith("1 of 8 rows of one call do not add as the others do")
    first = measure(add, 129, rows=8, row=0)
    assert first.digest == measure(add_lanes, 129).digest


def test_prefixes_of_a_running_sum() -> None:
    def run(last_alone: bool) -> Run:
        def call(args: Any) -> tuple[torch.Tensor, ...]:
            x = args["self"]
            out = torch.stack([add_lanes(x[:, : k + 1]) for k in range(x.size(1))], 1)
            out[:, -1] = add_serial(x)
            return (out if last_alone else x.double().cumsum(1).float(),)

        return call

    op = CONTRACTS["cumsum"]
    good = fingerprint(op, run(False), torch.float32, 33, rows=4, row=None)
    assert good.faults == ()
    assert good.notes == ("it adds in float64, wider than fp32",)
    bad = fingerprint(op, run(True), torch.float32, 33, rows=4, row=None)
    assert bad.faults == (
        "the sum of the first 11 terms is not made in the order of the whole sum",
    )


@pytest.mark.parametrize(
    ("rounded", "how"), [(True, "products rounded"), (False, "FMA"), (None, "products not seen")]
)
def test_products(rounded: bool | None, how: str) -> None:
    def run(args: Any) -> tuple[torch.Tensor, ...]:
        a, b = args["self"].double(), args["mat2"].double()
        total = torch.zeros(a.size(0), b.size(1))
        for k in range(a.size(1)):
            factor = a[:, k].bfloat16().double() if rounded is None else a[:, k]
            product = factor[:, None] * b[None, k]
            total = (total + (product.float() if rounded else product)).float()
        return (total,)

    found = fingerprint(MM, run, torch.float32, 65, rows=2)
    assert found.text == "serial(65)"
    assert found.products == how


def test_an_order_that_depends_on_the_number_of_terms() -> None:
    order = by_size(100, serial(), chunked(32, serial()))
    assert str(order) == "serial, from 100 terms on chunked(32, serial)"
    for n, inner in ((1, serial()), (99, serial()), (100, chunked(32, serial()))):
        tree, wanted = order.tree(n), inner.tree(n)
        assert tree is not None
        assert wanted is not None
        assert digest(tree) == digest(wanted)
    with pytest.raises(ValueError, match="declares none"):
        by_size(100, serial(), undeclared("unknown"))


def test_a_long_chain_needs_no_recursion() -> None:
    kernel = selector.kernels("cpu")["mm"]
    run = kernel_run(MM, selector.current_backend("cpu"), kernel)
    found = fingerprint(MM, run, torch.float32, 2047, rows=2)
    assert found.text == "serial(2047)"
    assert found.row == 0
    repr(found)


@pytest.mark.parametrize("k", [2047, 2048, 2500])
def test_the_cpus_chunks_of_fp32_are_the_declared_ones(k: int) -> None:
    kernel = selector.kernels("cpu")["mm"]
    run = kernel_run(MM, selector.current_backend("cpu"), kernel)
    tree = kernel.order_of(torch.float32).tree(k)
    assert tree is not None
    for rows in (1, 40):
        found = fingerprint(MM, run, torch.float32, k, rows=rows)
        assert found.digest == digest(tree)
        assert found.text.startswith("serial" if k < 2048 else "chunked(")


# Sums of terms that cannot be negative.


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 129])
@pytest.mark.parametrize("name", ["serial", "chunked", "lanes"])
def test_orders_of_positive_terms(name: str, n: int) -> None:
    add, order = KNOWN[name]
    tree = order.tree(n)
    assert tree is not None

    def lse(args: Any) -> tuple[torch.Tensor, ...]:
        top = args["self"].amax(1, keepdim=True)
        return (add((args["self"] - top).exp()).log() + top[:, 0],)

    def norm(args: Any) -> tuple[torch.Tensor, ...]:
        return (add(args["self"].square()).sqrt(),)

    for op, run in ((LSE, lse), (NORM, norm)):
        found = fingerprint(op, run, torch.float32, n, rows=16, row=None)
        assert found.digest == digest(tree)
        assert found.replay is None


def test_positive_terms_out_of_reach() -> None:
    def norm(wide: Rows) -> Run:
        return lambda args: (wide(args["self"].square()).sqrt().float(),)

    with pytest.raises(Unseen, match="the accumulator is wider"):
        fingerprint(NORM, norm(lambda x: add_serial(x.double())), torch.float32, 17, rows=4)

    def cut_off(x: torch.Tensor) -> torch.Tensor:
        """One step of all terms that drops what is below the last place of the largest."""
        return x.where(x >= x.amax(1, keepdim=True) * 2.0**-23.5, 0).double().sum(1)

    with pytest.raises(Unseen, match="a step adds more than two terms, or truncates"):
        fingerprint(NORM, norm(cut_off), torch.float32, 17, rows=4)
    with pytest.raises(Unseen, match="which a result of 16 bits rounds off"):
        fingerprint(LSE, stock_run(LSE), torch.bfloat16)
    with pytest.raises(Unseen, match="the last place of the sum does not show"):
        fingerprint(NORM, lambda args: (torch.ones(4),), torch.float32, 17, rows=4)


def test_too_many_terms_are_refused() -> None:
    with pytest.raises(OutOfReach, match="20000 terms are too many"):
        fingerprint(
            CONTRACTS["scaled_dot_product_attention"],
            lambda args: pytest.fail("called although it is out of reach"),
            torch.float16,
            20000,
        )
    with pytest.raises(Unseen, match="float32 counts to 16777216"):
        masks(torch.float32, torch.float32, 2**24 + 1, False)
    with pytest.raises(ValueError, match="no row 3 of 2"):
        fingerprint(SUM, stock_run(SUM), torch.float32, 4, rows=2, row=3)


def test_operators_without_a_probe_say_so() -> None:
    with pytest.raises(OutOfReach, match="exp has no probe"):
        order_of(CONTRACTS["exp"], lambda args: (), torch.float32)
    with pytest.raises(Unseen, match="mm has no probe for the layout 'over dim 0'"):
        fingerprint(MM, stock_run(MM), torch.float32, 8, layout="over dim 0")


# Our kernels, and stock torch as the negative control.

PROBED = [
    (op.name, dtype)
    for op in CONTRACTS.values()
    if op.probe is not None
    for dtype in op.dtypes
    if op.probe.value is None or dtype == torch.float32
]


@pytest.mark.parametrize(("name", "dtype"), PROBED)
def test_cpu_kernels_add_as_they_declare(name: str, dtype: torch.dtype) -> None:
    op, kernel = CONTRACTS[name], selector.kernels("cpu")[name]
    run = kernel_run(op, selector.current_backend("cpu"), kernel)
    found = order_of(op, run, dtype, rows=(2, 65))
    assert len({each.digest for each in found}) == 1
    assert all(each.replay is None or each.replay.accumulator == "float32" for each in found)
    assert all(each.faults == () for each in found)
    tree = kernel.order_of(dtype).tree(found[0].terms)
    if tree is None:
        pytest.skip(f"declared without a tree: {kernel.order_of(dtype)}; found {found[0].text}")
    assert found[0].digest == digest(tree)


def test_segments_of_the_row_order_show_in_a_long_row() -> None:
    run = kernel_run(SUM, selector.current_backend("cpu"), selector.kernels("cpu")["sum"])
    found = fingerprint(SUM, run, torch.float32, 9300, rows=512, row=None)
    assert found.text == "lanes(1024, 8192)"
    shorter = lanes(1024, 16384).tree(9300)
    assert shorter is not None
    assert found.digest != digest(shorter)


@pytest.mark.parametrize(("name", "layout"), [("sum", "over dim 0"), ("mm", None)])
def test_stock_torch_changes_its_order_with_the_batch(name: str, layout: str | None) -> None:
    op = CONTRACTS[name]
    found = [
        fingerprint(op, stock_run(op), torch.float32, None, m, row=None, layout=layout)
        for m in (1, 2, 8, 64)
    ]
    if len({each.bits for each in found}) == 1:
        pytest.skip(f"stock {name} adds in one order here: {found[0].text}")
    # Each of the trees gives the bits at its own size, so the bits differ too.
    assert all(each.replay is not None and not each.replay.refuted for each in found)


# The command.

VARIANT = """
from dataclasses import replace

from batch_invariant.backend import API_VERSION
from batch_invariant.cpu import CpuBackend
from batch_invariant.order import lanes

def linear(input, weight, bias=None):
    from batch_invariant.cpu.matmul import product
    half = input.size(-1) // 2
    if len(input) < 4:
        return product(input, weight.mT)
    if len(input) == 5:
        out = input[:, :1] * weight[:, 0]
        for k in range(1, input.size(1)):
            out = out + input[:, k : k + 1] * weight[:, k]
        return out
    return product(input[:, :half], weight.mT[:half]) + product(input[:, half:], weight.mT[half:])

def mean(self, dim=None, keepdim=False, *, dtype=None):
    from batch_invariant.cpu.reduce import KERNELS
    out = KERNELS["mean"].fn(self, dim, keepdim, dtype=dtype)
    out[0] = KERNELS["mean"].fn(self[:1].roll(1, 1), dim, keepdim, dtype=dtype)[0]
    return out

class Plugin(CpuBackend):
    name = "variant"

    def kernels(self):
        table = dict(super().kernels())
        table["linear"] = replace(table["linear"], fn=linear)
        table["sum"] = replace(table["sum"], order=lanes(512, 8192))
        table["mean"] = replace(table["mean"], fn=mean)
        return table
"""


def test_command_catches_a_kernel_whose_order_depends_on_the_batch(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(VARIANT, name="variant")
    words = ["fingerprint", "--backend", "variant", "--rows", "1,2,8"]
    assert main([*words, "--op", "linear", "--terms", "300"]) == 1
    out = capsys.readouterr().out
    assert "  variant      2 DIFFERENT orders\n" in out
    assert "M 1 2                  serial(300)  replay 16/16 in float32, FMA" in out
    assert "M 8                    chunked(2 x 150, serial)  replay 16/16 in float32, FMA" in out
    assert "chunked(512, serial): NOT what is found" in out
    assert "0 of 1 sums have one order, as declared." in out
    # One tree, but not one rounding.
    assert main([*words[:3], "--rows", "2,5", "--op", "linear", "--terms", "40"]) == 1
    out = capsys.readouterr().out
    assert "M 2                    serial(40)  replay 16/16 in float32, FMA" in out
    assert "M 5                    serial(40)  replay 16/16 in float32, products rounded" in out
    # The first row is added from its last term on.
    assert main([*words, "--op", "mean", "--terms", "60"]) == 1
    out = capsys.readouterr().out
    assert "1 of 8 rows of one call do not add as the others do" in out
    # One order, but not the one that is declared.
    assert main([*words, "--op", "sum"]) == 1
    out = capsys.readouterr().out
    assert "lanes(512, 8192): NOT what is found" in out


def test_command_holds_for_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fingerprint", "--op", "mm", "--op", "softmax", "--rows", "1,3"]) == 0
    out = capsys.readouterr().out
    assert "M 1 3                  serial(1100)  replay 16/16 in float32, FMA" in out
    assert "serial, from 2048 terms on chunked(512, serial): the same" in out
    assert "2 of 2 sums have one order, as declared." in out
    assert "\x1b" not in out


def test_command_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fingerprint", "--op", "mm", "--rows", "2,5", "--terms", "100", "--json"]
    assert main([*words, "--dtype", "float16"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    (result,) = report["results"]
    assert result["declared"]["matches"] is True
    assert result["here"]["orders"] == 1
    first, second = result["here"]["fingerprints"]
    assert (first["rows"], second["rows"], first["text"]) == (2, 5, "serial(100)")
    assert first["digest"] == result["declared"]["digest"]


def test_command_says_what_it_cannot_see(capsys: pytest.CaptureFixture[str]) -> None:
    # Named, it must be seen; in a run over everything it is not held against the backend.
    assert main(["fingerprint", "--op", "exp", "--rows", "1"]) == 1
    assert "not seen: exp has no probe" in capsys.readouterr().out
    assert main(["fingerprint", "--op", "softmax", "--rows", "1", "--dtype", "bfloat16"]) == 1
    assert "which a result of 16 bits rounds off" in capsys.readouterr().out
    assert main(["fingerprint", "--rows", "2", "--dtype", "bfloat16", "--terms", "64"]) == 0
    assert "7 of 7 sums have one order, as declared; 1 cannot be seen." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--op", "frobnicate"], "unknown operator frobnicate; known: mm"),
        (["--backend", "asend"], "unknown backend 'asend'; installed: "),
        (["--dtype", "int32"], "unknown dtype 'int32'; known: float32"),
    ],
)
def test_command_usage_errors(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fingerprint", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--rows", "1,x"], ["--rows", "0"], ["--terms", "-1"]])
def test_command_numbers(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["fingerprint", *words])
    assert left.value.code == 2
    assert "expected numbers from 1" in capsys.readouterr().err


# Names.


@pytest.mark.parametrize(
    ("order", "n", "name"),
    [
        (serial(), 4096, "serial(4096)"),
        (chunked(1024, serial()), 8192, "chunked(8 x 1024, serial)"),
        (chunked(32, fused(8)), 100, "chunked(3 x 32 + 4, fused(8))"),
        (chunked(32, lanes(2, 32)), 128, "chunked(4 x 32, 2-lane strided)"),
        (fused(16), 64, "fused(16)"),
        (fused(64), 64, "fused(64)"),
        (lanes(8, 4096), 100, "8-lane strided"),
        (chunked(4, lanes(2, 4)), 64, "chunked(16 x 4, 2-lane strided)"),
        (lanes(1024, 8192), 2100, "lanes(1024, 8192)"),
        (reversed_groups(2), 9, "serial, groups of 2 reversed"),
        (reversed_groups(3), 9, "chain(1 2 0 5 4 3 8 7 6)"),
        (Order("", lambda leaves: ((0, 3), (1, 2, 4))), 5, "depth 2, steps 2 of 2, 1 of 3"),
    ],
)
def test_names(order: Order, n: int, name: str) -> None:
    tree = order.tree(n)
    assert tree is not None
    assert describe(tree).split(":")[0] == name
