"""Over torch's live registry: every operator is covered, harmless for a reason, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import batch_invariant as bi
from batch_invariant import coverage, mode
from batch_invariant.cpu.harmless import HARMLESS
from batch_invariant.ops.bits import bits
from batch_invariant.ops.elementwise import ATEN

# Operators of torch 2.13 that 2.11 does not have, so that the test of dead names holds on both.
SINCE_2_12: frozenset[str] = frozenset()


@pytest.fixture(scope="module")
def covered() -> set[str]:
    return {f"aten::{name}" for table in mode.overrides("cpu") for name in table}


def test_every_overload_is_covered_or_harmless_or_refused(covered: set[str]) -> None:
    refused = coverage.refused_overloads(covered, here=HARMLESS)
    for name in coverage.aten_overloads():
        kinds = [name in covered, coverage.harmless(name, HARMLESS) is not None, name in refused]
        assert any(kinds), name
        assert not (name in refused and (kinds[0] or kinds[1])), name
    assert len(refused) > 100


def test_no_name_is_listed_twice_and_none_is_dead() -> None:
    listed = [name for names in coverage._HARMLESS.values() for name in names.split()]
    listed += HARMLESS
    assert len(listed) == len(set(listed))
    known = {name.removeprefix("aten::") for name in torch._C._dispatch_get_all_op_names()}
    bases = {coverage.base_of(name) for name in known}
    dead = [n for n in listed if n not in known and n not in bases]
    if torch.__version__ >= "2.13":
        assert not dead
    else:
        assert set(dead) <= SINCE_2_12 or torch.__version__ < "2.12"


def test_an_operator_nobody_classified_is_refused(covered: set[str]) -> None:
    """What a newer torch adds is refused until somebody looks at it."""
    library = torch.library.Library("aten", "FRAGMENT")
    library.define("bi_test_newcomer(Tensor self) -> Tensor")
    library.impl("bi_test_newcomer", lambda self: self.flip(0), "CompositeExplicitAutograd")
    try:
        assert "aten::bi_test_newcomer" in coverage.refused_overloads(covered, here=HARMLESS)
        with bi.enabled(), pytest.raises(bi.UncoveredOpError, match="aten::bi_test_newcomer"):
            torch.ops.aten.bi_test_newcomer(torch.ones(3))
    finally:
        library._destroy()


_REFUSED: dict[str, Callable[[], object]] = {
    "convolution": lambda: F.conv1d(torch.ones(1, 1, 8), torch.ones(1, 1, 3)),
    "batch_norm": lambda: F.batch_norm(torch.randn(4, 3), None, None, training=True),
    "avg_pool": lambda: F.avg_pool2d(torch.ones(1, 1, 4, 4), 2),
    "fft": lambda: torch.fft.fft(torch.ones(4)),
    "cumprod": lambda: torch.ones(3).cumprod(0),
    "nansum": lambda: torch.ones(3).nansum(),
    "trace": lambda: torch.ones(3, 3).trace(),
    "cdist": lambda: torch.cdist(torch.ones(30, 3), torch.ones(30, 3)),
    "svd": lambda: torch.linalg.svd(torch.ones(3, 3)),
    "solve": lambda: torch.linalg.solve(torch.eye(3), torch.ones(3)),
    "embedding_bag": lambda: F.embedding_bag(torch.tensor([[0, 1]]), torch.ones(2, 3)),
    "interpolate": lambda: F.interpolate(torch.ones(1, 1, 4), scale_factor=2, mode="linear"),
    "lstm": lambda: torch.nn.LSTM(3, 3)(torch.ones(2, 1, 3)),
    "scatter_reduce": lambda: torch.zeros(3).scatter_reduce(
        0, torch.tensor([0, 0]), torch.ones(2), "mean"
    ),
    "cumprod to float": lambda: torch.ones(3, dtype=torch.int64).cumprod(0, dtype=torch.float32),
    "sparse": lambda: torch.eye(3).to_sparse() @ torch.ones(3, 3),
    "mkldnn": lambda: torch.ones(3, 3).to_mkldnn().sigmoid(),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_what_mixes_elements_without_a_kernel_is_refused(name: str) -> None:
    call = _REFUSED[name]
    with bi.enabled(), pytest.raises(bi.UncoveredOpError, match="has no batch-invariant kernel"):
        call()
    call()


_ALLOWED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cat": lambda x: torch.cat([x, x], 1),
    "where": lambda x: torch.where(x > 0, x, 0.5),
    "gather": lambda x: x.gather(1, torch.arange(5).expand(len(x), 5)),
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 1])),
    "masked_fill": lambda x: x.masked_fill(x > 1, -1.0),
    "sort": lambda x: x.sort(1).values,
    "max": lambda x: x.max(1).values,
    "cummax": lambda x: x.cummax(1).values,
    "median": lambda x: x.median(1).values,
    "count_nonzero": lambda x: torch.count_nonzero(x, 1),
    "any": lambda x: (x > 1).any(1),
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "hardtanh": F.hardtanh,
    "floor": torch.floor,
    "pad": lambda x: F.pad(x, (1, 2)),
    "scatter_add": lambda x: torch.zeros(len(x), 4).scatter_add(
        1, (torch.arange(x.size(1)) % 4).expand_as(x), x
    ),
    "index_add": lambda x: torch.zeros(len(x), 4).index_add(1, torch.arange(x.size(1)) % 4, x),
    "index_put accumulate": lambda x: torch.zeros(len(x), 4).index_put(
        (torch.arange(len(x))[:, None], (torch.arange(x.size(1)) % 4)[None]), x, accumulate=True
    ),
    "max_pool": lambda x: F.max_pool1d(x[:, None], 3)[:, 0],
    "add alpha": lambda x: torch.add(x, x.flip(1), alpha=0.3),
    "lerp": lambda x: torch.lerp(x, x.flip(1), 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.3),
    "mul": lambda x: x * x.flip(1),
    "div": lambda x: x / (x.flip(1) + 9),
}


def _varies(call: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether a row's bits change between batches, or between layouts of the batch."""
    x = torch.randn(67, 1027, generator=torch.Generator().manual_seed(0))
    for value in (x, x.mT.contiguous().mT):
        whole = call(value)
        for rows in (slice(0, 1), slice(3, 5), slice(60, 67)):
            part, wanted = call(value[rows].clone()), whole[rows]
            if not torch.equal(
                part.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)
            ):
                return True
    return False


@pytest.mark.parametrize("name", _ALLOWED)
def test_what_is_harmless_keeps_the_bits_of_a_row(name: str) -> None:
    with bi.enabled():
        assert not _varies(_ALLOWED[name])


def test_the_probe_finds_stock_torch_varying() -> None:
    """The negative control: were silu or sum left to torch as harmless, the probe would tell."""
    found = {
        n
        for n, f in {
            "silu": F.silu,
            "sum": lambda x: x.sum(1),
            "mm": lambda x: x @ x.mT[:, :40],
        }.items()
        if _varies(f)
    }
    assert found, "stock torch keeps its bits on this machine for all three"


def test_a_reason_for_every_refusal(covered: set[str]) -> None:
    for name, refusal in coverage.refused_overloads(covered, here=HARMLESS).items():
        assert len(refusal.text) > 15, name


CALLED_BY_GENERATE = """
    add.Tensor all any argmax arange bitwise_and.Tensor bmm cat clone copy_ cos cumsum embedding
    eq.Tensor exp expand full gather ge.Scalar gelu index.Tensor index_select isin.Tensor_Tensor
    le.Tensor log lt.Tensor masked_fill.Scalar max mean.dim mm mul.Tensor multinomial neg ne.Scalar
    ones pow.Tensor_Scalar rsqrt scatter.src silu sin slice.Tensor softmax.int sort sub.Tensor
    sum.dim_IntList tanh topk triu unsqueeze view where.self zeros _softmax _to_copy
    _local_scalar_dense
""".split()


@pytest.mark.parametrize("name", CALLED_BY_GENERATE)
def test_generation_needs_nothing_that_is_refused(name: str, covered: set[str]) -> None:
    assert torch._C._dispatch_has_kernel(f"aten::{name}")
    assert coverage.classify(f"aten::{name}", covered, HARMLESS).kind != "refused"


def test_elementwise_operators_are_covered_one_by_one_on_a_cpu(covered: set[str]) -> None:
    """Where elements are not computed alike everywhere, none of them is left to torch."""
    for name in coverage.aten_overloads():
        if coverage.base_of(name) in ATEN:
            kind = coverage.classify(name, covered, HARMLESS)
            assert kind.kind != "harmless" or kind.reason == coverage.DECOMPOSES, name


def test_a_backend_adds_to_what_is_harmless_and_takes_back() -> None:
    assert coverage.harmless("aten::kthvalue") is None
    assert coverage.harmless("aten::kthvalue", HARMLESS) == coverage.SELECTS
    assert coverage.harmless("aten::sort", {"sort": None}) is None
    assert coverage.harmless("aten::add.Tensor", {"add.Tensor": None}) is None
    assert coverage.harmless("aten::add.Scalar", {"add.Tensor": None}) == coverage.EXACT


def test_what_decomposes_on_a_cpu_is_not_refused_there() -> None:
    """Registered or not: these call operators that are covered."""
    with bi.enabled():
        assert torch.equal(2.0 ** torch.arange(3.0), torch.tensor([1.0, 2.0, 4.0]))
        assert len(torch._foreach_norm([torch.ones(4), torch.ones(9)])) == 2


def test_classify_agrees_with_what_is_refused(covered: set[str]) -> None:
    refused = coverage.refused_overloads(covered, here=HARMLESS)
    for name in coverage.aten_overloads():
        found = coverage.classify(name, covered, HARMLESS)
        assert found.reason
        assert (found.kind == "refused") == (name in refused), name


def test_what_torch_tags_as_a_reduction_is_harmless_only_if_exact(covered: set[str]) -> None:
    tag = getattr(torch.Tag, "reduction", None)
    if tag is None:
        pytest.skip("this torch has no Tag.reduction")
    wrong = []
    for name in coverage.aten_overloads():
        base, _, overload = name.removeprefix("aten::").partition(".")
        op = getattr(getattr(torch.ops.aten, base), overload or "default")
        found = coverage.classify(name, covered, HARMLESS)
        if tag in op.tags and found.kind == "harmless":
            exact = (coverage.COUNTS, coverage.SELECTS, coverage.DECOMPOSES)
            if found.reason not in exact:
                wrong.append((name, found.reason))
    assert wrong == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("targets", "sources", "width"), [(8, 200, 7), (16, 1000, 64)])
def test_accumulation_is_one_chain_in_index_order(
    targets: int, sources: int, width: int, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(0)
    start = torch.randn(targets, width, generator=g).to(dtype)
    source = torch.randn(sources, width, generator=g)
    source *= torch.exp2(torch.randint(-6, 7, source.shape, generator=g).float())
    source = source.to(dtype)
    index = torch.randint(targets, (sources,), generator=g)
    chain = start.float().clone()
    for i, target in enumerate(index.tolist()):
        chain[target] += source[i].float()
    expected = chain.to(dtype)
    wide = index[:, None].expand(sources, width)
    for threads in two_thread_counts():
        torch.set_num_threads(threads)
        for got in (
            start.index_add(0, index, source),
            start.scatter_add(0, wide, source),
            start.scatter_add(0, wide.contiguous(), source),
        ):
            assert torch.equal(bits(got), bits(expected))


def test_gradients_of_embeddings_do_not_depend_on_threads() -> None:
    g = torch.Generator().manual_seed(0)
    index, grad = torch.randint(50, (4000,), generator=g), torch.randn(4000, 33, generator=g)
    found = []
    for threads in two_thread_counts():
        torch.set_num_threads(threads)
        for _ in range(2):
            found.append(torch.ops.aten.embedding_dense_backward(grad, index, 50, -1, False))
    assert all(torch.equal(bits(other), bits(found[0])) for other in found)


def test_foreach_operators_are_dispatched_one_by_one() -> None:
    seen = []
    library = torch.library.Library("aten", "IMPL")
    kernel = torch.library.get_kernel("aten::exp", "CPU")

    def exp(keyset: Any, self: torch.Tensor) -> Any:
        seen.append(self.shape)
        return kernel.call_boxed(keyset, self)

    try:
        library.impl("exp", exp, "CPU", with_keyset=True)
        torch._foreach_exp([torch.ones(2), torch.ones(3)])
    finally:
        library._destroy()
    assert seen == [(2,), (3,)]


@pytest.mark.parametrize("grad", [False, True])
def test_products_whose_order_follows_the_batch_are_refused(grad: bool) -> None:
    factors = [torch.ones(4, 8), torch.ones(8, 5), torch.ones(5, 3)]
    factors[0].requires_grad_(grad)
    with bi.enabled():
        for call in (torch.linalg.multi_dot, lambda f: torch.chain_matmul(*f)):
            with pytest.raises(bi.UncoveredOpError, match="chosen by all sizes"):
                call(factors)


def test_refused_operators_raise_for_floats_and_run_for_whole_numbers() -> None:
    x = torch.arange(1, 7)
    with bi.enabled():
        assert torch.equal(torch.cumprod(x, 0), torch.tensor([1, 2, 6, 24, 120, 720]))
        with pytest.raises(bi.UncoveredOpError, match="cumprod"):
            torch.cumprod(x.float(), 0)
        with pytest.raises(bi.UncoveredOpError, match="put_"):
            torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=True)


def two_thread_counts() -> Iterator[int]:
    """One thread, then two; what was set before is restored."""
    before = torch.get_num_threads()
    try:
        yield 1
        yield 2
    finally:
        torch.set_num_threads(before)


def test_foreach_operators_reach_the_covered_ones() -> None:
    """They are listed as made of dispatched operators: their bits are those operators'."""
    xs = [torch.randn(5003), torch.randn(40, 999)]
    with bi.enabled():
        for norm, x in zip(torch._foreach_norm(xs), xs, strict=True):
            assert torch.equal(norm.reshape(()), bi.norm(x))
        for value, x in zip(torch._foreach_sigmoid(xs), xs, strict=True):
            assert torch.equal(value, bi.sigmoid(x))
